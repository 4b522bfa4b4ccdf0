from __future__ import annotations

import math

import pytest
import torch
from helpers.bases import resolved, settings_in
from helpers.tiny import make_base

from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base
from rankwise.modeling.merge import Reference, compare_answers, record_answers


class Fixed(torch.nn.Module):
    """Gives the same logits (A, V) whatever it reads."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)
        self.embedding = torch.nn.Embedding(2, 1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, **_):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.table[None])


def test_the_measures_are_those_of_their_definitions():
    half, skewed = [0.0, 0.0], [math.log(3.0), 0.0]
    reference = Reference(prompt=(0,), answer=(0, 1), logits=torch.tensor([skewed, [0.0, 1.0]]))
    found = compare_answers([reference], Fixed([half, [1.0, 0.0]]))
    # KL((3/4, 1/4) || (1/2, 1/2)); the second position has the two logits exchanged.
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    p = 1 / (1 + math.exp(-1.0))
    second = p - (1 - p)
    assert found.mean_kl == pytest.approx((first + second) / 2)
    assert found.max_kl == pytest.approx(second)
    assert found.max_logit_difference == pytest.approx(math.log(3.0))
    assert (found.prompts, found.tokens) == (1, 2)
    assert found.equal_greedy_tokens == 0.5
    assert found.equal_greedy_answers == 0.0


def test_a_model_agrees_with_itself_and_another_one_less(tmp_path):
    settings = settings_in(tmp_path)
    one, other = (
        load_base(resolved(make_base(tmp_path / str(seed), seed=seed)), QuantizationSpec(), settings, device="cpu")
        for seed in (0, 1)
    )
    references = record_answers(one.model, one.tokenizer, [[5, 6, 7], [8]], max_new_tokens=6)
    assert [len(reference.logits) for reference in references] == [len(reference.answer) for reference in references]
    for reference in references:
        assert reference.logits.argmax(-1).tolist() == list(reference.answer)
    same = compare_answers(references, one.model)
    assert (same.equal_greedy_tokens, same.equal_greedy_answers) == (1.0, 1.0)
    assert (same.max_logit_difference, same.mean_kl, same.max_kl) == (0.0, 0.0, 0.0)
    different = compare_answers(references, other.model)
    assert different.equal_greedy_tokens < 1.0
    assert different.mean_kl > 0.1
    with pytest.raises(ConfigError, match="but there are none"):
        record_answers(one.model, one.tokenizer, [], max_new_tokens=6)
