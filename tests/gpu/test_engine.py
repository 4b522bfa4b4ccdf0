"""The engine on a GPU: masks, dtypes, 8-bit moments, and running out of memory for real."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from helpers.packs import Recorder, distance, make_arm, make_rows, planned, read_weights

from rankwise.modeling.lora.draws import DropoutKey, keep_mask
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack

pytestmark = pytest.mark.gpu

ROWS = make_rows(40, shortest=6, longest=20)
LONG_ROWS = make_rows(32, shortest=200, longest=256)
STEPS = 10


def arm(seed, dtype="float32", lora=None, quantization=None, **training):
    return make_arm(
        seed=seed,
        quantization={"bnb_4bit_compute_dtype": dtype, **(quantization or {})},
        lora={"r": 4 + 2 * seed, "lora_dropout": 0.2, "target_modules": "all-linear", **(lora or {})},
        training={"max_steps": STEPS, "learning_rate": 2e-3, **training},
    )


def train(base, arms, directory, rows=ROWS, **options):
    recorder = Recorder()
    outcomes = train_pack(
        base, [ArmTask(spec=each, train=rows) for each in arms], directory=directory, observer=recorder, **options
    )
    weights = {each.seed: read_weights(outcomes[each.spec_hash].adapter) for each in arms}
    return {each.seed: recorder.losses(each.spec_hash) for each in arms}, weights


def test_a_mask_depends_on_its_key_alone(device):
    key = DropoutKey(seed=3, step=7, micro_step=1)
    first = keep_mask((2, 9, 64), 0.3, key, "model.layers.0.q_proj", device)
    torch.rand(1000, device=device)
    keep_mask((4, 30, 64), 0.3, DropoutKey(seed=4, step=7, micro_step=1), "model.layers.0.q_proj", device)
    assert torch.equal(first, keep_mask((2, 9, 64), 0.3, key, "model.layers.0.q_proj", device))
    assert first.device.type == device
    other = keep_mask((2, 9, 64), 0.3, key, "model.layers.1.q_proj", device)
    assert not torch.equal(first, other)
    assert 0.6 < float(first.float().mean()) < 0.8


def test_drawing_a_mask_leaves_the_global_generator_alone(device):
    torch.manual_seed(1)
    expected = torch.rand(4, device=device)
    torch.manual_seed(1)
    keep_mask((2, 9, 64), 0.3, DropoutKey(seed=3, step=7, micro_step=1), "module", device)
    assert torch.equal(expected, torch.rand(4, device=device))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_arms_get_in_a_pack_what_they_get_alone(load, tmp_path, checkpointing):
    """Masks are drawn anew in the backward pass on a GPU, and a third time with checkpointing."""
    base = load()
    arms = [arm(seed, per_device_train_batch_size=1 + seed) for seed in (1, 2, 3)]
    checkpointed = [
        each.model_copy(update={"training": each.training.model_copy(update={"gradient_checkpointing": checkpointing})})
        for each in arms
    ]
    losses, weights = train(base, checkpointed, tmp_path / "packed")
    for each in arms:
        alone, own = train(base, [each], tmp_path / f"alone-{each.seed}")
        assert losses[each.seed] == pytest.approx(alone[each.seed], rel=1e-4)
        assert distance(weights[each.seed], own[each.seed]) < 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 3e-2), ("float16", 1e-2)])
def test_half_precision_learns_what_fp32_learns(load, device, tmp_path, dtype, tolerance):
    if device == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bf16")
    expected, _ = train(load(), [arm(1)], tmp_path / "full")
    base = load(dtype)
    assert base.compute_dtype is getattr(torch, dtype)
    half = arm(1, dtype)
    losses, weights = train(base, [half], tmp_path / "half")
    assert losses[1] == pytest.approx(expected[1], rel=tolerance)
    assert losses[1][-1] < losses[1][0]
    # Adapters and their optimizers stay in fp32, whatever the products are computed in.
    assert all(each.dtype is torch.float32 for each in weights[1].values())


def test_an_8_bit_base_is_trained_and_time_is_shared(load, tmp_path):
    eight_bit = {"load_in_4bit": False, "load_in_8bit": True}
    recorder = Recorder()
    arms = [arm(seed, lora={"r": 8}, quantization=eight_bit, per_device_train_batch_size=8) for seed in (1, 2)]
    tasks = [ArmTask(spec=each, train=LONG_ROWS) for each in arms]
    train_pack(load(**eight_bit), tasks, directory=tmp_path, observer=recorder)
    for each in arms:
        losses = recorder.losses(each.spec_hash)
        assert sum(losses[-3:]) < sum(losses[:3])
    first, second = (sum(record.seconds for record in recorder.steps[each.spec_hash][2:]) for each in arms)
    assert 0.7 < first / second < 1.4


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_adamw_with_8_bit_moments_learns_and_resumes(load, gpu, tmp_path, optim):
    base = load()
    wide = {"r": 64, "lora_alpha": 64}  # 131,072 numbers: moments are paged from 100,000 on
    full, eight = arm(1, lora=wide), arm(1, lora=wide, optim=optim, save_steps=2)
    expected, _ = train(base, [full], tmp_path / "full")
    losses, weights = train(base, [eight], tmp_path / "eight")
    assert losses[1] == pytest.approx(expected[1], rel=5e-2)
    # Stopped in the middle and gone on with: the moments come back as they were.
    recorder, steps = Recorder(), iter(range(100))
    tasks = [ArmTask(spec=eight, train=ROWS)]
    train_pack(base, tasks, directory=tmp_path / "cut", observer=recorder, should_stop=lambda: next(steps) == 5)
    outcome = train_pack(base, tasks, directory=tmp_path / "cut", observer=recorder)[eight.spec_hash]
    assert recorder.losses(eight.spec_hash) == pytest.approx(losses[1], rel=1e-4)
    assert distance(read_weights(outcome.adapter), weights[1]) < 1e-3


@pytest.fixture
def limited(gpu):
    """Limits this process to so many bytes of the GPU while a test runs."""

    def limit(size):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def peak_of(base, arms, directory, parts):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with planned(parts=parts):
        result = train(base, arms, directory, LONG_ROWS)
    return torch.cuda.max_memory_reserved(), result


def test_a_pack_that_runs_out_of_memory_is_split_and_gives_the_same(load, limited, tmp_path, caplog):
    base = load()
    arms = [arm(seed, per_device_train_batch_size=4, max_steps=4) for seed in range(1, 9)]
    quarter, _ = peak_of(base, arms, tmp_path / "quarter", parts=4)
    whole, (losses, weights) = peak_of(base, arms, tmp_path / "whole", parts=1)
    assert whole > 1.5 * quarter, "the passes are too small for a limit between the two"
    gc.collect()
    limited((whole + quarter) // 2)
    with caplog.at_level(logging.WARNING, logger="rankwise"), planned(parts=1):
        split, adapters = train(base, arms, tmp_path / "limited", LONG_ROWS)
    assert "out of memory" in caplog.text
    for each in arms:
        assert split[each.seed] == pytest.approx(losses[each.seed], rel=1e-4)
        assert distance(adapters[each.seed], weights[each.seed]) < 1e-3


def test_the_estimate_of_memory_is_near_the_measured_peak(load, gpu, tmp_path):
    from rankwise.training.budget import plan_pack

    base = load("bfloat16")
    arms = [arm(seed, "bfloat16", per_device_train_batch_size=4, max_steps=2) for seed in range(1, 9)]
    plan = plan_pack(base, [ArmTask(spec=each, train=LONG_ROWS) for each in arms])
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with planned(parts=plan.passes.parts):
        train(base, arms, tmp_path, LONG_ROWS)
    measured = torch.cuda.max_memory_allocated() - before
    estimated = plan.estimate.states + plan.estimate.activations + plan.estimate.logits
    assert 0.5 * measured < estimated < 2.0 * measured
