"""Mixed batches on a GPU, against peft's own forward of one row at a time."""

from __future__ import annotations

import pytest
import torch
from benchmarks.decoding_ways import NAMES, OURS, PLAIN, Fleet

from rankwise.modeling.decoding.engine import engine_of
from rankwise.modeling.decoding.generation import Decoding
from rankwise.modeling.decoding.scheduler import Prompt, generate

pytestmark = pytest.mark.gpu
TEXTS = ["How much is this diamond?", "carat 0.23", "0 1 2 3 4 5 6 7 8 9 10 20", "Price is $326 user", "E"]


@pytest.fixture(scope="module")
def fleet(load):
    return Fleet(load(), ranks=(2, 4, 8), targets=("q_proj", "v_proj", "down_proj"), max_new_tokens=12)


@pytest.fixture(scope="module")
def prompts(fleet):
    ids = fleet.base.tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    return [(fleet.names[at % 3], tuple(tokens)) for at, tokens in enumerate(ids * 2)]


def test_greedy_answers_in_mixed_batches_are_those_of_peft(fleet, prompts):
    assert engine_of(fleet.base.model) is not None
    ours = fleet.run(OURS, prompts).tokens
    assert ours == fleet.run(PLAIN, prompts).tokens
    assert ours == fleet.run(NAMES, prompts).tokens
    assert [fleet.answers([prompt], 1)[0] for prompt in prompts] == ours


def test_sampled_rows_do_not_depend_on_their_batch(fleet, prompts):
    rows = [Prompt(token_ids=ids, adapter=name, seed=at) for at, (name, ids) in enumerate(prompts)]
    decoding = Decoding(max_new_tokens=8, temperature=1.0, top_k=50, top_p=0.95)
    together = generate(fleet.base, rows, decoding, batch_size=10)
    assert [generate(fleet.base, [row], decoding)[0].token_ids for row in rows] == [row.token_ids for row in together]


def test_16_bit_logits_agree_well_enough_for_the_engine(load):
    base = load("bfloat16")
    assert engine_of(base.model) is not None
    assert base.model.dtype == torch.bfloat16
