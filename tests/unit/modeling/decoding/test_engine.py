"""Rows that come and go, against peft's own forward of one row at a time."""

from __future__ import annotations

import logging
from dataclasses import replace
from threading import Thread

import pytest
import torch
from helpers.adapted import attach, encode_prompts, load_tiny

from rankwise.modeling.decoding import engine as engine_module
from rankwise.modeling.decoding import slot_cache
from rankwise.modeling.decoding.engine import DecodingRow, RunningBatch, engine_of
from rankwise.modeling.decoding.generation import Decoding
from rankwise.modeling.decoding.scheduler import Prompt, generate, generate_each
from rankwise.modeling.lora.packed import delete_adapter

TEXTS = [
    "How much is this diamond?",
    "carat 0.23",
    "0 1 2 3 4 5 6 7 8 9 10 20",
    "Price is $326 user",
    "E",
    "Ideal, color E",
]
LONG = Decoding(max_new_tokens=20)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    loaded = load_tiny(tmp_path_factory.mktemp("base"))
    attach(loaded.model, "a", r=4, seed=1)
    attach(loaded.model, "b", r=2, seed=2)
    attach(loaded.model, "broken", r=2, seed=3)
    with torch.no_grad():
        loaded.model.model.layers[0].self_attn.q_proj.lora_B["broken"].weight[0, 0] = float("nan")
    return loaded


@pytest.fixture(scope="module")
def prompts(base):
    adapters = ["a", None, "b", "a", "b", None]
    return [
        Prompt(token_ids=ids, adapter=adapter)
        for ids, adapter in zip(encode_prompts(base, TEXTS), adapters, strict=True)
    ]


@pytest.fixture
def ends(base, prompts):
    """An end token that rows meet at different steps, so that they leave one after another."""
    kept = base.model.generation_config.eos_token_id
    made = generate(base, prompts, LONG)
    counts = {token: sum(token in row.token_ids for row in made) for row in made for token in row.token_ids}
    base.model.generation_config.eos_token_id = [token for token, count in counts.items() if 1 < count < len(prompts)][
        :3
    ]
    yield
    base.model.generation_config.eos_token_id = kept


@pytest.mark.usefixtures("ends")
@pytest.mark.parametrize("batch_size", [2, 3, 6])
def test_rows_that_leave_early_make_place_and_no_row_notices(base, prompts, batch_size):
    many = prompts + prompts[::-1]
    alone = [generate(base, [prompt], LONG)[0] for prompt in prompts]
    assert len({len(row.token_ids) for row in alone}) > 2
    assert generate(base, many, LONG, batch_size=batch_size) == alone + alone[::-1]


def test_a_waiting_row_enters_while_others_are_in_the_middle_of_their_answers(base, prompts, ends, monkeypatch):
    seen = []
    enter = RunningBatch.admit

    def spy(self, rows):
        seen.append((len(rows), [len(row.generated) for row in self.rows]))
        enter(self, rows)

    monkeypatch.setattr(RunningBatch, "admit", spy)
    generate(base, prompts * 2, LONG, batch_size=3)
    assert sum(entered for entered, _ in seen) == 12
    assert any(made for _, made in seen), seen


def test_a_prompt_above_the_budget_goes_through_in_pieces_and_gives_the_same(base, prompts, monkeypatch):
    expected = generate(base, prompts, LONG)
    for budget in (5, 40):
        monkeypatch.setattr(engine_module, "PREFILL_TOKENS", budget)
        assert generate(base, prompts, LONG, batch_size=6) == expected


def test_eager_attention_takes_its_mask_as_numbers(base, prompts):
    expected = generate(base, prompts, LONG)
    base.model.set_attn_implementation("eager")
    engine_module._COMPATIBILITY.pop(base.model)
    try:
        assert engine_of(base.model) is not None
        assert [row.token_ids for row in generate(base, prompts, LONG)] == [row.token_ids for row in expected]
    finally:
        base.model.set_attn_implementation("sdpa")
        engine_module._COMPATIBILITY.pop(base.model)


def test_adapters_too_large_for_a_stack_go_one_after_another(base, prompts, monkeypatch, caplog):
    expected = generate(base, prompts, LONG)
    monkeypatch.setattr(engine_module, "STACK_SHARE", 0.0)
    with caplog.at_level(logging.INFO, logger="rankwise"):
        assert generate(base, prompts, LONG) == expected
    assert "stacked they would take 0 of 0 MiB" in caplog.text


def test_rows_in_work_are_as_many_as_memory_has_room_for(base, prompts, monkeypatch, caplog):
    engine = engine_of(base.model)
    running = RunningBatch(engine, slots=3, adapters=())
    running.admit([DecodingRow(index=0, prompt=[5] * 64, adapter=None)])
    running.logits()
    # Two layers of keys and values; the 64th column made it grow to 64, the 65th would to 128.
    held = sum(each.nbytes for layer in running._cache.layers for each in (layer.keys, layer.values))
    monkeypatch.setattr(engine_module, "free_memory", lambda: int(2 * held / engine_module.CACHE_SHARE))
    assert engine.rows_that_fit(16, 52) == 6
    assert engine.rows_that_fit(5, 52) == 5
    assert engine.rows_that_fit(16, 65) == 3
    expected = generate(base, prompts, LONG)
    monkeypatch.setattr(engine_module, "free_memory", lambda: 0)
    with caplog.at_level(logging.INFO, logger="rankwise"):
        assert generate(base, prompts, LONG) == expected
    assert "1 of 6 rows are decoded together" in caplog.text


def test_numbers_that_are_not_finite_stay_in_the_rows_of_their_adapter(base, prompts):
    expected = generate(base, prompts, LONG)
    mixed = generate(base, [*prompts, replace(prompts[0], adapter="broken")], LONG, batch_size=7)
    assert mixed[:-1] == expected


def test_what_a_row_leaves_in_its_slot_does_not_reach_the_row_that_takes_it(base, prompts):
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    good = [prompt for prompt in prompts if prompt is not longest]
    expected = generate(base, good, LONG)
    # The second of the longest ones: its slot is taken by a row that is shorter than the one beside it.
    mixed = generate(base, [longest, replace(longest, adapter="broken"), *good], LONG, batch_size=2)
    assert mixed[2:] == expected


def test_a_row_that_moves_into_a_slot_finds_nothing_of_the_row_before(base):
    engine = engine_of(base.model)
    broken = DecodingRow(index=0, prompt=list(range(5, 11)), adapter="broken")
    long = DecodingRow(index=1, prompt=list(range(5, 17)), adapter=None)
    short = DecodingRow(index=2, prompt=[7, 8, 9], adapter=None)
    running = RunningBatch(engine, slots=3, adapters=["broken"])
    running.admit([broken, long, short])
    assert running.logits()[0].isnan().any()
    running.remove([0])
    assert running.rows == [short, long]
    running.admit([DecodingRow(index=3, prompt=[4, 5], adapter=None)])
    assert running.logits().isfinite().all()


def test_a_cache_never_has_more_columns_than_is_foretold():
    tensor = torch.zeros(1, 1, 0, 1)
    for columns in range(1, 700):
        tensor = slot_cache._grown(tensor, columns)
        at_once = slot_cache._grown(torch.zeros(1, 1, columns - 1, 1), columns)
        assert columns <= max(tensor.shape[2], at_once.shape[2]) <= slot_cache.most_columns(columns)


def test_without_memory_for_a_stack_adapters_go_one_after_another(base, prompts, monkeypatch, caplog):
    expected = generate(base, prompts, LONG)

    def scarce(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_module, "StackedLora", scarce)
    assert generate(base, prompts, LONG) == expected
    assert "out of memory for a stack of 2 adapters" in caplog.text


def test_what_peft_s_own_forward_was_given_back_for_is_routed_again(base, prompts):
    from rankwise.flavor.load import activate

    expected = generate(base, prompts, LONG)
    activate(base.model, "b")
    assert generate(base, prompts, LONG) == expected


@pytest.mark.parametrize("batch_size", [2, 6])
def test_an_adapter_made_active_or_attached_between_two_rows_gets_into_neither(base, prompts, monkeypatch, batch_size):
    from rankwise.flavor.load import activate

    expected = generate(base, prompts, LONG)
    changes = [
        lambda: activate(base.model, "a"),
        lambda: attach(base.model, "new", r=2, seed=9, target_modules=["up_proj"]),
        lambda: activate(base.model, "new"),
        lambda: delete_adapter(base.model, "new"),
    ]
    for share in (engine_module.STACK_SHARE, 0.0):
        monkeypatch.setattr(engine_module, "STACK_SHARE", share)
        made = {}
        for change, (at, row) in zip(
            [*changes, *[lambda: None] * 2], generate_each(base, prompts, LONG, batch_size=batch_size), strict=True
        ):
            made[at] = row
            change()
        assert [made[at] for at in range(len(prompts))] == expected


def test_two_threads_decode_over_one_model_without_mixing_their_rows(base, prompts):
    expected = generate(base, prompts, LONG)
    results: dict[int, list] = {}

    def work(turn):
        results[turn] = generate(base, prompts[::turn], LONG, batch_size=3)

    threads = [Thread(target=work, args=(turn,)) for turn in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[1] == expected
    assert results[-1] == expected[::-1]


def test_a_model_with_a_sliding_window_is_left_to_transformers_and_that_is_said(tmp_path, caplog):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
        )
    ).eval()
    with caplog.at_level(logging.WARNING, logger="rankwise"):
        assert engine_of(model) is None
        assert engine_of(model) is None
    assert caplog.text.count("its layers keep DynamicSlidingWindowLayer") == 1


def test_an_engine_that_does_not_agree_with_the_model_is_not_used(base, monkeypatch, caplog):
    engine_module._COMPATIBILITY.pop(base.model)
    # A mask that hides a row's first token.
    mask = engine_module.attention_mask
    monkeypatch.setattr(
        engine_module, "attention_mask", lambda seen, model: mask(seen.index_fill(1, torch.tensor([0]), False), model)
    )
    with caplog.at_level(logging.INFO, logger="rankwise"):
        assert engine_of(base.model) is None
    assert "logits differ by" in caplog.text
    engine_module._COMPATIBILITY.pop(base.model)


@pytest.fixture
def unknown(base):
    """The base as one that nothing was found out about."""
    engine_module._COMPATIBILITY.pop(base.model, None)
    yield base.model
    engine_module._COMPATIBILITY.pop(base.model, None)


def test_logits_that_are_no_numbers_are_no_agreement(unknown, monkeypatch, caplog):
    logits = RunningBatch.logits
    monkeypatch.setattr(RunningBatch, "logits", lambda self: logits(self) * float("nan"))
    with caplog.at_level(logging.INFO, logger="rankwise"):
        assert engine_of(unknown) is None
    assert "logits differ by inf" in caplog.text


def test_whatever_a_model_does_in_the_trial_is_a_reason_but_that_memory_ran_out(unknown, monkeypatch, caplog):
    def no_memory(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RunningBatch, "logits", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine_of(unknown)
    assert unknown not in engine_module._COMPATIBILITY

    def unexpected(self):
        raise KeyError("rotary")

    monkeypatch.setattr(RunningBatch, "logits", unexpected)
    with caplog.at_level(logging.INFO, logger="rankwise"):
        assert engine_of(unknown) is None
    assert "KeyError: 'rotary'" in caplog.text


def test_slots_hold_each_row_s_keys_after_any_order_of_leaving(base):
    rows = [DecodingRow(index=at, prompt=[5 + at, 9, 11 + at, 7][: at + 2], adapter=None) for at in range(3)]
    engine = engine_of(base.model)
    running = RunningBatch(engine, slots=3, adapters=())
    running.admit(rows)
    for row, logits in zip(list(running.rows), running.logits(), strict=True):
        row.generated.append(int(logits.argmax()))
    running.remove([0, 1])
    assert running.rows == [rows[2]]
    with torch.no_grad(), engine.running(()):
        own = base.model(torch.tensor([[*rows[2].prompt, *rows[2].generated]]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(running.logits()[0], own)
