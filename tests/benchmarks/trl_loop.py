"""TRL's `SFTTrainer` with a `peft_config`, as its documentation shows it. Imports nothing of rankwise.

    python -m benchmarks.trl_loop ARM.json        # one arm, a process of its own (P1)

What is not TRL's default, so that losses can be compared: rows in a given order, given start values, adapters in fp32
(TRL rounds them to bf16 over a quantized base), no dropout, no bf16 on a CPU (5 to 10 times slower there), a linear
schedule without warm-up. Its default of gradient checkpointing is kept unless told otherwise.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def train_with_trl(model: Any, arm: Mapping[str, Any], output: Path, *, checkpointing: bool = True) -> dict[str, Any]:
    """Train one arm.

    Args:
        model: A path to a base, which the trainer loads and quantizes, or a loaded model.
        arm: What `describe` wrote.
        output: The trainer's directory.
        checkpointing: TRL's default is True.

    Returns:
        `stamps` (wall, CPU), `losses`, `peak_bytes` of the GPU, and `trainer`.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = arm["device"] == "cuda"

    class Marked(SFTTrainer):
        losses: list[Any]

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss.detach())
            return loss

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.stamps: list[tuple[float, float]] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.stamps.append((time.perf_counter(), time.process_time()))

    clock = Clock()
    computing = getattr(torch, arm["dtype"])
    by_path = isinstance(model, str)
    trainer = Marked(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            max_steps=arm["steps"],
            per_device_train_batch_size=arm["micro_batch"],
            learning_rate=arm["learning_rate"],
            max_length=arm["max_length"],
            gradient_checkpointing=checkpointing,
            train_sampling_strategy="sequential",
            use_cpu=not cuda,
            bf16=computing is torch.bfloat16,
            model_init_kwargs={"dtype": computing} if by_path else None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=cuda,
        ),
        train_dataset=Dataset.from_list(json.loads(Path(arm["rows"]).read_text(encoding="utf-8"))),
        processing_class=AutoTokenizer.from_pretrained(arm["base"]),
        quantization_config=BitsAndBytesConfig(**{**arm["quantization"], "bnb_4bit_compute_dtype": computing})
        if by_path
        else None,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **arm["lora"]),
        callbacks=[clock],
    )
    trainer.losses = []
    with torch.no_grad():
        for name, value in load_file(arm["start"]).items():
            parameter = trainer.model.get_parameter(name.replace(".weight", ".default.weight"))
            parameter.data = value.to(parameter.device, torch.float32)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return {
        "stamps": clock.stamps,
        "losses": [float(loss) for loss in trainer.losses],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "trainer": trainer,
    }


def main(path: Path) -> None:
    """Train the arm of a file, save its adapter, write what was measured beside it."""
    arm = json.loads(path.read_text(encoding="utf-8"))
    output = path.with_suffix("")
    result = train_with_trl(arm["base"], arm, output)
    result.pop("trainer").save_model(str(output / "adapter"))
    (output / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
