"""Metrics: pure functions of one observation, registered by a decorator, summed up with their standard error.

Every metric is a weighted mean over examples: a function gives each example's share (`Sample`: a total and a weight),
and the value is the sum of the totals over the sum of the weights. That form is enough for means over tokens (weight
= tokens) and over examples (weight = 1, or 0 for an example that does not count), keeps examples apart so that two
models can be compared pair by pair, and gives each mean its standard error in the same way.

Decisions:

- Standard error: the linearised variance of a ratio with examples as clusters (Cochran, *Sampling Techniques*, 3rd
  ed., section 6.4): tokens of one example are not independent, so they do not count as so many measurements, and
  neither do examples with one prompt. With equal weights it is the usual s / sqrt(n). Fewer than two have none (None).
- `n` is the number of examples with weight above 0.
- No example to count: value None, stderr None, n 0. A mean that is not finite (the loss of a diverged adapter): value
  None, stderr None, n > 0. NaN and infinity never leave this module: they are not JSON, and MLflow's charts break on
  them.
- `number`: a prediction without a number is left out of the mean absolute and relative error (there is no error to
  take; `n` shows how many are behind the mean), counts as a miss in `eval.within_20_percent`, and is counted by
  `eval.parse_failures`, which is a share. So a model cannot win by silence. An example whose reference has no number
  counts nowhere; one whose reference is 0 has no relative error.

Metrics of other packages: an entry point of the group `rankwise.metrics`, named like the metric, that points to the
decorated function (`tests/helpers/example_metrics/` is such a package). It is loaded when a definition names it; its
keys begin with `eval.` and are of no other metric.

Also reads numbers from answers such as `Price is $1,234.50`, and computes means over seeds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rankwise.exceptions import ConfigError
from rankwise.experiment.metric_names import SOURCE_PREFIX, load_metric, metric_facts

# Commas only group thousands ("1,234" is 1234; in "3,5" the number ends before the comma). A minus sign counts where no
# digit or letter stands before it ("10-20" starts with 10). ASCII digits only.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_EXPONENT = r"(?:[eE][+-]?[0-9]+)?"
_PLAIN = re.compile(rf"(?P<sign>(?<![0-9A-Za-z])[-\u2212])?(?P<digits>(?:{_DIGITS}){_EXPONENT})")
_CURRENCY = re.compile(
    rf"(?P<sign>(?<![0-9A-Za-z])[-\u2212])?[$€£¥₹]\s*(?P<inner>[-\u2212])?(?P<digits>(?:{_DIGITS}){_EXPONENT})"
)


def parse_number(text: str) -> float | None:
    """Return the number that a text gives, or None when there is none.

    The first number after a currency sign is taken; without a currency sign the first number. So an answer that repeats
    the question ("The 0.23 carat diamond costs $326") is read as it is meant. A number too large for a float counts as
    none.
    """
    match = _CURRENCY.search(text)
    negative = match is not None and bool(match["sign"] or match["inner"])
    if match is None:
        match = _PLAIN.search(text)
        if match is None:
            return None
        negative = bool(match["sign"])
    value = float(match["digits"].replace(",", ""))
    if not math.isfinite(value):
        return None
    return -value if negative else value


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One example under one adapter (or the bare base).

    Attributes:
        id: The example's id; the same example has the same id under every adapter, so results can be paired.
        prompt: The rendered prompt, generation prompt included.
        reference: The assistant text of the data.
        columns: The row's own columns, for metrics that need more than the texts.
        loss_sum: Negative log likelihood in nats, summed over the supervised tokens (teacher forced).
        tokens: Number of supervised tokens.
        correct_tokens: Supervised tokens whose most likely prediction (the reference before it given) is right.
        prediction: Greedy generation from the prompt; None where no metric asked for one.
        source: The label of the row's source where there are several, else empty.
        finish_reason: `stop` (an end token came) or `length`; None without a generation.
    """

    id: str
    prompt: str
    reference: str
    loss_sum: float
    tokens: int
    correct_tokens: int
    prediction: str | None = None
    finish_reason: str | None = None
    columns: Mapping[str, object] = field(default_factory=dict)
    source: str = ""

    @property
    def cluster(self) -> str:
        """Equal for examples that are one measurement: those with one prompt. A document has none: it is its own."""
        return f"prompt {self.prompt}" if self.prompt else f"id {self.id}"


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """A mean with its standard error and the number of examples behind it. None: not defined (see the module)."""

    value: float | None
    stderr: float | None
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """The value as the `--json` outputs spell it."""
        return {"value": self.value, "stderr": self.stderr, "n": self.n}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One example's share of a weighted mean."""

    total: float
    weight: float = 1.0

    @property
    def score(self) -> float | None:
        """The example's own value: None where it does not count or is not finite."""
        if self.weight == 0:
            return None
        value = self.total / self.weight
        return value if math.isfinite(value) else None


NOT_COUNTED = Sample(total=0.0, weight=0.0)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A smooth function of a mean; its standard error follows by the delta method, |derivative| times the mean's."""

    source: str
    function: Callable[[float], float]
    derivative: Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A registered metric.

    Attributes:
        name: What `evaluation.metrics` of a definition says.
        function: Pure; gives a `Sample` for every key of `keys`, also for examples that do not count.
        keys: The means that `function` gives, as MLflow keys.
        greater_is_better: Those of all keys of which more is better.
        needs_generation: Whether `Observation.prediction` is read.
        derived: Further keys, each a smooth function of one of the means.
    """

    name: str
    function: Callable[[Observation], Mapping[str, Sample]]
    keys: tuple[str, ...]
    greater_is_better: frozenset[str] = frozenset()
    needs_generation: bool = False
    derived: Mapping[str, Transform] = field(default_factory=dict)

    def __call__(self, observation: Observation) -> Mapping[str, Sample]:
        """Give one example's share of every mean."""
        return self.function(observation)

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Keys of the means and of what is derived from them."""
        return (*self.keys, *self.derived)


_REGISTRY: dict[str, Metric] = {}


def metric(
    name: str,
    *,
    keys: Sequence[str],
    greater_is_better: Iterable[str] = (),
    needs_generation: bool = False,
    derived: Mapping[str, Transform] | None = None,
) -> Callable[[Callable[[Observation], Mapping[str, Sample]]], Metric]:
    """Register a function as the metric `name`.

    Raises:
        ConfigError: The name is taken.
    """

    def register(function: Callable[[Observation], Mapping[str, Sample]]) -> Metric:
        if name in _REGISTRY:
            raise ConfigError(f"metric {name!r} is registered already, by {_REGISTRY[name].function.__module__}")
        made = Metric(
            name=name,
            function=function,
            keys=tuple(keys),
            greater_is_better=frozenset(greater_is_better),
            needs_generation=needs_generation,
            derived=dict(derived or {}),
        )
        _REGISTRY[name] = made
        return made

    return register


def find_metrics(names: Iterable[str]) -> list[Metric]:
    """Return the metrics of these names, loading those of other packages.

    Raises:
        ConfigError: A name is not known, or an entry point does not hold a metric of its name.
    """
    return [_find(name) for name in names]


def metrics_of(names: Iterable[str], observations: Iterable[Observation]) -> list[Metric]:
    """The metrics of these names; `loss` also gives the mean of each source (`eval.loss.LABEL`), if there are several.

    Raises:
        ConfigError: As `find_metrics`.
    """
    labels = [label for label in dict.fromkeys(each.source for each in observations) if label]
    return [_by_source(each, labels) if each is loss and labels else each for each in find_metrics(names)]


def _by_source(whole: Metric, labels: Sequence[str]) -> Metric:
    keys = {label: SOURCE_PREFIX + label for label in labels}

    def function(observation: Observation) -> dict[str, Sample]:
        samples = whole(observation)
        own = samples[whole.keys[0]]
        return {**samples, **{key: own if observation.source == label else NOT_COUNTED for label, key in keys.items()}}

    return replace(whole, function=function, keys=(*whole.keys, *keys.values()))


def _find(name: str) -> Metric:
    if name in _REGISTRY:
        return _REGISTRY[name]
    loaded = load_metric(name)
    if not isinstance(loaded, Metric):
        raise ConfigError(f"the metric {name!r} is a {type(loaded).__name__}; decorate a function with @metric")
    metric_facts(name)  # Refuses keys that are not its own.
    return loaded


def compute(metrics: Sequence[Metric], observations: Sequence[Observation]) -> dict[str, MetricValue]:
    """Every key of every metric over these observations (none at all is allowed: each value is then None)."""
    values: dict[str, MetricValue] = {}
    clusters = [observation.cluster for observation in observations]
    for each in metrics:
        samples = [each(observation) for observation in observations]
        for key in each.keys:
            values[key] = weighted_mean([sample[key] for sample in samples], clusters)
        for key, transform in each.derived.items():
            values[key] = _transformed(values[transform.source], transform)
    return values


def scores(metrics: Sequence[Metric], observation: Observation) -> dict[str, float | None]:
    """One example's own value of every mean, for the table of predictions."""
    return {key: sample.score for each in metrics for key, sample in each(observation).items()}


def weighted_mean(samples: Sequence[Sample], clusters: Sequence[Hashable] | None = None) -> MetricValue:
    """Sum of totals over sum of weights, with the standard error of a ratio (see the module).

    Args:
        samples: The examples' shares.
        clusters: Examples with equal ones are one measurement; None: each is one of its own.
    """
    names: Sequence[Hashable] = range(len(samples)) if clusters is None else clusters
    counted = [(name, sample) for name, sample in zip(names, samples, strict=True) if sample.weight > 0]
    n = len(counted)
    if n == 0:
        return MetricValue(value=None, stderr=None, n=0)
    places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in counted))}
    at, m = [places[name] for name, _ in counted], len(places)
    totals = np.bincount(at, [sample.total for _, sample in counted], m)
    weights = np.bincount(at, [sample.weight for _, sample in counted], m)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(totals.sum() / weights.sum())
        if not math.isfinite(mean):
            return MetricValue(value=None, stderr=None, n=n)
        if m == 1:
            return MetricValue(value=mean, stderr=None, n=n)
        residuals = totals - mean * weights
        stderr = float(np.sqrt(m / (m - 1) * np.sum(residuals**2)) / weights.sum())
    return MetricValue(value=mean, stderr=stderr if math.isfinite(stderr) else None, n=n)


def _transformed(source: MetricValue, transform: Transform) -> MetricValue:
    if source.value is None:
        return MetricValue(value=None, stderr=None, n=source.n)
    try:
        value = transform.function(source.value)
        slope = abs(transform.derivative(source.value))
    except OverflowError:  # exp of a loss above 709
        return MetricValue(value=None, stderr=None, n=source.n)
    stderr = None if source.stderr is None else slope * source.stderr
    return MetricValue(value=value, stderr=stderr, n=source.n)


@metric(
    "loss",
    keys=["eval.loss"],
    derived={"eval.perplexity": Transform(source="eval.loss", function=math.exp, derivative=math.exp)},
)
def loss(observation: Observation) -> dict[str, Sample]:
    """Mean negative log likelihood (nats) of a supervised token; perplexity is its exponential."""
    return {"eval.loss": Sample(total=observation.loss_sum, weight=observation.tokens)}


@metric("token_accuracy", keys=["eval.token_accuracy"], greater_is_better=["eval.token_accuracy"])
def token_accuracy(observation: Observation) -> dict[str, Sample]:
    """Share of supervised tokens that were the most likely ones, the reference before them given."""
    return {"eval.token_accuracy": Sample(total=observation.correct_tokens, weight=observation.tokens)}


@metric("exact_match", keys=["eval.exact_match"], greater_is_better=["eval.exact_match"], needs_generation=True)
def exact_match(observation: Observation) -> dict[str, Sample]:
    """Share of generations equal to the reference once white space is normalised."""
    same = _prediction(observation).split() == observation.reference.split()
    return {"eval.exact_match": Sample(total=float(same))}


@metric(
    "number",
    keys=["eval.mean_absolute_error", "eval.mean_relative_error", "eval.within_20_percent", "eval.parse_failures"],
    greater_is_better=["eval.within_20_percent"],
    needs_generation=True,
)
def number(observation: Observation) -> dict[str, Sample]:
    """Error of the number in the generation against the number in the reference, in the data's own unit."""
    wanted = parse_number(observation.reference)
    got = parse_number(_prediction(observation))
    absolute = relative = within = failed = NOT_COUNTED
    if wanted is not None:
        failed = Sample(total=float(got is None))
        within = Sample(total=0.0)
        if got is not None:
            error = abs(got - wanted)
            absolute = Sample(total=error)
            within = Sample(total=float(error <= 0.2 * abs(wanted)))
            if wanted != 0:
                relative = Sample(total=error / abs(wanted))
    return {
        "eval.mean_absolute_error": absolute,
        "eval.mean_relative_error": relative,
        "eval.within_20_percent": within,
        "eval.parse_failures": failed,
    }


def _prediction(observation: Observation) -> str:
    assert observation.prediction is not None, "a metric with needs_generation=True was given no generation"
    return observation.prediction


STDERR = ".stderr"
COUNT = ".n"
PREFIX = "eval."


def to_tracking(metrics: Mapping[str, MetricValue]) -> dict[str, float]:
    """Flat MLflow metrics: `KEY`, `KEY.stderr`, `KEY.n`. What is not defined is left out; `KEY.n` is always there."""
    flat: dict[str, float] = {}
    for key, metric in metrics.items():
        if metric.value is not None:
            flat[key] = metric.value
        if metric.stderr is not None:
            flat[key + STDERR] = metric.stderr
        flat[key + COUNT] = float(metric.n)
    return flat


def from_tracking(flat: Mapping[str, float]) -> dict[str, MetricValue]:
    """The metric values among a run's metrics: every `eval.` key that has a count (others are no means of examples).

    MLflow can hold NaN and infinity, of other writers too: such a value is not defined.
    """
    flat = finite(flat)
    values: dict[str, MetricValue] = {}
    for name, count in flat.items():
        if name.startswith(PREFIX) and name.endswith(COUNT):
            key = name.removesuffix(COUNT)
            values[key] = MetricValue(value=flat.get(key), stderr=flat.get(key + STDERR), n=int(count))
    return values


def finite(flat: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: value for name, value in flat.items() if math.isfinite(value)}


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """A metric of one configuration, over its seeds.

    Attributes:
        value: Mean over the seeds.
        spread: Standard deviation over the seeds; None with one seed.
        stderr: Standard error of `value` (see `over_seeds`); None where it is not known.
        seeds: How many seeds have a value.
    """

    value: float
    spread: float | None
    stderr: float | None
    seeds: int


def over_seeds(values: Sequence[MetricValue]) -> SeedMean | None:
    """Mean, spread and standard error of one metric over the seeds of a configuration; None when no seed has a value.

    All seeds are evaluated on the same examples, so the examples' own variance does not shrink with more seeds and that
    of the seeds does: stderr² = spread² / seeds + mean of the seeds' stderr². It errs on the large side, since the
    spread holds some of the examples' variance too.
    """
    known = [metric.value for metric in values if metric.value is not None]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    errors = [metric.stderr for metric in values if metric.value is not None and metric.stderr is not None]
    of_examples = math.fsum(error**2 for error in errors) / len(errors) if errors else None
    if len(known) == 1:
        return SeedMean(value=mean, spread=None, stderr=errors[0] if errors else None, seeds=1)
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    stderr = math.sqrt(variance / len(known) + (of_examples or 0.0))
    return SeedMean(value=mean, spread=math.sqrt(variance), stderr=stderr, seeds=len(known))
