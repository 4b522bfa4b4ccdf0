"""Which arms fit, in how many passes, and that the estimate is what a step takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.packs import load_tiny, make_arm, make_rows
from helpers.peaks import peak_of_step

from rankwise.exceptions import ConfigError
from rankwise.training.arm import ArmTask
from rankwise.training.budget import CPU_TOKENS, plan_pack, typical_pass_tokens
from rankwise.training.loop import train_pack

ROWS = make_rows(12)


def tasks(*arms, rows=ROWS):
    return [ArmTask(spec=arm, train=rows) for arm in arms]


def some(count, **settings):
    return tasks(*(make_arm(seed=seed, **settings) for seed in range(count)))


def test_with_memory_to_spare_all_arms_go_in_one_pass(base):
    plan = plan_pack(base, some(3))
    assert (len(plan.fits), plan.left, plan.passes.parts) == (3, (), 1)
    assert plan.passes.max_tokens == CPU_TOKENS
    assert plan.estimate.free > plan.estimate.total


def test_the_estimate_is_told_with_its_parts(base):
    plan = plan_pack(base, some(3), free_bytes=3 << 30)
    estimate = plan.estimate
    parts = estimate.process + estimate.base + estimate.states + estimate.activations + estimate.logits
    assert estimate.total == parts
    assert estimate.base > base.memory_bytes
    # Rank 4 on q (64 -> 64) and v (64 -> 32) of two layers; weight, gradient and two moments in fp32.
    assert estimate.states == 3 * 16 * 2 * 4 * (64 + 64 + 64 + 32)
    longest = max(len(row.input_ids) for row in ROWS)
    assert estimate.tokens == 3 * 2 * longest
    fixed = replace(estimate, process=1 << 30, base=5 << 30, states=70 << 20, activations=2 << 30, logits=9 << 20)
    assert fixed.text() == (
        "memory 8.08 GiB: process 1.00 GiB, base 5.00 GiB, 3 arms 70 MiB, activations 2.00 GiB (1 pass of up to 78 "
        "tokens), logits 9 MiB, 3.00 GiB free besides the base"
    )
    assert replace(fixed, process=0).text().startswith("memory 7.08 GiB: base 5.00 GiB, 3 arms")


def test_little_memory_means_more_passes_before_it_means_fewer_arms(base):
    whole = plan_pack(base, some(8), free_bytes=1 << 30).estimate
    half = plan_pack(base, some(8), free_bytes=whole.states + (whole.activations + whole.logits) * 6 // 10)
    assert (len(half.fits), half.passes.parts, half.estimate.passes) == (8, 2, 2)
    least = plan_pack(base, some(8), free_bytes=whole.states + (whole.activations + whole.logits) // 8)
    assert (len(least.fits), least.passes.parts) == (8, 8)


def test_arms_whose_states_do_not_fit_are_left_in_their_order(base):
    given = some(8)
    whole = plan_pack(base, given, free_bytes=1 << 30).estimate
    plan = plan_pack(base, given, free_bytes=whole.states // 2 + (whole.activations + whole.logits) // 8)
    assert plan.fits == tuple(given[:4])
    assert plan.left == tuple(given[4:])


def test_a_single_arm_is_tried_whatever_the_estimate_says(base, caplog):
    plan = plan_pack(base, some(2), free_bytes=1)
    assert (len(plan.fits), len(plan.left)) == (1, 1)
    assert "not even one arm fits by estimate: memory" in caplog.text


def test_a_token_budget_makes_passes(base):
    longest = max(len(row.input_ids) for row in ROWS)
    plan = plan_pack(base, some(4), token_budget=2 * 2 * longest)
    assert (plan.passes.parts, plan.estimate.passes, plan.estimate.tokens) == (1, 2, 2 * 2 * longest)


def test_a_single_long_row_does_not_say_how_large_a_usual_pass_is():
    def rows(*lengths):
        return [make_rows(1, shortest=length, longest=length)[0] for length in lengths]

    short = rows(*[10] * 60)
    assert typical_pass_tokens(some(3), None) <= 3 * 2 * max(len(row.input_ids) for row in ROWS)
    assert typical_pass_tokens(tasks(make_arm(), rows=short), None) == 2 * 10
    assert typical_pass_tokens(tasks(make_arm(), rows=[*short, *rows(400)]), None) == 2 * 10
    # Of two rows that are drawn out of these, one is a long one more often than not.
    assert typical_pass_tokens(tasks(make_arm(), rows=[*short, *rows(*[400] * 30)]), None) == 2 * 400
    assert typical_pass_tokens(tasks(make_arm(), rows=rows(7)), None) == 7
    four = tasks(*(make_arm(seed=seed) for seed in range(4)), rows=short)
    assert typical_pass_tokens(four, None) == 8 * 10
    assert typical_pass_tokens(four, 40) == 40


def test_unknown_modules_and_no_arms_are_refused(base):
    with pytest.raises(ConfigError, match=r"no linear layer 'q_prj'; did you mean 'q_proj'"):
        plan_pack(base, tasks(make_arm(lora={"target_modules": ["q_prj"]})))
    with pytest.raises(ValueError, match="at least one arm"):
        plan_pack(base, [])


def test_training_in_the_passes_of_a_plan_says_what_it_will_take(base, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train_pack(base, some(2, training={"max_steps": 1}), directory=tmp_path)
    assert "2 arms" in caplog.text
    assert "activations" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("architecture", "bits"), [("llama", 4), ("gpt_neox", 4), ("llama", 8)])
def test_the_estimate_of_a_step_is_its_measured_peak(tmp_path, architecture, bits, checkpointing):
    """Against the peak of torch's allocations, told by its profiler. Tiny bases: logits and layers weigh alike."""
    torch.set_num_threads(1)
    quantization = {f"load_in_{each}bit": each == bits for each in (4, 8)}
    base = load_tiny(tmp_path, architecture, quantization, hidden_size=128, layers=4)
    rows = make_rows(12, shortest=60, longest=60)
    targets = "all-linear" if architecture == "gpt_neox" else ["q_proj", "v_proj", "down_proj"]
    arms = [
        make_arm(
            seed=seed,
            quantization=quantization,
            lora={"r": 4 + seed, "lora_dropout": 0.1 * seed, "target_modules": targets},
            training={"per_device_train_batch_size": 3, "gradient_checkpointing": checkpointing},
        )
        for seed in range(3)
    ]
    estimate = plan_pack(base, tasks(*arms, rows=rows)).estimate
    peak = peak_of_step(base, tasks(*arms, rows=rows))
    ratio = (estimate.activations + estimate.logits) / peak
    print(f"{architecture}, {bits} bit, checkpointing {checkpointing}: estimate / peak = {ratio:.2f}")
    assert 0.9 < ratio < 1.35


def test_a_base_that_changes_its_logits_needs_those_of_all_tokens_and_is_warned_of(base, caplog):
    usual = plan_pack(base, some(2)).estimate
    assert not caplog.records
    changing = plan_pack(base, some(2), direct=False, lean=False).estimate
    assert changing.logits > usual.logits
    assert changing.activations + changing.logits > usual.activations + usual.logits
    assert "changes logits after its head, so those of all 52 tokens of a pass are computed" in caplog.text
    assert "feed-forwards keep one more tensor a layer" in caplog.text


def test_what_was_found_of_the_model_is_what_training_plans_with(tmp_path, caplog):
    base = load_tiny(tmp_path)
    base.model.config.final_logit_softcapping = 30.0
    train_pack(base, some(1, training={"max_steps": 1}), directory=tmp_path / "out")
    assert "changes logits after its head" in caplog.text


def test_the_logits_of_many_tokens_take_the_memory_of_a_chunk(base):
    rows = [
        replace(row, supervised=np.arange(len(row.input_ids)) > 0) for row in make_rows(4, shortest=900, longest=900)
    ]
    plain = plan_pack(base, tasks(make_arm(training={"per_device_train_batch_size": 100}), rows=rows))
    assert plain.estimate.logits < 1.5 * (1 << 24) * 8
