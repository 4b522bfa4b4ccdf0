"""What the answer of a sweep will rest on, fixed before training: margin, confidence, tuned fields and seeds.

The sweep's run in MLflow records the plan, so that `compare` tests what was planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment, Labelled
from rankwise.experiment.schema import AnswerSeeds

PROPOSED_MARGIN = 0.02
"""For a loss, 2 % of perplexity; a start for metrics between 0 and 1, too."""


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """The plan of an answer.

    Attributes:
        margin: How much worse than the largest rank is still enough, in the unit of the primary metric.
        confidence: Of all statements together, in (0.5, 1).
        tune: Swept fields at whose own best value each rank is compared.
        pilot: Seeds that choose the values of `tune`, and take no part in the answer.
        looks: The seeds of each look at the results, cumulative; one or two.
        fixed: Whether the seeds are those of the definition, so that none are added.
    """

    margin: float
    confidence: float = 0.95
    tune: tuple[str, ...] = ()
    pilot: tuple[int, ...] = ()
    looks: tuple[tuple[int, ...], ...] = ((0,),)
    fixed: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that the answer may rest on."""
        return self.looks[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the sweep's run records it."""
        return {
            "margin": self.margin,
            "confidence": self.confidence,
            "tune": list(self.tune),
            "seeds": {"pilot": list(self.pilot), "looks": [list(look) for look in self.looks], "fixed": self.fixed},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AnswerPlan:
        """The inverse of `to_json`."""
        seeds = data["seeds"]
        return cls(
            margin=data["margin"],
            confidence=data["confidence"],
            tune=tuple(data["tune"]),
            pilot=tuple(seeds["pilot"]),
            looks=tuple(tuple(look) for look in seeds["looks"]),
            fixed=seeds["fixed"],
        )


def answer_plan(experiment: Experiment) -> AnswerPlan | None:
    """The plan of an experiment; None without an `answer` section.

    A seed axis is the set of seeds. Searches and early stopping add none, so without an axis they have one, and so does
    a sweep of a single rank, which has nothing to compare.
    """
    spec = experiment.spec
    answer = spec.answer
    if answer is None:
        return None
    looks: tuple[tuple[int, ...], ...]
    fixed = not experiment.adds_seeds
    if fixed:
        seeds = tuple(dict.fromkeys(arm.seed for arm in experiment.arms))
        pilots = min(answer.seeds.pilot, max(0, len(seeds) - 2)) if answer.tune else 0
        pilot, looks = seeds[:pilots], (seeds[pilots:],)
    else:
        pilot, looks = _planned_seeds(answer.seeds, spec.seed, tuned=bool(answer.tune))
    return AnswerPlan(
        margin=answer.margin,
        confidence=answer.confidence,
        tune=answer.tune,
        pilot=pilot,
        looks=looks,
        fixed=fixed,
    )


def _planned_seeds(
    seeds: AnswerSeeds, start: int, *, tuned: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The pilot seeds, and the seeds of each look."""
    first = start + (seeds.pilot if tuned else 0)
    sizes = sorted({seeds.first, seeds.most})
    return tuple(range(start, first)), tuple(tuple(range(first, first + size)) for size in sizes)


def with_seeds(arms: Iterable[Labelled], seeds: Iterable[int]) -> tuple[Labelled, ...]:
    """Arms with each of these seeds, labelled like those of a seed axis."""
    seeds = tuple(seeds)
    return tuple(
        (f"{label}, seed={seed}" if label else f"seed={seed}", arm.model_copy(update={"seed": seed}))
        for label, arm in arms
        for seed in seeds
    )


def all_seeds(experiment: Experiment) -> tuple[ArmSpec, ...]:
    """Every arm that seeds on demand may train; () where they are not."""
    plan = answer_plan(experiment)
    if plan is None or plan.fixed:
        return ()
    return tuple(arm for _, arm in with_seeds(experiment.labelled_arms, (*plan.pilot, *plan.seeds)))
