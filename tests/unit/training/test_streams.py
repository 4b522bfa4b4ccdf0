"""Rows that share sequences: how they are put there, when that pays, and that it changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.packs import distance, load_tiny, make_arm, make_rows, read_weights, train

from rankwise.modeling.lora.draws import DropoutKey, token_words
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.training import step
from rankwise.training.streams import StreamCost, Streams, choose, lay_out, single, spread

COST = StreamCost(linear=1e6, pair=1e3, masked=2.0, causal=0.8)


def test_rows_are_spread_evenly_and_each_is_there_once():
    streams = spread([400, 150, 100, 50, 60], 2)
    assert streams == Streams(rows=((0,), (1, 2, 3, 4)), length=400)
    assert spread([10, 20, 30], 1) == Streams(rows=((0, 1, 2),), length=60)
    assert spread([10, 20], 2) == spread([10, 20], 5) == single([10, 20]) == Streams(rows=((0,), (1,)), length=20)
    assert not single([3, 4]).shared


def test_the_number_of_streams_follows_from_the_cost():
    uneven, even = [400, 150, 100, 50], [100, 100, 100, 100]
    assert len(choose([uneven], COST)[0].rows) == 2
    assert choose([even], COST) == [single(even)], "no padding, no mask"
    # Where attention costs nothing, or is not masked, one stream has no padding at all.
    assert len(choose([uneven], replace(COST, masked=0.0))[0].rows) == 1
    # Where it costs much, rows stay apart.
    assert choose([[30, 300]], replace(COST, pair=1e6)) == [single([30, 300])]


def test_arms_of_one_pass_get_as_many_streams():
    chosen = choose([[400, 150, 100, 50], [60, 60, 300, 90]], COST)
    assert len({len(each.rows) for each in chosen}) == 1


def test_the_cost_of_a_model_counts_its_products(base):
    cost = StreamCost.of(base.model, torch.device("cpu"), torch.float32)
    # Two layers of 64 with four heads, two for keys and values, and a feed-forward of 128.
    assert cost.pair == 2 * 64 * 2
    assert cost.linear == 2 * sum(
        inputs * outputs
        for inputs, outputs in ((64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64))
    )
    assert cost.masked > cost.causal


def test_tokens_of_a_row_keep_positions_targets_and_dropout_words():
    rows = make_rows(4, seed=3, shortest=3, longest=9)
    lengths = [len(row.input_ids) for row in rows]
    other = make_rows(1, seed=4, shortest=8, longest=8)
    words = token_words(DropoutKey(seed=1, step=2, micro_step=3), 4, max(lengths))
    batch = lay_out([(rows, spread(lengths, 2)), (other, single([8]))], [words, None], pad_token_id=7)
    assert batch.shared
    assert batch.input_ids.shape == batch.words.shape == (3, max(spread(lengths, 2).length, 8))
    found = []
    for number, stream in enumerate(spread(lengths, 2).rows):
        start = 0
        for sequence, index in enumerate(stream):
            place = (number, slice(start, start + lengths[index]))
            assert batch.input_ids[place].tolist() == rows[index].input_ids.tolist()
            assert batch.position_ids[place].tolist() == list(range(lengths[index]))
            assert set(batch.sequences[place].tolist()) == {sequence}
            assert batch.words[place].tolist() == words[index, : lengths[index]].tolist()
            found += [(number, start + int(at) - 1, index) for at in rows[index].supervised.nonzero()[0]]
            start += lengths[index]
        assert batch.attention_mask[number].sum() == start
        own = [lengths[index] for index in stream]
        assert batch.spans[number] == own + (
            [batch.input_ids.shape[1] - start] if start < batch.input_ids.shape[1] else []
        )
        assert (batch.input_ids[number, start:] == 7).all()
        assert set(batch.sequences[number, start:].tolist()) <= {len(stream)}
    count = batch.counts[0]
    assert list(zip(batch.rows.tolist(), batch.positions.tolist(), batch.places.tolist(), strict=True))[:count] == found
    assert batch.targets.tolist() == batch.input_ids[batch.rows, batch.positions + 1].tolist()
    assert batch.counts[1] == other[0].supervised.sum()
    assert not batch.words[2].any()


def train_both_ways(base, arms, directory, monkeypatch, rows, by_rows):
    """With rows of their own, and in one stream for each micro-batch."""
    results, shared = [], []
    own = step.lay_out
    monkeypatch.setattr(
        step, "lay_out", lambda arms, *rest: (shared.append(all(s.shared for _, s in arms)), own(arms, *rest))[1]
    )
    for packs in (False, True):
        monkeypatch.setattr(SupervisedLogits, "packs", packs)
        monkeypatch.setattr(step, "attends_by_rows", lambda model, device: by_rows)
        monkeypatch.setattr(step, "choose", lambda lengths, cost: [spread(each, 1) for each in lengths])
        results.append(train(base, arms, directory / str(packs), rows))
    assert set(shared) == {False, True}
    return results


ROWS = make_rows(24, shortest=4, longest=40)


BY_ROWS = pytest.mark.parametrize("by_rows", [True, False], ids=["attention by rows", "masked attention"])


@BY_ROWS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_that_share_a_sequence_train_like_rows_alone(base, tmp_path, monkeypatch, checkpointing, by_rows):
    arms = [
        make_arm(
            seed=seed,
            lora={"lora_dropout": 0.2 * seed, "target_modules": "all-linear"},
            training={
                "per_device_train_batch_size": 3 + seed,
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": checkpointing,
                "max_steps": 4,
            },
        )
        for seed in (0, 1, 2)
    ]
    (padded, first), (packed, second) = train_both_ways(base, arms, tmp_path, monkeypatch, ROWS, by_rows)
    for arm in arms:
        assert second.losses(arm.spec_hash) == pytest.approx(first.losses(arm.spec_hash), rel=1e-5)
        mine, theirs = (read_weights(each[arm.spec_hash].adapter) for each in (packed, padded))
        assert distance(mine, theirs) < 1e-4
        assert [r.tokens for r in first.steps[arm.spec_hash]] == [r.tokens for r in second.steps[arm.spec_hash]]


def test_a_row_whose_loss_is_not_finite_is_named_wherever_it_is(base, tmp_path, monkeypatch):
    embedding = base.model.get_input_embeddings().weight
    kept = embedding[310].clone()
    monkeypatch.setattr(step, "attends_by_rows", lambda model, device: False)
    monkeypatch.setattr(step, "choose", lambda lengths, cost: [spread(each, 1) for each in lengths])
    rows = [replace_token(row) if row.id == "row-5" else row for row in ROWS[:8]]
    arm = make_arm(training={"per_device_train_batch_size": 8, "max_steps": 2})
    embedding.data[310] = torch.inf
    try:
        outcomes, _ = train(base, [arm], tmp_path, rows)
    finally:
        embedding.data[310] = kept
    assert outcomes[arm.spec_hash].example_ids == ("row-5",)


def replace_token(row):
    tokens = row.input_ids.copy()
    tokens[0] = 310
    return replace(row, input_ids=tokens)


@BY_ROWS
@pytest.mark.parametrize("architecture", ["qwen2", "gpt_neox"])
def test_other_architectures_train_alike_or_keep_padding(tmp_path, monkeypatch, architecture, caplog, by_rows):
    base = load_tiny(tmp_path / "base", architecture)
    with caplog.at_level("INFO"):
        packs = SupervisedLogits(base.model).packs
    if architecture == "gpt_neox":
        assert not packs
        assert "rows are padded and do not share sequences: gpt_neox is not among the architectures" in caplog.text
        return
    arm = make_arm(lora={"target_modules": "all-linear"}, training={"per_device_train_batch_size": 4})
    (_, first), (_, second) = train_both_ways(base, [arm], tmp_path, monkeypatch, ROWS, by_rows)
    assert second.losses(arm.spec_hash) == pytest.approx(first.losses(arm.spec_hash), rel=1e-5)


def test_a_model_that_mixes_rows_keeps_padding(tmp_path, caplog):
    """What a listed architecture with an unlisted attention would do."""
    model = load_tiny(tmp_path).model
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, _own=own, **kwargs: _own(*args, **{**kwargs, "attention_mask": None})
    with caplog.at_level("INFO"):
        assert not SupervisedLogits(model).packs
    assert "rows are padded and do not share sequences: with a difference of up to" in caplog.text


def test_an_empty_choice_of_words_is_no_dropout():
    rows = make_rows(1)
    batch = lay_out([(rows, single([len(rows[0].input_ids)]))], [None], 0)
    assert not batch.shared
    assert not np.any(batch.words.numpy())
