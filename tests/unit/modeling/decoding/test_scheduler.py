"""Mixed batches against the model's own logits, one adapter and one row at a time, through peft's own forward."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers.adapted import attach, encode_prompts, load_tiny
from helpers.turns import count_together, in_threads
from transformers import AddedToken

from rankwise.exceptions import ConfigError, JobError
from rankwise.modeling.decoding import scheduler
from rankwise.modeling.decoding.engine import RunningBatch
from rankwise.modeling.decoding.generation import Decoding, end_token_ids
from rankwise.modeling.decoding.scheduler import Prompt, generate, greedy, prompt_problem
from rankwise.modeling.lora.packed import delete_adapter, install, uninstall

TEXTS = ["How much is this diamond?", "carat 0.23", "0 1 2 3 4 5 6 7 8 9 10 20", "Price is $326 user", "E"]
ADAPTERS = ["b", None, "a", "a", "b"]


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "llama-4bit"])
def base(request, tmp_path_factory):
    architecture, _, bits = request.param.partition("-")
    loaded = load_tiny(tmp_path_factory.mktemp("base"), architecture, load_in_4bit=bits == "4bit")
    attach(loaded.model, "a", r=4, seed=1)
    attach(loaded.model, "b", r=2, seed=2)
    return loaded


@pytest.fixture(scope="module")
def prompts(base):
    return [
        Prompt(token_ids=ids, adapter=adapter, seed=index)
        for index, (ids, adapter) in enumerate(zip(encode_prompts(base, TEXTS), ADAPTERS, strict=True))
    ]


def alone(base, prompt, count):
    """A plain loop over peft's own forward, without cache, padding, batch or routing."""
    from peft.tuners.lora import LoraLayer

    uninstall(base.model)
    layers = [module for module in base.model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(prompt.adapter is not None)
        if prompt.adapter is not None:
            layer.set_adapter(prompt.adapter)
    tokens = list(prompt.token_ids)
    ends = end_token_ids(base.model, base.tokenizer)
    with torch.no_grad():
        while len(tokens) - len(prompt.token_ids) < count:
            tokens.append(int(base.model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] in ends:
                break
    base.model.requires_grad_(False)
    for layer in layers:
        layer.enable_adapters(True)
    install(base.model)
    return tuple(tokens[len(prompt.token_ids) :])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_text_in_mixed_batches_of_any_size_equals_each_row_alone_under_its_adapter(base, prompts, batch_size):
    made = generate(base, prompts, Decoding(max_new_tokens=6), batch_size=batch_size)
    assert [row.token_ids for row in made] == [alone(base, prompt, 6) for prompt in prompts]


def test_every_adapter_and_the_bare_base_say_something_of_their_own(base, prompts):
    same = [replace(prompts[0], adapter=adapter) for adapter in ["a", "b", None]]
    assert len({row.token_ids for row in generate(base, same, Decoding(max_new_tokens=6))}) == 3


def test_a_sampled_row_depends_on_its_own_seed_only(base, prompts):
    decoding = Decoding(max_new_tokens=6, temperature=0.7, top_p=0.95)
    together = generate(base, prompts, decoding, batch_size=5)
    turned = generate(base, list(reversed(prompts)), decoding, batch_size=2)
    assert [row.token_ids for row in together] == [row.token_ids for row in reversed(turned)]
    other = generate(base, [replace(prompt, seed=prompt.seed + 100) for prompt in prompts], decoding)
    assert [row.token_ids for row in together] != [row.token_ids for row in other]


def test_rows_in_work_have_generators_and_in_greedy_decoding_none(base, prompts, monkeypatch):
    held = []
    choose = scheduler._TokenChooser.__call__

    def spy(self, rows, logits):
        tokens = choose(self, rows, logits)
        held.append((set(self._generators), {row.index for row in rows}))
        return tokens

    monkeypatch.setattr(scheduler._TokenChooser, "__call__", spy)
    generate(base, prompts, Decoding(max_new_tokens=3, temperature=1.0), batch_size=2)
    assert all(generators == rows for generators, rows in held)
    held.clear()
    generate(base, prompts, Decoding(max_new_tokens=3), batch_size=2)
    assert held
    assert not any(generators for generators, _ in held)


def test_threads_take_turns_over_a_model_that_the_engine_does_not_take(base, prompts, monkeypatch):
    monkeypatch.setattr(scheduler, "engine_of", lambda model: None)
    decoding = Decoding(max_new_tokens=4)
    expected = generate(base, prompts, decoding, batch_size=2)
    together = count_together(monkeypatch, scheduler, "generate_batch")
    results = in_threads(lambda turn: generate(base, prompts[::turn], decoding, batch_size=2), (1, -1))
    assert set(together) == {1}
    assert results == {1: expected, -1: expected[::-1]}


def test_an_adapter_that_is_not_plain_lora_goes_by_itself_and_changes_nothing_for_others(base, prompts, caplog):
    attach(base.model, "dora", r=2, seed=4, use_dora=True)
    try:
        mixed = [*prompts[:3], replace(prompts[0], adapter="dora"), *prompts[3:], replace(prompts[1], adapter="dora")]
        made = generate(base, mixed, Decoding(max_new_tokens=6), batch_size=3)
        assert [row.token_ids for row in made] == [alone(base, prompt, 6) for prompt in mixed]
        assert made[3].token_ids != made[0].token_ids
        assert "dora: not plain LoRA" in caplog.text
    finally:
        delete_adapter(base.model, "dora")


def test_results_say_how_long_prompt_and_answer_were_and_why_they_ended(base, prompts):
    (first, *_) = generate(base, prompts, Decoding(max_new_tokens=3))
    ends = end_token_ids(base.model, base.tokenizer)
    assert first.prompt_tokens == len(prompts[0].token_ids)
    assert len(first.token_ids) <= 3
    assert first.finish_reason == ("stop" if first.token_ids[-1] in ends else "length")


def test_progress_counts_rows(base, prompts):
    seen = []

    class Counting:
        @contextmanager
        def task(self, description, total, unit="B"):
            seen.append((description, total, unit))
            yield seen.append

    run = greedy(base, max_new_tokens=1, batch_size=2, progress=Counting())
    made = run([prompt.token_ids for prompt in prompts], ADAPTERS)
    assert seen == [("generate", 5, "rows"), 1, 1, 1, 1, 1]
    assert [row.prompt_tokens for row in made] == [len(prompt.token_ids) for prompt in prompts]


def test_no_prompts_give_no_generations(base):
    assert generate(base, [], Decoding(max_new_tokens=1)) == []


def test_a_model_found_in_training_mode_is_evaluated_and_given_back_so(base, prompts):
    expected = generate(base, prompts, Decoding(max_new_tokens=4))
    base.model.train()
    try:
        assert generate(base, prompts, Decoding(max_new_tokens=4)) == expected
        assert base.model.training
    finally:
        base.model.eval()


def test_an_adapter_that_is_not_attached_is_refused_and_not_taken_for_the_base(base, prompts):
    with pytest.raises(ValueError, match="the model has no adapter c; it has a, b"):
        generate(base, [replace(prompts[0], adapter="c")], Decoding(max_new_tokens=1))


def test_prompts_that_cannot_be_continued_are_refused_by_their_place(base, prompts):
    with pytest.raises(ConfigError, match="prompt 1: it has no tokens"):
        generate(base, [prompts[0], Prompt(token_ids=())], Decoding(max_new_tokens=1))
    with pytest.raises(ConfigError, match="prompt 0: its 510 tokens and max_new_tokens 3 exceed the 512 positions"):
        generate(base, [Prompt(token_ids=(5,) * 510)], Decoding(max_new_tokens=3))
    assert prompt_problem(base, 509, 3) is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_out_of_memory_lowers_the_number_of_rows_and_changes_no_answer(base, prompts, monkeypatch, caplog, temperature):
    decoding = Decoding(max_new_tokens=6, temperature=temperature)
    expected = generate(base, prompts, decoding, batch_size=5)
    logits = RunningBatch.logits
    steps = []

    def scarce(self):
        steps.append(len(self.rows))
        # In the middle of answers first, at once then.
        if len(steps) == 3 or (len(self.rows) > 2 and len(steps) > 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(self)

    monkeypatch.setattr(RunningBatch, "logits", scarce)
    assert generate(base, prompts, decoding, batch_size=5) == expected
    assert "out of memory: at most 2 rows are decoded together" in caplog.text
    monkeypatch.setattr(RunningBatch, "logits", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(JobError, match="out of memory on cpu with a single row"):
        generate(base, prompts, decoding)


def test_a_special_token_without_a_role_is_an_end_token_when_it_is_a_stop_text(base):
    tokenizer = deepcopy(base.tokenizer)
    tokenizer.add_tokens([AddedToken("<|eom|>", special=True)])
    assert "<|eom|>" not in tokenizer.all_special_tokens
    number = tokenizer.convert_tokens_to_ids("<|eom|>")
    assert tokenizer.decode([number], skip_special_tokens=True) == ""
    assert number in end_token_ids(base.model, tokenizer, ("<|eom|>",))
    assert number not in end_token_ids(base.model, tokenizer, ("other",))


def test_a_special_token_among_the_stop_texts_ends_a_row(base, prompts):
    free = generate(base, prompts, Decoding(max_new_tokens=6))
    token = base.tokenizer.convert_ids_to_tokens(free[0].token_ids[2])
    base.tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    (row,) = generate(base, prompts[:1], Decoding(max_new_tokens=6, stop=(token,)))
    assert row.finish_reason == "stop"
    assert row.token_ids == free[0].token_ids[: free[0].token_ids.index(free[0].token_ids[2]) + 1]
