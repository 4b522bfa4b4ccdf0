"""May an alias move? A candidate against the model that has it, and against the bare base, on the same examples.

The candidate passes when all of these hold:

- there are at least `min_examples` examples, equal prompts counted once, and it is known that no more than
  `max_overlap` of those given were in its training data (they are dropped before anything is computed);
- by the primary metric it is better than the champion by more than `min_improvement`, and better than the base, each
  beyond noise: the end of the paired confidence interval that speaks against it decides, not the mean;
- no metric that has a limit in `max_regression` may have become worse by more than that limit, at the bad end of its
  interval;
- it does not win by silence: where a metric leaves out predictions that say nothing, the candidate has a value for
  `min_examples` examples, and not for fewer than the champion, beyond noise.

Examples with one prompt are one measurement, and are resampled together. A candidate that was chosen among K arms by
these very examples is lucky on them as well as good: the best of K equal ones is "better beyond noise" far more often
than any one of them, so its intervals are those at confidence 1 - alpha / K (Bonferroni). Examples that took no part in
the choice need no such correction.

Without a champion the base is the only one to beat. The champion may lie over another base: then each is evaluated over
its own, on the same rows. Where the two bases cut a text into other tokens, what is counted per token cannot be
compared, and a condition on it fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.evaluation.gate_checks import (
    Check,
    Pair,
    chosen,
    enough,
    improvement,
    not_comparable,
    overlap,
    regression,
)
from rankwise.evaluation.metrics import Metric, find_metrics
from rankwise.evaluation.observation import Observation
from rankwise.exceptions import ConfigError
from rankwise.experiment.metric_names import PER_TOKEN
from rankwise.experiment.schema import PromotionSpec


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
    contenders: int = 1,
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
        contenders: Among how many arms, itself included, the candidate was chosen by these examples; 1 where they took
            no part in the choice.

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
    confidence = 1 - (1 - spec.confidence) / contenders
    checks = [enough(candidate, spec), overlap(overlapping, len(candidate), spec)]
    if contenders > 1:
        checks.append(chosen(contenders, spec, confidence))
    if champion is not None and not same_tokens:
        checks += [not_comparable(each) for each in (key, *spec.max_regression) if each in PER_TOKEN]
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
    return Decision(checks=tuple(checks))


def _by_key(names: Sequence[str]) -> Mapping[str, Metric]:
    return {key: metric for metric in find_metrics(names) for key in metric.keys}
