"""The plan of an experiment: its arms, their hashes, steps and tokens, without loading or downloading anything."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rankwise.exceptions import ConfigError
from rankwise.experiment.answer_plan import AnswerPlan, answer_plan, with_seeds
from rankwise.experiment.arm import ArmSpec, param_name
from rankwise.experiment.experiment import Experiment, Labelled
from rankwise.experiment.halving import Budget, PlannedRung, budget
from rankwise.experiment.mixture import epoch_rows, evaluation_rows
from rankwise.experiment.schema import DataSource, EarlyStoppingSpec, EvalSplit
from rankwise.experiment.source import LocalSource, parse_source

# Above this size, counting rows would take longer than a second.
MAX_COUNTED_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class PlannedArm:
    """One arm of a plan.

    Attributes:
        steps: Optimizer steps; None if they depend on an unknown number of rows.
        tokens: Upper bound of trained tokens including padding, with every row as long as `max_length`.
        estimates: Sizes of adapter, base and memory, in parameters and bytes; empty without the base's configuration.
    """

    label: str
    arm: ArmSpec
    steps: int | None
    tokens: int | None
    estimates: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The arm in `plan --json`."""
        return {
            "spec_hash": self.arm.spec_hash,
            "provisional": self.arm.provisional,
            "label": self.label,
            "params": self.arm.params,
            "estimates": {**self.estimates, "steps": self.steps, "tokens": self.tokens},
        }


@dataclass(frozen=True, kw_only=True)
class PlannedStopping:
    """The planned early stopping; `budget` is None if steps depend on an unknown number of rows."""

    metric: str
    eta: int
    finalists: int
    budget: Budget | None

    def to_json(self) -> dict[str, Any]:
        """The early stopping in `plan --json`."""
        rungs = [] if self.budget is None else [asdict(rung) for rung in self.budget.rungs]
        expected, upper = (None, None) if self.budget is None else (self.budget.expected, self.budget.upper)
        steps = {"expected": expected, "upper": upper}
        return {
            "metric": self.metric,
            "eta": self.eta,
            "finalists": self.finalists,
            "rungs": rungs,
            "steps": steps,
        }


@dataclass(frozen=True, kw_only=True)
class PlannedSeeds:
    """A stage of seeds on demand.

    Attributes:
        name: `pilot`; `first` look; or `most`, the last look, which follows if the first leaves a rank undecided.
        seeds: The seeds that this stage adds.
        arms: The number of arms that it adds.
        steps: Their optimizer steps, together and at most; None if they depend on an unknown number of rows.
    """

    name: str
    seeds: tuple[int, ...]
    arms: int
    steps: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of an experiment, given by name.

    `arms` are those known now: in a search with rounds, those of the first; with seeds on demand, those of the first of
    its `stages`. `rounds` holds the number of arms of each round; empty for a grid or list.
    """

    experiment: str
    arms: tuple[PlannedArm, ...]
    method: str = "grid"
    rounds: tuple[int, ...] = ()
    stopping: PlannedStopping | None = None
    stages: tuple[PlannedSeeds, ...] = ()

    @property
    def trials(self) -> int:
        """Number of all arms, including those of later rounds."""
        return sum(self.rounds) or len(self.arms)

    @property
    def provisional(self) -> bool:
        """Whether a spec hash can still change because a source is not pinned."""
        return any(planned.arm.provisional for planned in self.arms)

    def with_estimates(self, estimates: Mapping[str, Mapping[str, Any]]) -> Plan:
        """A copy with the estimates, given by spec hash."""
        arms = (replace(arm, estimates=dict(estimates.get(arm.arm.spec_hash, {}))) for arm in self.arms)
        return replace(self, arms=tuple(arms))

    def to_json(self) -> dict[str, Any]:
        """The document of `plan --json`."""
        data: dict[str, Any] = {
            "experiment": self.experiment,
            "provisional": self.provisional,
            "arms": [arm.to_json() for arm in self.arms],
        }
        if self.rounds:
            data["search"] = {"method": self.method, "trials": self.trials, "rounds": list(self.rounds)}
        if self.stopping is not None:
            data["early_stopping"] = self.stopping.to_json()
        if self.stages:
            data["seeds"] = [asdict(stage) for stage in self.stages]
        return data


def make_plan(experiment: Experiment, rows: int | None = None) -> Plan:
    """Plan an experiment. `rows` is the number of rows of `dataset.train` before a split, if known.

    The rows of sources that are in a list, or in a sweep, are counted here.

    Raises:
        ConfigError: The evaluation split leaves no rows for training.
    """
    spec = experiment.spec
    known: dict[str | tuple[DataSource, ...], tuple[int, ...] | None] = {}
    if isinstance(spec.dataset.train, str):
        known[spec.dataset.train] = None if rows is None else (rows,)
    answer = answer_plan(experiment)
    labelled = experiment.labelled_arms
    if answer is not None and not answer.fixed:
        labelled = with_seeds(labelled, answer.pilot or answer.looks[0])
    arms = tuple(_plan_arm(label, arm, _counts(arm, known)) for label, arm in labelled)
    rounds = experiment.planned_rounds
    stopping = spec.sweep.early_stopping
    return Plan(
        experiment=spec.name,
        arms=arms,
        method=spec.sweep.method,
        rounds=rounds,
        stopping=None if stopping is None else _plan_stopping(stopping, arms, rounds or (len(arms),)),
        stages=() if answer is None or answer.fixed else _plan_seeds(answer, experiment.labelled_arms, arms),
    )


def _plan_seeds(
    answer: AnswerPlan, labelled: tuple[Labelled, ...], arms: tuple[PlannedArm, ...]
) -> tuple[PlannedSeeds, ...]:
    """Plan the stages; of arms that differ in tuned fields only, one is trained with fresh seeds."""
    tuned = {param_name(path) for path in answer.tune}
    settings = [tuple(item for item in arm.params.items() if item[0] not in tuned) for _, arm in labelled]
    compared = len(dict.fromkeys(settings))
    steps = [arm.steps for arm in arms]
    longest = None if None in steps else max(count for count in steps if count is not None)
    first, *later = answer.looks
    stages = [("pilot", answer.pilot, len(labelled)), ("first", first, compared)]
    stages += [("most", tuple(seed for seed in look if seed not in first), compared) for look in later]
    return tuple(
        PlannedSeeds(
            name=name,
            seeds=seeds,
            arms=configurations * len(seeds),
            steps=None if longest is None else configurations * len(seeds) * longest,
        )
        for name, seeds, configurations in stages
        if seeds
    )


def _plan_stopping(
    stopping: EarlyStoppingSpec, arms: tuple[PlannedArm, ...], rounds: tuple[int, ...]
) -> PlannedStopping:
    """Plan the rungs of each round; arms of later rounds are assumed to be as long as the known ones."""
    totals = [arm.steps for arm in arms if arm.steps is not None]
    if len(totals) < len(arms):
        return PlannedStopping(metric=stopping.metric, eta=stopping.eta, finalists=stopping.finalists, budget=None)
    seeds: dict[str, list[int]] = {}
    for arm, total in zip(arms, totals, strict=True):
        seeds.setdefault(arm.arm.configuration, []).append(total)
    known = list(seeds.values())
    parts = [
        budget(stopping, known if size == len(arms) else [known[index % len(known)] for index in range(size)])
        for size in rounds
    ]
    rungs = tuple(
        PlannedRung(
            step=rung.step,
            arms=sum(part.rungs[index].arms for part in parts if index < len(part.rungs)),
            kept=sum(part.rungs[index].kept for part in parts if index < len(part.rungs)),
        )
        for index, rung in enumerate(max(parts, key=lambda part: len(part.rungs)).rungs)
    )
    expected, upper = sum(part.expected for part in parts), sum(part.upper for part in parts)
    whole = Budget(rungs=rungs, expected=expected, upper=upper)
    return PlannedStopping(metric=stopping.metric, eta=stopping.eta, finalists=stopping.finalists, budget=whole)


def _counts(arm: ArmSpec, known: dict[str | tuple[DataSource, ...], tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """The rows of each source of an arm, None if one is unknown; `known` keeps them."""
    train = arm.dataset.train
    if train not in known:
        counts = [count_rows(source.source) for source in arm.dataset.train_sources]
        whole = tuple(count for count in counts if count is not None)
        known[train] = whole if len(whole) == len(counts) else None
    return known[train]


def _plan_arm(label: str, arm: ArmSpec, rows: tuple[int, ...] | None) -> PlannedArm:
    training = arm.training
    left = training_rows(arm, rows)
    steps = training.max_steps if left is None else arm.optimizer_steps(left)
    if steps is None:
        return PlannedArm(label=label, arm=arm, steps=None, tokens=None)
    batch = training.per_device_train_batch_size if left is None else min(training.per_device_train_batch_size, left)
    tokens = steps * batch * training.gradient_accumulation_steps * training.max_length
    return PlannedArm(label=label, arm=arm, steps=steps, tokens=tokens)


def training_rows(arm: ArmSpec, rows: tuple[int, ...] | None) -> int | None:
    """Upper bound of training rows out of `rows` in each source; None if that is unknown.

    Raises:
        ConfigError: The evaluation split leaves no rows, or a source gives none.
    """
    data = arm.dataset
    if rows is None:
        return None
    left = list(rows)
    if isinstance(data.eval, EvalSplit):
        if data.eval.rows >= sum(rows):
            raise ConfigError(
                f"dataset.eval.rows: must be less than the {sum(rows):,} rows of {data.train_text}, got "
                f"{data.eval.rows:,}"
            )
        left = [have - held for have, held in zip(rows, evaluation_rows(rows, data.eval.rows), strict=True)]
    whole = sum(left)
    if not isinstance(data.train, str):
        whole = sum(epoch_rows(data.train, left, data.limit.train))
    return min(whole, data.limit.train or whole)


def count_rows(source: str) -> int | None:
    """Count the rows of a local JSONL, CSV or TSV file of up to 64 MiB; None for anything else.

    Raises:
        ConfigError: The file cannot be read.
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
        # A quoted cell may hold line breaks, so lines are not rows, and may exceed the csv module's limit of 128 KiB.
        csv.field_size_limit(MAX_COUNTED_BYTES)
        rows = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
        return max(0, sum(1 for row in rows if row) - 1)
