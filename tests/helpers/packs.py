"""Arms, rows and a loaded tiny base for tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.tiny import make_base
from rankwise.assets.base import ResolvedBase
from rankwise.data.tokens import Encoded
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import ExperimentSpec
from rankwise.modeling.base import LoadedBase, load_base
from rankwise.settings import Settings
from rankwise.training.arm import ArmOutcome, ArmTask, PackObserver, StepRecord
from rankwise.training.budget import PackPlan, plan_pack
from rankwise.training.loop import train_pack


def load_tiny(
    tmp: Path, architecture: Any = "llama", quantization: dict[str, Any] | None = None, **sizes: int
) -> LoadedBase:
    """A tiny base in fp32, in NF4 with double quantization unless told otherwise."""
    path = make_base(tmp / f"base-{architecture}", architecture, **sizes)
    settings = Settings.load({"RANKWISE_HOME": str(tmp / "home"), "RANKWISE_CACHE": str(tmp / "cache")})
    spec = make_arm(quantization={"bnb_4bit_compute_dtype": "float32", **(quantization or {})})
    resolved = ResolvedBase(source="./base", revision="sha256:" + "0" * 64, path=path, pinned=True)
    return load_base(resolved, spec.quantization, settings, device="cpu")


def make_arm(
    *,
    seed: int = 0,
    lora: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    **other: Any,
) -> ArmSpec:
    """An arm with small numbers; sections are merged over defaults."""
    document = {
        "version": 1,
        "name": "test",
        "base_model": "./base",
        "base_model_revision": "sha256:" + "0" * 64,
        "dataset": {
            "train": "./rows.jsonl",
            "train_revision": "sha256:" + "1" * 64,
            "prompt": "{p}",
            "completion": "{c}",
        },
        "seed": seed,
        "quantization": {"bnb_4bit_compute_dtype": "float32", **(quantization or {})},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **(lora or {})},
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            **(training or {}),
        },
        "evaluation": evaluation or {},
        **other,
    }
    return ArmSpec.of(ExperimentSpec.model_validate(document))


def make_rows(
    count: int = 12, *, seed: int = 0, shortest: int = 5, longest: int = 14, vocabulary: int = 300
) -> list[Encoded]:
    """Rows of random tokens with one to four supervised tokens at the end."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(draw.integers(shortest, longest + 1))
        supervised = np.zeros(length, dtype=bool)
        supervised[-int(draw.integers(1, min(5, length))) :] = True
        tokens = draw.integers(4, vocabulary, size=length).astype(np.int32)
        rows.append(Encoded(id=f"row-{index}", input_ids=tokens, supervised=supervised))
    return rows


class Recorder(PackObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.started: dict[str, int] = {}
        self.steps: dict[str, list[StepRecord]] = {}
        self.evaluations: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.checkpoints: list[tuple[int, Path]] = []
        self.ended: list[ArmOutcome] = []

    def on_start(self, spec_hash, step, total_steps):
        self.started[spec_hash] = step

    def on_step(self, spec_hash, record):
        self.steps.setdefault(spec_hash, []).append(record)

    def on_evaluation(self, spec_hash, step, metrics):
        self.evaluations.setdefault(spec_hash, []).append((step, dict(metrics)))

    def on_checkpoint(self, step, directory):
        self.checkpoints.append((step, directory))

    def on_end(self, outcome):
        self.ended.append(outcome)

    def losses(self, spec_hash: str) -> list[float]:
        return [record.loss for record in self.steps[spec_hash]]


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT directory."""
    from safetensors.torch import load_file

    return load_file(directory / "adapter_model.safetensors")


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Relative Frobenius norm of the difference, over all matrices together."""
    assert first.keys() == second.keys()
    difference = sum(float((first[key] - second[key]).double().square().sum()) for key in first)
    size = sum(float(first[key].double().square().sum()) for key in first)
    return (difference / size) ** 0.5


ROWS = make_rows(12)


@contextmanager
def planned(**passes: int) -> Iterator[None]:
    """Let packs go through the base in passes of one's choice (`Passes`), whatever memory is free."""

    def plan(base: LoadedBase, tasks: Sequence[ArmTask], **found: bool) -> PackPlan:
        own = plan_pack(base, tasks, **found)
        return replace(own, passes=replace(own.passes, **passes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankwise.training.loop.plan_pack", plan)
        yield


def train(
    base: LoadedBase, arms: Sequence[ArmSpec], directory: Path, rows: Sequence[Encoded] = ROWS, **options: Any
) -> tuple[dict[str, ArmOutcome], Recorder]:
    """Train arms in one pack, evaluated on the first five rows: their outcomes, and what was recorded."""
    recorder = Recorder()
    tasks = [ArmTask(spec=arm, train=rows, evaluation=rows[:5]) for arm in arms]
    outcomes = train_pack(base, tasks, directory=directory, observer=recorder, **options)
    return outcomes, recorder
