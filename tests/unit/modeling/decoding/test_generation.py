"""Generation against plain loops over the model's own logits."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import make_base

from rankwise.exceptions import ConfigError
from rankwise.modeling.decoding.generation import (
    Decoding,
    end_token_ids,
    finish_row,
    generate_batch,
    length_batches,
    row_seed,
)

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [40, 41, 42, 43]]


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def loaded(request, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make_base(tmp_path_factory.mktemp("base"), request.param)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def greedy(model, prompt, count, ends):
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tuple(tokens[len(prompt) :])


def test_greedy_rows_of_a_padded_batch_equal_a_plain_loop_over_each_row(loaded):
    model, tokenizer = loaded
    ends = end_token_ids(model, tokenizer)
    rows = generate_batch(model, tokenizer, PROMPTS, Decoding(max_new_tokens=8))
    assert [row.token_ids for row in rows] == [greedy(model, prompt, 8, ends) for prompt in PROMPTS]
    assert [row.prompt_tokens for row in rows] == [6, 2, 4]


def test_a_sampled_row_draws_the_same_tokens_alone_and_in_any_batch(loaded):
    model, tokenizer = loaded
    decoding = Decoding(max_new_tokens=8, temperature=1.0, top_p=0.9)
    seeds = [row_seed(3, index) for index in range(3)]
    together = generate_batch(model, tokenizer, PROMPTS, decoding, seeds=seeds)
    alone = [generate_batch(model, tokenizer, [p], decoding, seeds=[s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert [row.token_ids for row in together] == [row.token_ids for row in alone]


def test_sampling_follows_the_softmax_of_the_scaled_logits_within_top_p(loaded):
    model, tokenizer = loaded
    rows = 600
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1]])).logits[0, -1] / 2.0
    chances = logits.softmax(-1)
    ordered, order = chances.sort(descending=True)
    kept = order[: int((ordered.cumsum(0) < 0.5).sum()) + 1]
    expected = torch.zeros_like(chances)
    expected[kept] = chances[kept] / chances[kept].sum()
    drawn = generate_batch(
        model,
        tokenizer,
        [PROMPTS[1]] * rows,
        Decoding(max_new_tokens=1, temperature=2.0, top_p=0.5),
        seeds=[row_seed(0, index) for index in range(rows)],
    )
    counts = torch.bincount(torch.tensor([row.token_ids[0] for row in drawn]), minlength=len(chances)) / rows
    assert counts[expected == 0].sum() == 0
    assert (counts - expected).abs().sum() / 2 < 0.15  # total variation of 600 draws


def test_a_stop_text_ends_its_row_and_is_cut_from_the_text(loaded):
    model, tokenizer = loaded
    free = generate_batch(model, tokenizer, PROMPTS, Decoding(max_new_tokens=12))
    stop = free[0].text[2:4]
    rows = generate_batch(model, tokenizer, PROMPTS, Decoding(max_new_tokens=12, stop=(stop,)))
    assert rows[0].text == free[0].text[: free[0].text.find(stop)]
    assert rows[0].finish_reason == "stop"
    assert rows[0].token_ids == free[0].token_ids[: len(rows[0].token_ids)]
    assert len(rows[0].token_ids) < len(free[0].token_ids)
    for row, other in zip(rows[1:], free[1:], strict=True):
        assert row.text == (other.text.split(stop)[0] if stop in other.text else other.text)


@pytest.mark.parametrize("at", [0, 1, 500, 999])
def test_the_token_that_completed_a_stop_text_is_found_with_few_looks(at):
    looks = []

    class Tokenizer:
        def decode(self, tokens, skip_special_tokens):
            looks.append(len(tokens))
            return "".join("x" if token else "a" for token in tokens)

    tokens = [0] * at + [1] + [0] * (999 - at)
    row = finish_row(Tokenizer(), tokens, Decoding(max_new_tokens=1000, stop=("x",)), (), 3)
    assert (row.text, row.token_ids) == ("a" * at, tuple(tokens[: at + 1]))
    assert len(looks) < 14


def test_finish_reason_tells_an_end_token_from_the_length_limit(loaded):
    model, tokenizer = loaded
    free = generate_batch(model, tokenizer, PROMPTS[:1], Decoding(max_new_tokens=6))[0]
    assert free.finish_reason == "length"
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [free.token_ids[2]]
    try:
        row = generate_batch(model, tokenizer, PROMPTS[:1], Decoding(max_new_tokens=6))[0]
    finally:
        model.generation_config.eos_token_id = kept
    assert row.finish_reason == "stop"
    assert row.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2]) + 1]


def test_the_base_s_own_generation_settings_take_no_part(loaded):
    model, tokenizer = loaded
    plain = generate_batch(model, tokenizer, PROMPTS, Decoding(max_new_tokens=6))
    kept = model.generation_config.repetition_penalty
    model.generation_config.repetition_penalty = 50.0
    try:
        again = generate_batch(model, tokenizer, PROMPTS, Decoding(max_new_tokens=6))
        assert model.generation_config.repetition_penalty == 50.0
    finally:
        model.generation_config.repetition_penalty = kept
    assert again == plain


def test_wrong_arguments_are_refused_with_the_value_and_the_range(loaded):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match=r"max_new_tokens must be 1 or more, got 0; temperature .* got -1"):
        Decoding(max_new_tokens=0, temperature=-1)
    with pytest.raises(ConfigError, match=r"top_p must be above 0 and at most 1, got 1.5"):
        Decoding(top_p=1.5)
    with pytest.raises(ConfigError, match="empty text"):
        Decoding(stop=("",))
    with pytest.raises(ConfigError, match=r"max_new_tokens must be a whole number, got 2.5; top_k .* got 0.5"):
        Decoding(max_new_tokens=2.5, top_k=0.5)
    for stop in ("abc", [7]):
        with pytest.raises(ConfigError, match="stop must be a sequence of texts, got"):
            Decoding(stop=stop)
    with pytest.raises(ConfigError, match="row 1 has an empty prompt"):
        generate_batch(model, tokenizer, [[1], []], Decoding())
    with pytest.raises(ConfigError, match="more than the 512 positions"):
        generate_batch(model, tokenizer, [[1] * 500], Decoding(max_new_tokens=64))
    with pytest.raises(ConfigError, match="one seed per row, got none for 1 rows"):
        generate_batch(model, tokenizer, [[1]], Decoding(temperature=1.0))


def test_batches_go_from_the_longest_row_to_the_shortest():
    assert length_batches([3, 9, 5, 9, 1], 2) == [[1, 3], [2, 0], [4]]
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        length_batches([1], 0)
