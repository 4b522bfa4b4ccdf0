"""The gate of a promotion: conditions that a candidate must meet against the champion and the bare base.

The candidate passes if all of these hold:

- there are at least `min_examples` examples, equal prompts counted once, and at most `max_overlap` of the given ones
  were in its training data, which must be known (these are dropped before anything is computed);
- by the primary metric it is better than the champion by more than `min_improvement`, and better than the base, each
  beyond noise: the unfavourable end of the paired confidence interval decides, not the mean;
- no metric with a limit in `max_regression` is worse by more than that limit, at the unfavourable end of its interval;
- it does not win by giving no answers: where a metric leaves out predictions without a value, the candidate has a value
  for `min_examples` examples, and not for fewer than the champion, beyond noise.

Examples with the same prompt are one measurement and are resampled together. If the candidate was chosen among K arms
by these examples, its result is partly luck: the best of K equal arms is "better beyond noise" far more often than any
one of them. So its intervals are at confidence 1 - alpha / K (Bonferroni). Examples that were not used for the choice
need no correction.

Candidates that are tried one after another on the same examples for one alias are the same luck in another form. So
attempt k of these is at confidence 1 - `spent(alpha, k)`: the first at 1 - alpha, as if it were alone, and all later
ones together err as often as the first alone. However many candidates are tried, one that is no better passes with a
probability of at most alpha: alpha / 2 for the unfavourable end of the first interval, alpha / 2 for all others (alpha
spending; by the union bound, so it holds however the candidates depend on each other).

Without a champion, only the base has to be beaten. If the champion belongs to another base, each is evaluated over its
own, on the same rows. If these bases tokenize texts differently, metrics per token cannot be compared, and a condition
on them fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.evaluation.metrics import Metric, Observation, Sample, metrics_of
from rankwise.evaluation.paired import Difference, paired_difference
from rankwise.exceptions import ConfigError
from rankwise.experiment.metric_names import depends_on_tokenizer
from rankwise.experiment.schema import PromotionSpec


@dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One condition.

    Attributes:
        name: `examples`, `overlap`, `chosen`, `attempts`, `comparable`, `answers`, `improvement` or `regression`.
        metric: The metric's key, if any.
        against: `champion`, `base` or None.
        difference: Candidate minus the other, with its interval.
        limit: The required limit.
        ok: Whether it holds.
        text: The condition and its result in words.
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
            prompts=[each.cluster for each in candidate],
        )

    def difference(self, confidence: float) -> Difference:
        """Candidate minus the other."""
        return paired_difference(self.mine, self.theirs, clusters=self.prompts, confidence=confidence)

    def answers(self, spec: PromotionSpec, confidence: float) -> list[GateCheck]:
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
        counts = f"{self.key} has a value for {sum(mine):g} of {len(mine)} answers of the candidate"
        required = f"at least {spec.min_examples} are required"
        if fewer:
            counts += f", and for {sum(theirs):g} of the champion"
            required += ", and not fewer than the champion has, beyond noise"
        ok = not few and (not fewer or (found.high is not None and found.high >= 0))
        check = GateCheck(
            name="answers", ok=ok, text=f"{counts}; {required}", limit=spec.min_examples, metric=self.key,
            against=self.against, difference=found,
        )  # fmt: skip
        return [check]

    def worst(self, found: Difference) -> float | None:
        """The bad end of the interval, better as larger; None where the difference or its noise is not defined."""
        if found.low is None or found.high is None:
            return None
        return found.low if self.key in self.metric.greater_is_better else -found.high


def enough(candidate: Sequence[Observation], spec: PromotionSpec) -> GateCheck:
    """Enough examples, those with one prompt counted once."""
    n, prompts = len(candidate), len({each.cluster for each in candidate})
    count = f"{n} examples" if prompts == n else f"{n} examples with {prompts} different prompts"
    text = f"{count}; at least {spec.min_examples} are required"
    return GateCheck(name="examples", ok=prompts >= spec.min_examples, text=text, limit=spec.min_examples)


def chosen(contenders: int, spec: PromotionSpec, confidence: float) -> GateCheck:
    """Not a condition: that the choice among many makes the intervals wider."""
    text = (
        f"the candidate is one of {contenders} arms that were compared on these rows, so intervals are at confidence "
        f"{confidence:.5g} instead of {spec.confidence:g}; rows that were not used for the choice (--data) need no "
        "correction"
    )
    return GateCheck(name="chosen", ok=True, text=text, limit=confidence)


def spent(alpha: float, attempt: int) -> float:
    """The two-sided error rate of the interval of attempt 1, 2, ... on the same examples.

    The first spends alpha, and attempt k > 1 spends alpha / (k (k - 1)), which sums to alpha over all k > 1.
    """
    return alpha if attempt == 1 else alpha / (attempt * (attempt - 1))


def left(alpha: float, attempt: int) -> float:
    """The probability of a false pass that is left for all attempts after this one: alpha / (2 k)."""
    return alpha / (2 * attempt)


def attempts(attempt: int, alias: str, spec: PromotionSpec, confidence: float) -> GateCheck:
    """Not a condition: that earlier attempts on the same rows make the intervals wider."""
    alpha = 1 - spec.confidence
    text = (
        f"this is attempt {attempt} on these rows for @{alias}, so intervals are at confidence {confidence:.5g} "
        f"instead of {spec.confidence:g}; of the {alpha:.3g} for a false pass, {left(alpha, attempt):.3g} is left for "
        "further attempts. Rows that were not compared before (--data) start anew"
    )
    return GateCheck(name="attempts", ok=True, text=text, limit=confidence)


def overlap(overlapping: int | None, kept: int, spec: PromotionSpec) -> GateCheck:
    """Few of the examples were trained on, and it is known which."""
    if overlapping is None:
        text = "the rows that the candidate was trained on are unknown, so none was left out"
        return GateCheck(name="overlap", ok=False, text=text, limit=spec.max_overlap)
    given = kept + overlapping
    share = overlapping / given if given else 0.0
    text = (
        f"{overlapping} of {given} examples ({share:.1%}) were in the candidate's training data and are left out; "
        f"at most {spec.max_overlap:.1%} are allowed"
    )
    return GateCheck(name="overlap", ok=share <= spec.max_overlap, text=text, limit=spec.max_overlap)


def not_comparable(key: str) -> GateCheck:
    """What is counted per token, over bases that cut texts otherwise."""
    text = (
        f"{key} is per token, and the bases of candidate and champion tokenize texts differently: set "
        "promotion.metric to a metric of generated texts, such as eval.exact_match"
    )
    return GateCheck(name="comparable", ok=False, text=text, limit=0.0, metric=key, against="champion")


def improvement(pair: Pair, found: Difference, limit: float) -> GateCheck:
    """Better by more than a limit, at the bad end of the interval."""
    worst = pair.worst(found)
    text = f"{pair.key} against the {pair.against}: {found.text}; must be better by more than {limit:g}"
    ok = worst is not None and worst > limit
    return GateCheck(
        name="improvement", ok=ok, text=text, limit=limit, metric=pair.key, against=pair.against, difference=found
    )


def regression(pair: Pair, found: Difference, limit: float) -> GateCheck:
    """Worse by no more than a limit, at the bad end of the interval."""
    worst = pair.worst(found)
    text = f"{pair.key} against the {pair.against}: {found.text}; may be worse by at most {limit:g}"
    ok = worst is not None and -worst <= limit
    return GateCheck(
        name="regression", ok=ok, text=text, limit=limit, metric=pair.key, against=pair.against, difference=found
    )


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """What the gate says."""

    checks: tuple[GateCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every condition holds."""
        return all(check.ok for check in self.checks)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not, in words."""
        return tuple(check.text for check in self.checks if not check.ok)

    def to_json(self) -> dict[str, Any]:
        """As the evidence and `promote --json` have it."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GateDecision:
        """The inverse of `to_json`."""
        checks = []
        for check in values["checks"]:
            difference = check["difference"]
            checks.append(
                GateCheck(**{**check, "difference": None if difference is None else Difference(**difference)})
            )
        return cls(checks=tuple(checks))


def decide(
    candidate: Sequence[Observation],
    champion: Sequence[Observation] | None,
    base: Sequence[Observation],
    spec: PromotionSpec,
    *,
    metrics: Sequence[str],
    primary_metric: str,
    overlapping: int | None = 0,
    same_tokens: bool = True,
    contenders: int = 1,
    attempt: int = 1,
    alias: str = "champion",
) -> GateDecision:
    """Weigh a candidate.

    Args:
        candidate: What it did on the examples, those of its training left out.
        champion: What the holder of the alias did on the same examples; None where nobody has it.
        base: What the bare base did.
        spec: The limits.
        metrics: Names of the metrics that were evaluated.
        primary_metric: The key that decides, unless `spec` names another.
        overlapping: How many examples were left out since the candidate was trained on them; None where it is not
            known on which rows it was.
        same_tokens: Whether the bases of candidate and champion cut texts into the same tokens.
        contenders: Among how many arms, itself included, the candidate was chosen by these examples; 1 where they took
            no part in the choice.
        attempt: Counts the candidates that were compared on these examples for the alias, this one included.
        alias: The alias, for the text of a check.

    Raises:
        ConfigError: A key of the limits is none of the metrics'.
    """
    key = spec.metric or primary_metric
    functions = _by_key(metrics, candidate)
    if spec.metric is None and key not in functions:
        # Perplexity is no mean over examples; it moves with the loss that it is the exponential of.
        key = next((each.derived[key].source for each in functions.values() if key in each.derived), key)
    for wanted in (key, *spec.max_regression):
        if wanted not in functions:
            raise ConfigError(
                f"promotion: {wanted} is not a mean of the metrics {', '.join(metrics)}; use one of "
                f"{', '.join(functions)}"
            )
    confidence = 1 - spent(1 - spec.confidence, attempt) / contenders
    checks = [enough(candidate, spec), overlap(overlapping, len(candidate), spec)]
    if contenders > 1:
        checks.append(chosen(contenders, spec, confidence))
    if attempt > 1:
        checks.append(attempts(attempt, alias, spec, confidence))
    if champion is not None and not same_tokens:
        checks += [not_comparable(each) for each in (key, *spec.max_regression) if depends_on_tokenizer(each)]
    for name, observations in [("champion", champion), ("base", base)]:
        if observations is None:
            continue
        compared = [key, *spec.max_regression] if name == "champion" else [key]
        for each in dict.fromkeys(compared):
            pair = Pair.of(functions[each], each, candidate, observations, name)
            checks += pair.answers(spec, confidence)
            found = pair.difference(confidence)
            if each == key:
                limit = spec.min_improvement if name == "champion" else 0.0
                checks.append(improvement(pair, found, limit))
            if name == "champion" and each in spec.max_regression:
                checks.append(regression(pair, found, spec.max_regression[each]))
    return GateDecision(checks=tuple(checks))


def _by_key(names: Sequence[str], observations: Sequence[Observation]) -> Mapping[str, Metric]:
    return {key: metric for metric in metrics_of(names, observations) for key in metric.keys}
