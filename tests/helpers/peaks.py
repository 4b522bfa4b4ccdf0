"""The peak of torch's allocations in one step of a pack, on a CPU."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile

from rankwise.compat.transformers import attention_by_rows
from rankwise.modeling.lora.lean import keep_dequantized, lean_8_bit_layers, lean_feed_forwards
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import delete_adapter, install
from rankwise.training.arm import TrainingArm, join_arms, part_arms
from rankwise.training.budget import typical_pass_tokens
from rankwise.training.loop import training_mode
from rankwise.training.step import PeakMemory, Stepper


def peak_of_step(base, tasks) -> int:
    """Bytes above what is there before a step whose gradients exist already."""
    checkpointing = tasks[0].spec.training.gradient_checkpointing
    with (
        training_mode(base.model, gradient_checkpointing=checkpointing),
        keep_dequantized(base.model, tokens=typical_pass_tokens(tasks, None)),
        lean_8_bit_layers(base.model),
        lean_feed_forwards(base.model),
        attention_by_rows(lambda: install(base.model).spans),
    ):
        arms = [TrainingArm(task, base.model) for task in tasks]
        try:
            optimizer = join_arms(base.model, arms, base.compute_dtype)
            logits = SupervisedLogits(base.model)
            stepper = Stepper(base.model, install(base.model), optimizer, logits, 3, PeakMemory(base.device))
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                stepper._gradients(arms)
        finally:
            for arm in arms:
                delete_adapter(base.model, arm.name)
            part_arms(base.model)
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
