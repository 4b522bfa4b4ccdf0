"""May an alias move? A candidate against the model that has it, and against the bare base, on the same examples.

The candidate passes when all of these hold:

- there are at least `min_examples` examples, and it is known that no more than `max_overlap` of those given were in
  its training data (they are dropped before anything is computed);
- by the primary metric it is better than the champion by more than `min_improvement`, and better than the base, each
  beyond noise: the end of the paired confidence interval that speaks against it decides, not the mean;
- no metric that has a limit in `max_regression` may have become worse by more than that limit, at the bad end of its
  interval.

Without a champion the base is the only one to beat. The champion may lie over another base: then each is evaluated over
its own, on the same rows. Where the two bases cut a text into other tokens, what is counted per token cannot be
compared, and a condition on it fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.evaluation.metrics import Metric, find_metrics
from rankwise.evaluation.observation import Observation
from rankwise.evaluation.paired import Difference, paired_difference
from rankwise.exceptions import ConfigError
from rankwise.experiment.metric_names import PER_TOKEN
from rankwise.experiment.schema import PromotionSpec


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition.

    Attributes:
        name: Which: `examples`, `overlap`, `comparable`, `improvement`, `regression`.
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
class Decision:
    """What the gate says."""

    checks: tuple[Check, ...]

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
) -> Decision:
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

    Raises:
        ConfigError: A key of the limits is none of the metrics'.
    """
    key = spec.metric or primary_metric
    functions = _by_key(metrics)
    if spec.metric is None and key not in functions:
        # Perplexity is no mean over examples; it moves with the loss that it is the exponential of.
        key = next((each.derived[key].source for each in functions.values() if key in each.derived), key)
    for wanted in (key, *spec.max_regression):
        if wanted not in functions:
            raise ConfigError(
                f"promotion: {wanted} is no mean of the metrics {', '.join(metrics)}; they give {', '.join(functions)}"
            )
    others = [("champion", champion), ("base", base)] if champion is not None else [("base", base)]
    checks = [_enough(len(candidate), spec), _overlap(overlapping, len(candidate), spec)]
    if champion is not None and not same_tokens:
        checks += [_not_comparable(each) for each in (key, *spec.max_regression) if each in PER_TOKEN]
    for name, observations in others:
        limit = spec.min_improvement if name == "champion" else 0.0
        found = _difference(functions[key], key, candidate, observations, spec)
        checks.append(_improvement(key, name, found, limit, functions[key]))
    if champion is not None:
        for each, allowed in spec.max_regression.items():
            found = _difference(functions[each], each, candidate, champion, spec)
            checks.append(_regression(each, found, allowed, functions[each]))
    return Decision(checks=tuple(checks))


def _by_key(names: Sequence[str]) -> Mapping[str, Metric]:
    return {key: metric for metric in find_metrics(names) for key in metric.keys}


def _difference(
    metric: Metric, key: str, candidate: Sequence[Observation], other: Sequence[Observation], spec: PromotionSpec
) -> Difference:
    assert [each.id for each in candidate] == [each.id for each in other], "examples must be paired"
    return paired_difference(
        [metric(each)[key] for each in candidate],
        [metric(each)[key] for each in other],
        confidence=spec.confidence,
    )


def _enough(n: int, spec: PromotionSpec) -> Check:
    text = f"{n} examples; at least {spec.min_examples} are asked for"
    return Check(name="examples", ok=n >= spec.min_examples, text=text, limit=spec.min_examples)


def _overlap(overlapping: int | None, kept: int, spec: PromotionSpec) -> Check:
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


def _not_comparable(key: str) -> Check:
    text = (
        f"{key} counts tokens, and the bases of candidate and champion cut texts into different ones: set "
        "promotion.metric to a metric of generated texts, such as eval.exact_match"
    )
    return Check(name="comparable", ok=False, text=text, limit=0.0, metric=key, against="champion")


def _improvement(key: str, against: str, found: Difference, limit: float, metric: Metric) -> Check:
    worst = _oriented(found, metric, key)
    text = f"{key} against the {against}: {_shown(found)}; better by more than {limit:g} is asked for"
    ok = worst is not None and worst[0] > limit
    return Check(name="improvement", ok=ok, text=text, limit=limit, metric=key, against=against, difference=found)


def _regression(key: str, found: Difference, limit: float, metric: Metric) -> Check:
    worst = _oriented(found, metric, key)
    text = f"{key} against the champion: {_shown(found)}; worse by at most {limit:g} is allowed"
    ok = worst is not None and -worst[0] <= limit
    return Check(name="regression", ok=ok, text=text, limit=limit, metric=key, against="champion", difference=found)


def _oriented(found: Difference, metric: Metric, key: str) -> tuple[float, float] | None:
    """The interval with better as larger; None where the difference is not defined."""
    if found.low is None or found.high is None:
        return None
    return (found.low, found.high) if key in metric.greater_is_better else (-found.high, -found.low)


def _shown(found: Difference) -> str:
    if found.value is None:
        return f"not defined (n = {found.n})"
    return f"{found.value:+.4g} [{found.low:+.4g}, {found.high:+.4g}] (n = {found.n})"
