"""Arms for TRL: written to files that a process without rankwise reads (P1), or trained here over one base (P2)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.blocks import Block
from benchmarks.meter import Stamp
from benchmarks.peft_loop import ordered_rows
from benchmarks.subjects import Workload, label
from benchmarks.trl_loop import train_with_trl
from rankwise.experiment.arm import ArmSpec
from rankwise.modeling.base import LoadedBase, bnb_config

P1 = "P1: SFTTrainer, a process an arm"
P2 = "P2: SFTTrainer, one base"
P2_PLAIN = "P2 without checkpointing"


def has_trl() -> bool:
    """Whether the extra `bench` is installed."""
    return importlib.util.find_spec("trl") is not None


def describe(
    workload: Workload, base: LoadedBase, arm: ArmSpec, start: Mapping[str, torch.Tensor], directory: Path
) -> Path:
    """Write an arm's settings, rows in order and start values; return the path of the settings."""
    directory.mkdir(parents=True, exist_ok=True)
    name = f"r{arm.lora.r}-seed{arm.seed}"
    rows = []
    for step in ordered_rows(workload, arm):
        for row in step:
            labels = np.where(row.supervised, row.input_ids, -100)
            rows.append({"input_ids": row.input_ids.tolist(), "labels": labels.tolist()})
    (directory / f"{name}-rows.json").write_text(json.dumps(rows), encoding="utf-8")
    save_file({key: value.contiguous() for key, value in start.items()}, directory / f"{name}-start.safetensors")
    quantization = bnb_config(arm.quantization, base.compute_dtype, base.model.config).to_diff_dict()
    document = {
        "base": str(workload.resolved.path),
        "device": base.device.type,
        "dtype": str(base.compute_dtype).removeprefix("torch."),
        "quantization": {key: quantization[key] for key in quantization if key.startswith(("load_in_4", "bnb_4"))},
        "lora": {
            "r": arm.lora.r,
            "lora_alpha": arm.lora.lora_alpha,
            "lora_dropout": arm.lora.lora_dropout,
            "target_modules": list(arm.lora.target_modules),
        },
        "steps": arm.training.optimizer_steps(len(workload.rows)),
        "micro_batch": arm.training.per_device_train_batch_size,
        "learning_rate": arm.training.learning_rate,
        "max_length": arm.training.max_length,
        "rows": str(directory / f"{name}-rows.json"),
        "start": str(directory / f"{name}-start.safetensors"),
    }
    path = directory / f"{name}.json"
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return path


def train_over_loaded_base(arm: ArmSpec, described: Path, model: Any, *, checkpointing: bool) -> Block:
    """Train one arm in this process over a loaded base, which is as before at the end."""
    before = vars(model).get("forward")
    result = train_with_trl(
        model,
        json.loads(described.read_text(encoding="utf-8")),
        described.with_suffix(""),
        checkpointing=checkpointing,
    )
    clean = result["trainer"].model.unload()
    assert clean is model, "peft gave another model back"
    # The trainer leaves a head of its own, checkpointing and a hook on the embeddings behind.
    vars(model).pop("forward", None)
    if before is not None:
        model.forward = before
    model.disable_input_require_grads()
    model.gradient_checkpointing_disable()
    model.eval()
    model.requires_grad_(False)
    vars(model).pop("peft_config", None)
    stamps = [Stamp(wall=wall, cpu=cpu) for wall, cpu in result["stamps"]]
    way = P2 if checkpointing else P2_PLAIN
    return Block.of(way, stamps, {label(arm): result["losses"]}, result["peak_bytes"])
