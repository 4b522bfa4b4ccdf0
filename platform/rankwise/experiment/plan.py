"""What a definition will do: its arms, their hashes, steps and tokens. Nothing is loaded, and nothing fetched."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import EvalSplit, ExperimentSpec
from rankwise.experiment.source import LocalSource, parse_source
from rankwise.experiment.sweep import labelled_arms

# A plan answers at once; above this size, counting rows would take longer than a second.
MAX_COUNTED_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """One arm of a plan.

    Attributes:
        label: What sets it apart: `lora.r=8`.
        arm: The arm.
        steps: Optimizer steps; None while epochs are given and the number of rows is not known.
        tokens: Upper bound of trained tokens, padding included: every row as long as `max_length`.
        estimates: Of the adapter, the base and memory, in parameters and bytes; empty without the base's configuration.
    """

    label: str
    arm: ArmSpec
    steps: int | None
    tokens: int | None
    estimates: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The arm as `plan --json` gives it."""
        return {
            "spec_hash": self.arm.spec_hash,
            "provisional": self.arm.provisional,
            "label": self.label,
            "params": self.arm.params,
            "estimates": {**self.estimates, "steps": self.steps, "tokens": self.tokens},
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arms of an experiment."""

    experiment: str
    arms: tuple[PlannedArm, ...]

    @property
    def provisional(self) -> bool:
        """Whether a hash can still change, because a source is not pinned yet."""
        return any(planned.arm.provisional for planned in self.arms)

    def with_estimates(self, estimates: Mapping[str, Mapping[str, Any]]) -> Plan:
        """The same plan with estimates by spec hash."""
        arms = (replace(arm, estimates=dict(estimates.get(arm.arm.spec_hash, {}))) for arm in self.arms)
        return replace(self, arms=tuple(arms))

    def to_json(self) -> dict[str, Any]:
        """The plan as `plan --json` gives it."""
        return {
            "experiment": self.experiment,
            "provisional": self.provisional,
            "arms": [arm.to_json() for arm in self.arms],
        }


def make_plan(spec: ExperimentSpec, rows: int | None = None) -> Plan:
    """Plan a definition.

    Args:
        spec: The definition.
        rows: Rows of `dataset.train` before a split, where they are known (see `count_rows`).

    Raises:
        ConfigError: The evaluation split leaves no row for training.
    """
    return Plan(
        experiment=spec.name,
        arms=tuple(_plan_arm(label, arm, rows) for label, arm in labelled_arms(spec)),
    )


def _plan_arm(label: str, arm: ArmSpec, rows: int | None) -> PlannedArm:
    training = arm.training
    left = training_rows(arm, rows)
    steps = training.max_steps if left is None else training.optimizer_steps(left)
    if steps is None:
        return PlannedArm(label=label, arm=arm, steps=None, tokens=None)
    batch = training.per_device_train_batch_size if left is None else min(training.per_device_train_batch_size, left)
    tokens = steps * batch * training.gradient_accumulation_steps * training.max_length
    return PlannedArm(label=label, arm=arm, steps=steps, tokens=tokens)


def training_rows(arm: ArmSpec, rows: int | None) -> int | None:
    """Upper bound of the rows that are trained on, of `rows` in the source; None when that is not known.

    Raises:
        ConfigError: The evaluation split leaves none.
    """
    data = arm.dataset
    if rows is None:
        return None
    if isinstance(data.eval, EvalSplit):
        if data.eval.rows >= rows:
            raise ConfigError(
                f"dataset.eval.rows: must be less than the {rows:,} rows of {data.train}, got {data.eval.rows:,}"
            )
        rows -= data.eval.rows
    return min(rows, data.limit.train or rows)


def count_rows(source: str) -> int | None:
    """Rows of a local JSONL, CSV or TSV file that is small enough to count at once; None for anything else.

    Raises:
        ConfigError: The file cannot be read, or is no such table.
    """
    parsed = parse_source(source)
    if not isinstance(parsed, LocalSource):
        return None
    path = Path(os.path.expanduser(parsed.path))
    suffix = path.suffix.lower()
    if suffix not in {".jsonl", ".ndjson", ".csv", ".tsv"} or not path.is_file():
        return None
    if path.stat().st_size > MAX_COUNTED_BYTES:
        return None
    try:
        return _count_lines(path, suffix)
    except (OSError, csv.Error) as error:
        raise ConfigError(f"dataset.train: the rows of {path} cannot be counted: {error}") from error


def _count_lines(path: Path, suffix: str) -> int:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        if suffix in {".jsonl", ".ndjson"}:
            return sum(1 for line in file if line.strip())
        # A quoted cell may hold line breaks, so lines are not rows; and it may be longer than the module's 128 KiB.
        csv.field_size_limit(MAX_COUNTED_BYTES)
        rows = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
        return max(0, sum(1 for row in rows if row) - 1)
