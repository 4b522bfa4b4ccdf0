"""The arms of a definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.candidates import Candidate, Candidates
from rankwise.experiment.checker import Checked, check, read_sweep
from rankwise.experiment.document import Document
from rankwise.experiment.metric_names import greater_is_better
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.search import Told, TrialState

Labelled = tuple[str, ArmSpec]


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """How an arm of a search ended.

    Attributes:
        state: Whether it has a value, was pruned or failed, or says nothing.
        value: The primary metric of a complete one.
        step: The last rung of a pruned one.
        at_step: Its value there.
    """

    state: TrialState
    value: float | None = None
    step: int | None = None
    at_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a search.

    Attributes:
        number: Counted from 0.
        arms: Its arms, each with what sets it apart.
        values: What the search chose for each, by dotted field path.
        rejected: Points that were drawn in vain.
    """

    number: int
    arms: tuple[Labelled, ...]
    values: tuple[Mapping[str, Any], ...]
    rejected: int


def expand(spec: ExperimentSpec) -> tuple[ArmSpec, ...]:
    """The arms of a definition, in the order of its grid or list; of a search in rounds, those of its first round.

    Raises:
        ConfigError: The definition was not made by the loader, or a file it names is gone or changed.
    """
    return tuple(arm for _, arm in labelled_arms(spec))


def labelled_arms(spec: ExperimentSpec) -> tuple[Labelled, ...]:
    """The arms, each with what sets it apart: `lora.r=8, seed=0`; empty for the only arm of a definition without sweep.

    Of a search in rounds these are the arms of its first round: the others depend on results (see `rounds`).

    Raises:
        ConfigError: As `expand`.
    """
    _, checked = _check(spec)
    return tuple((point.label, arm) for point, arm in zip(checked.points, checked.arms, strict=True))


def is_search(spec: ExperimentSpec) -> bool:
    """Whether arms depend on results, so that they cannot all be known before the first has ended."""
    return spec.sweep.method == "tpe"


def require_known_arms(spec: ExperimentSpec) -> None:
    """Refuse a definition whose arms depend on results.

    Raises:
        ConfigError: It is such a one.
    """
    if is_search(spec):
        raise ConfigError(
            f"sweep.method: tpe proposes the arms of {spec.name!r} round by round from results, so they cannot be "
            "submitted at once; `rankwise run FILE` drives the search (workers help it), or take method: random"
        )


def planned_rounds(spec: ExperimentSpec) -> tuple[int, ...]:
    """How many arms each round of a search is to have: one number for random, () where nothing is drawn."""
    space = read_sweep(Document(filename=spec.name, data=spec.document())).space
    return () if space is None else space.rounds


Results = Callable[[Sequence[ArmSpec]], Mapping[str, ArmResult]]
"""Given arms, what is known of them, by spec hash; an arm that has not ended is left out."""


def rounds(spec: ExperimentSpec, results_of: Results) -> tuple[Round, ...]:
    """The rounds of a search as far as results go: those that have ended, and the next one.

    They follow from the definition and the results alone: whoever knows the same results gets the same rounds.

    Args:
        spec: The definition.
        results_of: Asked for the arms of one round after the other. A round has ended when all of its arms have.

    Raises:
        ConfigError: As `expand`.
    """
    document, _ = _check(spec)
    sweep = read_sweep(document)
    assert sweep.space is not None, "not a search"
    candidates = Candidates(document.data, sweep.where, elsewhere=document.elsewhere)
    greater = greater_is_better(spec.evaluation.primary_metric)
    found: list[Round] = []
    told: list[Told] = []
    taken: set[str] = set()
    for number in range(len(sweep.space.rounds)):
        asked, rejected = candidates.of_round(sweep.space, number, told, taken=taken, greater=greater)
        if not asked:
            break
        values = tuple(candidate.point.values for candidate in asked)
        found.append(Round(number=number, arms=tuple(map(_labelled, asked)), values=values, rejected=rejected))
        arms = [arm for _, arm in found[-1].arms]
        hashes = [arm.spec_hash for arm in arms]
        results = results_of(arms)
        if not all(spec_hash in results for spec_hash in hashes):
            break
        taken.update(hashes)
        told += [
            Told(
                point=candidate.point,
                state=results[spec_hash].state,
                value=results[spec_hash].value,
                step=results[spec_hash].step,
                at_step=results[spec_hash].at_step,
            )
            for candidate, spec_hash in zip(asked, hashes, strict=True)
        ]
    return tuple(found)


def _check(spec: ExperimentSpec) -> tuple[Document, Checked]:
    document = Document(filename=spec.name, data=spec.document(), elsewhere=spec._elsewhere)
    checked = check(document)
    if checked.problems:
        raise document.error(checked.problems)
    return document, checked


def _labelled(candidate: Candidate) -> Labelled:
    assert candidate.arm is not None  # a rule of `of_round`: only in the first round, which has been checked
    return candidate.point.label, candidate.arm
