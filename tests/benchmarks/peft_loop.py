"""The plain way: a loop over peft and AdamW as anybody would write it, and what it shares with the engine.

All ways start from the values that the engine draws, and see the rows in the engine's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import get_scheduler

from benchmarks.blocks import Block
from benchmarks.meter import Stamp
from benchmarks.subjects import Workload, label
from rankwise.data.batches import Batch, Sampler, collate
from rankwise.data.tokens import Encoded
from rankwise.experiment.arm import ArmSpec
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.lora.packed import adapter_parameters, create_adapter, delete_adapter

WAY = "plain peft loop"


def start_values(base: LoadedBase, arm: ArmSpec) -> dict[str, torch.Tensor]:
    """An arm's first matrices under the names of a PEFT file, as the engine draws them."""
    name = create_adapter(base.model, arm)
    values = {key: value.detach().cpu().clone() for key, value in adapter_parameters(base.model, name).items()}
    delete_adapter(base.model, name)
    return values


def ordered_rows(workload: Workload, arm: ArmSpec) -> Iterator[list[Encoded]]:
    """The rows of each step, in the engine's order."""
    sampler = Sampler(len(workload.rows), arm.training.per_device_train_batch_size, arm.seed)
    for step in range(arm.training.optimizer_steps(len(workload.rows))):
        yield [workload.rows[index] for index in sampler.indices(step)]


def lora_config(arm: ArmSpec) -> LoraConfig:
    return LoraConfig(
        r=arm.lora.r,
        lora_alpha=arm.lora.lora_alpha,
        lora_dropout=arm.lora.lora_dropout,
        target_modules=list(arm.lora.target_modules),
        task_type="CAUSAL_LM",
    )


def train_plainly(workload: Workload, model: Any, arm: ArmSpec, start: Mapping[str, torch.Tensor]) -> Block:
    """Train one arm over an already loaded base, which is as before at the end."""
    device = next(model.parameters()).device
    adapted = get_peft_model(model, lora_config(arm))
    try:
        with torch.no_grad():
            for name, value in start.items():
                adapted.get_parameter(name.replace(".weight", ".default.weight")).copy_(value)
        adapted.train()
        stamps, losses = _loop(workload, adapted, arm, device)
    finally:
        clean = adapted.unload()
        clean.eval()
        clean.requires_grad_(False)
        vars(clean).pop("peft_config", None)
    return Block.of(WAY, stamps, {label(arm): losses}, _peak(device))


def _loop(workload: Workload, model: Any, arm: ArmSpec, device: torch.device) -> tuple[list[Stamp], list[float]]:
    training = arm.training
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    schedule = get_scheduler(
        training.lr_scheduler_type, optimizer, num_warmup_steps=0, num_training_steps=training.max_steps
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stamps, losses = [], []
    for rows in ordered_rows(workload, arm):
        batch: Batch = collate(rows, pad_token_id=0)
        output = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            labels=batch.input_ids.masked_fill(~batch.supervised, -100).to(device),
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        stamps.append(Stamp.now())
    return stamps, losses


def _peak(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0
