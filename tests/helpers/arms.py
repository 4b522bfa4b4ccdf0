"""A small experiment definition and its arms, for tests that need real specs."""

from __future__ import annotations

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import ExperimentSpec


def small_experiment(**changes: object) -> ExperimentSpec:
    """A valid definition; `changes` replace its top-level sections."""
    return ExperimentSpec.model_validate(
        {
            "version": 1,
            "name": "diamonds",
            "description": "Which rank?",
            "base_model": "org/base",
            "base_model_revision": "a" * 40,
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            "dataset": {"train": "data.jsonl", "prompt": "{a}", "completion": "{b}"},
            "training": {"max_steps": 10},
            **changes,
        }
    )


def small_arms(ranks: tuple[int, ...] = (2, 4)) -> list[ArmSpec]:
    """One arm a rank."""
    return [
        ArmSpec.of(small_experiment(lora={"r": r, "lora_alpha": 2 * r, "target_modules": ["q_proj", "v_proj"]}))
        for r in ranks
    ]
