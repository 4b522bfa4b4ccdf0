"""One arm of a sweep: every setting resolved, and the hashes that name it.

The spec hash covers what influences the trained adapter and nothing else:

| part | in the hash |
|---|---|
| base, data | digest of a file or directory, wherever it is; repository and commit on the hub |
| several sources | identity and mapping of each, ratio of the weights, numbers of rows; labels for evaluations only |
| evaluation rows | rows and seed of a split, which takes rows from training; not a source of its own |
| how rows are read and rendered | version and settings; settings at their default are left out |
| quantization | data type and double quantization only with 4-bit |
| lora | all; the order of target modules does not matter |
| training | all but `save_steps`, `logging_steps`, `eval_steps`, and defaults of fields added later |
| seed, init_from | yes |
| name, description, sweep, evaluation, register, tracking, base_model_config, attn_implementation | no |

With `register.checkpoint: best` or `training.early_stopping_patience`, evaluations during training influence the
result. Then `eval_steps`, the primary metric, the evaluation rows and their limit are in the hash too, and
`max_new_tokens` if the primary metric needs generation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self

from rankwise.experiment.hashing import digest, plain
from rankwise.experiment.metric_names import keys_of, metric_facts, needs_generation
from rankwise.experiment.module_names import in_tower
from rankwise.experiment.schema import (
    RENDERING,
    Attention,
    DatasetSpec,
    EvalSplit,
    EvaluationSpec,
    ExperimentSpec,
    LoraSpec,
    QuantizationSpec,
    Section,
    Seed,
    Text,
    TrainingSpec,
)
from rankwise.experiment.source import identity, is_pinned, parse_source

# Increased when the meaning of a setting changes, so that old results do not count as new ones. Arms that were stored
# with an earlier rendering keep that version of the hash, by which the queue and MLflow know them.
HASH_VERSION = 2
_HASH_VERSIONS = {1: 1, 2: HASH_VERSION}
_WITHOUT_EFFECT = {"save_steps", "logging_steps", "eval_steps"}
# Fields added since HASH_VERSION are hashed only if they differ from their default, so that old hashes stay valid.
_ADDED = (
    "optim", "train_sampling_strategy", "lr_scheduler_kwargs", "early_stopping_patience", "early_stopping_threshold",
)  # fmt: skip
# MLflow params with a shorter name than their field.
_PARAM_NAMES = {"lora.lora_alpha": "lora.alpha", "lora.lora_dropout": "lora.dropout", "lora.use_rslora": "lora.rslora"}


class ArmSpec(Section):
    """One configuration with all numbers resolved. Workers receive it as JSON."""

    base_model: Text
    base_model_revision: Text | None = None
    attn_implementation: Attention = "auto"
    quantization: QuantizationSpec
    lora: LoraSpec
    dataset: DatasetSpec
    training: TrainingSpec
    seed: Seed
    init_from: Text | None = None
    evaluation: EvaluationSpec
    checkpoint: Literal["last", "best"] = "last"

    @classmethod
    def of(cls, spec: ExperimentSpec) -> ArmSpec:
        """The arm that a definition describes without its sweep."""
        return cls(
            base_model=spec.base_model,
            base_model_revision=spec.base_model_revision,
            attn_implementation=spec.attn_implementation,
            quantization=spec.quantization,
            lora=spec.lora,
            dataset=spec.dataset.model_copy(update={"rendering": spec.dataset.rendering or RENDERING}),
            training=spec.training,
            seed=spec.seed,
            init_from=spec.init_from,
            evaluation=spec.evaluation,
            checkpoint=spec.checkpoint,
        )

    @classmethod
    def from_json(cls, text: str) -> ArmSpec:
        """The inverse of `to_json`; an arm without a version of rendering was stored before there was a second one."""
        data = json.loads(text)
        data["dataset"].setdefault("rendering", 1)
        return cls.model_validate_json(json.dumps(data))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A validated copy with some fields changed. Pydantic's own method would keep the cached hash."""
        del deep  # Everything inside is immutable.
        return type(self).model_validate(
            {name: getattr(self, name) for name in type(self).model_fields} | dict(update or {})
        )

    def to_json(self) -> str:
        """The arm as JSON; `from_json` returns an equal arm with an equal hash."""
        return self.model_dump_json()

    @cached_property
    def spec_hash(self) -> str:
        """64 hex digits that identify the arm; see the module's table."""
        return digest(self._result())

    @cached_property
    def configuration(self) -> str:
        """64 hex digits shared by the arms that differ only in the seed."""
        return digest({**self._result(), "seed": None})

    @property
    def rendering(self) -> int:
        """The version of how rows are read and rendered."""
        return self.dataset.rendering or RENDERING

    def optimizer_steps(self, rows: int) -> int:
        """Optimizer steps over `rows` training rows."""
        return self.training.optimizer_steps(rows, whole_epochs=self.rendering > 1)

    @property
    def short(self) -> str:
        """The first 12 digits of the spec hash."""
        return self.spec_hash[:12]

    @property
    def adapter_name(self) -> str:
        """Name of the adapter in a model. It has no dots: peft refuses them."""
        return f"arm-{self.short}"

    @cached_property
    def pack_key(self) -> str:
        """Arms with the same key can be trained together: one base, one forward pass.

        Gradient checkpointing and attention are part of the key because they apply to the whole model.
        """
        key = {
            "base": self._base(),
            "quantization": _quantization(self.quantization),
            "init_from": self.init_from,
            "gradient_checkpointing": self.training.gradient_checkpointing,
        }
        # The default is left out, so that the keys of queued jobs stay valid.
        if self.attn_implementation != "auto":
            key["attn_implementation"] = self.attn_implementation
        if self.towers:
            key["towers"] = True
        return digest(key)

    @property
    def towers(self) -> bool:
        """Whether target modules name a vision or audio tower of a multimodal base, which is not loaded otherwise."""
        targets = self.lora.target_modules
        return not isinstance(targets, str) and any(map(in_tower, targets))

    @cached_property
    def provisional(self) -> bool:
        """Whether the spec hash can still change because a source or `init_from` is not pinned."""
        pins = [(self.base_model, self.base_model_revision)]
        sources = [*self.dataset.train_sources, *(self.dataset.eval_sources if self._evaluations_decide else ())]
        pins += [(source.source, source.revision) for source in sources]
        floating = self.init_from is not None and "@" in self.init_from
        return floating or not all(is_pinned(parse_source(source), revision) for source, revision in pins)

    @cached_property
    def params(self) -> dict[str, int | float | str]:
        """Settings as MLflow params, without unset ones.

        Only what the spec hash covers, since a linked or resumed run logs them again.
        """
        lora = self.lora
        modules = lora.target_modules
        values: dict[str, Any] = {
            "base_model": self.base_model,
            "base_model_revision": self.base_model_revision,
            "init_from": self.init_from,
            "seed": self.seed,
            "lora.r": lora.r,
            param_name("lora.lora_alpha"): lora.lora_alpha,
            param_name("lora.lora_dropout"): lora.lora_dropout,
            "lora.target_modules": modules if isinstance(modules, str) else ",".join(modules),
            param_name("lora.use_rslora"): lora.use_rslora,
            **_source_params(self.dataset),
            "dataset.limit.train": self.dataset.limit.train,
            "dataset.chat_template": self.dataset.chat_template,
        }
        if isinstance(self.dataset.eval, EvalSplit):
            values |= {"dataset.eval.rows": self.dataset.eval.rows, "dataset.eval.seed": self.dataset.eval.seed}
        for name, value in self._reading().items():
            values[f"dataset.{name}"] = value if isinstance(value, int | str) else json.dumps(value, ensure_ascii=False)
        values |= {f"quantization.{key}": value for key, value in _quantization(self.quantization).items()}
        training = self._training()
        arguments = training.pop("lr_scheduler_kwargs", {})
        values |= {f"training.{key}": value for key, value in training.items()}
        values |= {f"training.lr_scheduler_kwargs.{key}": value for key, value in arguments.items()}
        if self._evaluations_decide:
            values |= {"training.eval_steps": self.training.eval_steps}
        if self.checkpoint == "best":
            values |= {"register.checkpoint": "best"}
        return {key: plain(value) for key, value in values.items() if value is not None}

    def eval_hash(self) -> str:
        """Hash of an evaluation of this arm's adapter: spec hash, evaluation settings and rows."""
        return digest({"evaluated": self.spec_hash, **self._evaluation()})

    def base_eval_hash(self) -> str:
        """Hash of the same evaluation of the base alone: equal for arms with the same rows and quantization."""
        base = {"base": self._base(), "quantization": _quantization(self.quantization)}
        return digest({"evaluated": base, **self._evaluation()})

    @property
    def _evaluations_decide(self) -> bool:
        """Whether evaluations during training influence the adapter."""
        return self.checkpoint == "best" or self.training.early_stopping_patience is not None

    def _base(self) -> dict[str, Any]:
        return identity(parse_source(self.base_model), self.base_model_revision)

    def _training(self) -> dict[str, Any]:
        values = self.training.model_dump(exclude=_WITHOUT_EFFECT)
        values["lr_scheduler_kwargs"] = self.training.lr_scheduler_kwargs.given()
        defaults = {name: TrainingSpec.model_fields[name].default for name in _ADDED}
        defaults["lr_scheduler_kwargs"] = {}
        return {key: value for key, value in values.items() if key not in _ADDED or value != defaults[key]}

    def _texts(self) -> dict[str, Any]:
        """How a row becomes tokens."""
        data = self.dataset
        template = data.chat_template
        return {
            "prompt": data.prompt,
            "completion": data.completion,
            "messages": data.messages,
            "system": data.system,
            # A template file is identified by its content, not its path.
            "chat_template": data.chat_template_revision or template,
            "max_length": self.training.max_length,
            **self._reading(),
        }

    def _reading(self) -> dict[str, Any]:
        """The version of rendering after the first, and the settings that differ from their default."""
        return {} if self.rendering == 1 else {"rendering": self.rendering, **self.dataset.reading()}

    def _train_rows(self) -> dict[str, Any]:
        data = self.dataset
        split = data.eval if isinstance(data.eval, EvalSplit) else None
        held_out = split.model_dump() if split else None
        if not isinstance(data.train, str):
            return {"sources": _listed(data, "train"), "held_out": held_out}
        return {
            **identity(parse_source(data.train), data.train_revision),
            "split": data.train_split,
            "name": data.name,
            "held_out": held_out,
        }

    def _mixture(self) -> dict[str, Any]:
        """How many rows each source gives. Only the ratio of weights counts."""
        if isinstance(self.dataset.train, str):
            return {}
        whole = sum(source.weight or 0 for source in self.dataset.train)
        return {
            "mixture": [
                {"share": None if source.weight is None else source.weight / whole, "rows": source.rows}
                for source in self.dataset.train
            ]
        }

    def _eval_rows(self) -> dict[str, Any]:
        data = self.dataset
        if data.eval is not None and not isinstance(data.eval, str | EvalSplit):
            labels = {"labels": list(data.eval_labels)}
            return {"sources": _listed(data, "eval"), **labels, "limit": data.limit.eval}
        if not isinstance(data.eval, str):
            rows = self._train_rows()
            # The rows that are split off do not depend on how the others are mixed.
            named = {"labels": list(data.eval_labels)} if data.eval_labels else {}
            return {"of": {**rows, **named}, "limit": data.limit.eval}
        source = identity(parse_source(data.eval), data.eval_revision)
        return {**source, "split": data.eval_split, "name": data.name, "limit": data.limit.eval}

    def _result(self) -> dict[str, Any]:
        result = {
            "version": _HASH_VERSIONS[self.rendering],
            "base": self._base(),
            "quantization": _quantization(self.quantization),
            "lora": self.lora.model_dump(),
            "rows": {**self._train_rows(), **self._mixture(), "limit": self.dataset.limit.train},
            "texts": self._texts(),
            "training": self._training(),
            "seed": self.seed,
            "init_from": self.init_from,
        }
        if self._evaluations_decide:
            key = self.evaluation.primary_metric
            generated = any(
                key in keys_of([metric]) and needs_generation([metric]) for metric in self.evaluation.metrics
            )
            result["chosen"] = {
                "by": key,
                "eval_steps": self.training.eval_steps,
                "rows": self._eval_rows(),
                "max_new_tokens": self.evaluation.max_new_tokens if generated else None,
            }
        return result

    def _evaluation(self) -> dict[str, Any]:
        metrics = sorted(set(self.evaluation.metrics))
        # Another release of a package may compute the metric differently.
        origins = {metric: metric_facts(metric).origin for metric in metrics if metric_facts(metric).origin}
        return {
            "version": _HASH_VERSIONS[self.rendering],
            "metrics": metrics,
            **({"origins": origins} if origins else {}),
            "max_new_tokens": self.evaluation.max_new_tokens if needs_generation(metrics) else None,
            "rows": self._eval_rows(),
            "texts": self._texts(),
        }


def param_name(path: str) -> str:
    """The name of a field among an arm's MLflow params."""
    return _PARAM_NAMES.get(path) or re.sub(r"\[(\d+)\]", r".\1", path)


def _source_params(dataset: DatasetSpec) -> dict[str, Any]:
    """The training data as params; of the sources of a list as `dataset.train.PLACE.FIELD`."""
    if isinstance(dataset.train, str):
        return {"dataset.train": dataset.train, "dataset.train_revision": dataset.train_revision}
    values: dict[str, Any] = {}
    for place, source in enumerate(dataset.train):
        for name, value in source.model_dump(exclude_none=True).items():
            text = value if isinstance(value, int | float | str) else json.dumps(value, ensure_ascii=False)
            values[f"dataset.train.{place}.{name}"] = text
    return values


def _listed(dataset: DatasetSpec, side: Literal["train", "eval"]) -> list[dict[str, Any]]:
    """What identifies the rows of the sources of a list, and how they are read."""
    sources = dataset.train_sources if side == "train" else dataset.eval_sources
    rows = []
    for source in sources:
        single = dataset.single(source, side)
        # A number of evaluation rows chooses them; one of training rows is part of the mixture.
        count = {"rows": source.rows} if side == "eval" else {}
        own = {"split": single.train_split, "name": single.name, "reading": source.mapping(), **count}
        rows.append({**identity(parse_source(source.source), source.revision), **own})
    return rows


def _quantization(spec: QuantizationSpec) -> dict[str, Any]:
    hidden = set() if spec.load_in_4bit else {"bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
    return spec.model_dump(exclude=hidden)
