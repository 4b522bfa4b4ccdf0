"""The conditions of the gate, one by one: what is asked for, what was found, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.evaluation.metrics import Metric, Sample
from rankwise.evaluation.observation import Observation
from rankwise.evaluation.paired import Difference, paired_difference
from rankwise.experiment.schema import PromotionSpec


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition.

    Attributes:
        name: Which: `examples`, `overlap`, `chosen`, `comparable`, `answers`, `improvement`, `regression`.
        metric: The metric's key; None where it is about none.
        against: `champion` or `base`; None where it is about neither.
        difference: Candidate minus the other, with its interval.
        limit: What was asked for.
        ok: Whether it holds.
        text: All of it in words.
    """

    name: str
    ok: bool
    text: str
    limit: float
    metric: str | None = None
    against: str | None = None
    difference: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One metric of the candidate and of another model on the same examples."""

    metric: Metric
    key: str
    against: str
    mine: Sequence[Sample]
    theirs: Sequence[Sample]
    prompts: Sequence[str]

    @classmethod
    def of(
        cls, metric: Metric, key: str, candidate: Sequence[Observation], other: Sequence[Observation], against: str
    ) -> Pair:
        """Of the observations of both."""
        assert [each.id for each in candidate] == [each.id for each in other], "examples must be paired"
        return cls(
            metric=metric,
            key=key,
            against=against,
            mine=[metric(each)[key] for each in candidate],
            theirs=[metric(each)[key] for each in other],
            prompts=[each.prompt for each in candidate],
        )

    def difference(self, confidence: float) -> Difference:
        """Candidate minus the other."""
        return paired_difference(self.mine, self.theirs, clusters=self.prompts, confidence=confidence)

    def answers(self, spec: PromotionSpec, confidence: float) -> list[Check]:
        """Whether the candidate has a value for enough examples; nothing where that is no question."""
        mine, theirs = ([float(each.weight > 0) for each in side] for side in (self.mine, self.theirs))
        counted = len({prompt for prompt, own in zip(self.prompts, mine, strict=True) if own})
        few = counted < min(spec.min_examples, len(set(self.prompts)))
        # A base that has not learned the task may always say something.
        fewer = self.against == "champion" and any(own < other for own, other in zip(mine, theirs, strict=True))
        if not few and not fewer:
            return []
        shares = [[Sample(total=each) for each in side] for side in (mine, theirs)]
        found = paired_difference(*shares, clusters=self.prompts, confidence=confidence)
        told = f"{self.key} has a value for {sum(mine):g} of {len(mine)} answers of the candidate"
        asked = f"at least {spec.min_examples} are asked for"
        if fewer:
            told += f", and for {sum(theirs):g} of the champion"
            asked += ", and not fewer than of the champion beyond noise"
        ok = not few and (not fewer or (found.high is not None and found.high >= 0))
        check = Check(
            name="answers", ok=ok, text=f"{told}; {asked}", limit=spec.min_examples, metric=self.key,
            against=self.against, difference=found,
        )  # fmt: skip
        return [check]

    def worst(self, found: Difference) -> float | None:
        """The bad end of the interval, better as larger; None where the difference or its noise is not defined."""
        if found.low is None or found.high is None:
            return None
        return found.low if self.key in self.metric.greater_is_better else -found.high


def enough(candidate: Sequence[Observation], spec: PromotionSpec) -> Check:
    """Enough examples, those with one prompt counted once."""
    n, prompts = len(candidate), len({each.prompt for each in candidate})
    told = f"{n} examples" if prompts == n else f"{n} examples with {prompts} different prompts"
    text = f"{told}; at least {spec.min_examples} are asked for"
    return Check(name="examples", ok=prompts >= spec.min_examples, text=text, limit=spec.min_examples)


def chosen(contenders: int, spec: PromotionSpec, confidence: float) -> Check:
    """Not a condition: that the choice among many makes the intervals wider."""
    text = (
        f"the candidate is one of {contenders} arms that were compared on these rows, so intervals are at "
        f"{confidence:.5g} in place of {spec.confidence:g}; rows that took no part in the choice (--data) need no such "
        "care"
    )
    return Check(name="chosen", ok=True, text=text, limit=confidence)


def overlap(overlapping: int | None, kept: int, spec: PromotionSpec) -> Check:
    """Few of the examples were trained on, and it is known which."""
    if overlapping is None:
        text = "which rows the candidate was trained on is not known, so none was left out"
        return Check(name="overlap", ok=False, text=text, limit=spec.max_overlap)
    given = kept + overlapping
    share = overlapping / given if given else 0.0
    text = (
        f"{overlapping} of {given} examples ({share:.1%}) were in the candidate's training data and are left out; "
        f"at most {spec.max_overlap:.1%} are allowed"
    )
    return Check(name="overlap", ok=share <= spec.max_overlap, text=text, limit=spec.max_overlap)


def not_comparable(key: str) -> Check:
    """What is counted per token, over bases that cut texts otherwise."""
    text = (
        f"{key} counts tokens, and the bases of candidate and champion cut texts into different ones: set "
        "promotion.metric to a metric of generated texts, such as eval.exact_match"
    )
    return Check(name="comparable", ok=False, text=text, limit=0.0, metric=key, against="champion")


def improvement(pair: Pair, found: Difference, limit: float) -> Check:
    """Better by more than a limit, at the bad end of the interval."""
    worst = pair.worst(found)
    text = f"{pair.key} against the {pair.against}: {found.text}; better by more than {limit:g} is asked for"
    ok = worst is not None and worst > limit
    return Check(
        name="improvement", ok=ok, text=text, limit=limit, metric=pair.key, against=pair.against, difference=found
    )


def regression(pair: Pair, found: Difference, limit: float) -> Check:
    """Worse by no more than a limit, at the bad end of the interval."""
    worst = pair.worst(found)
    text = f"{pair.key} against the {pair.against}: {found.text}; worse by at most {limit:g} is allowed"
    ok = worst is not None and -worst <= limit
    return Check(
        name="regression", ok=ok, text=text, limit=limit, metric=pair.key, against=pair.against, difference=found
    )
