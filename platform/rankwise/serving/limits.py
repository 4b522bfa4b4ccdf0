"""What vLLM's LoRA loader takes, and in what it computes otherwise than training did.

Read in vLLM 0.11 to 0.12 (`vllm/config/lora.py`, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`,
`vllm/lora/ops/triton_ops/`, `model_loader/bitsandbytes_loader.py`), which is not installable here:

- `max_lora_rank` is one of a few numbers; an adapter of a higher rank is refused when it is loaded.
- `adapter_config.json` must have `r`, `lora_alpha`, `target_modules`; `use_dora`, `modules_to_save` and a bias are
  refused. Keys that the loader does not know are passed over, so `rank_pattern` and `alpha_pattern` would be scaled
  wrongly, and trained token rows lost: refused here.
- Its LoRA kernels take float16 and bfloat16 only.
- In-flight quantization by bitsandbytes is NF4 with double quantization, whatever else was trained over; LLM.int8 only
  comes from a checkpoint that is quantized already.
"""

from __future__ import annotations

from typing import Any

from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be; vLLM's literal also has 1, which some releases lack."""
DEFAULT_MAX_RANK = 16
_NF4 = QuantizationSpec()


def max_rank_for(rank: int) -> int:
    """The smallest `--max-lora-rank` that an adapter of this rank fits into.

    Raises:
        ConfigError: vLLM has none.
    """
    for allowed in MAX_RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(f"vLLM serves adapters up to rank {MAX_RANKS[-1]}, this one has r = {rank}")


def obstacles(config: dict[str, Any]) -> list[str]:
    """Why vLLM cannot serve an adapter, or would compute something else; empty where it can.

    Args:
        config: The content of `adapter_config.json`.
    """
    found = []
    if config.get("use_dora"):
        found.append("use_dora: vLLM has no DoRA")
    if config.get("modules_to_save"):
        found.append(f"modules_to_save ({', '.join(config['modules_to_save'])}): vLLM loads low-rank matrices only")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        found.append("a bias: vLLM's loader refuses it")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            found.append(f"{key}: vLLM scales all modules alike, so the answers would be wrong")
    if config.get("trainable_token_indices"):
        found.append("trainable_token_indices: vLLM would pass over the rows that were trained for tokens")
    for key in ("target_parameters", "fan_in_fan_out"):
        if config.get(key):
            found.append(f"{key}: not supported by vLLM's loader")
    if int(config["r"]) > MAX_RANKS[-1]:
        found.append(f"r = {config['r']}: vLLM serves up to {MAX_RANKS[-1]}")
    return found


def served_dtype(compute_dtype: str) -> str:
    """What vLLM computes in, nearest to the dtype that was trained in."""
    return "float16" if compute_dtype == "float16" else "bfloat16"


def served_quantization(quantization: QuantizationSpec) -> str:
    """How vLLM can load the base, nearest to how it was trained over: `bitsandbytes` or nothing."""
    return "bitsandbytes" if quantization.load_in_4bit else ""


def differences(quantization: QuantizationSpec, compute_dtype: str) -> str:
    """In one sentence, how vLLM's arithmetic differs from that of the training."""
    parts = []
    served = served_dtype(compute_dtype)
    if served != compute_dtype:
        parts.append(f"computes in {served}, trained was in {compute_dtype} (its LoRA kernels take 16 bit only)")
    if quantization.load_in_8bit:
        parts.append("holds the base in 16 bit, trained was over LLM.int8")
    elif quantization.load_in_4bit:
        same = (
            quantization.bnb_4bit_quant_type == _NF4.bnb_4bit_quant_type
            and quantization.bnb_4bit_use_double_quant == _NF4.bnb_4bit_use_double_quant
        )
        if not same:
            double = "with" if quantization.bnb_4bit_use_double_quant else "without"
            kind = f"{quantization.bnb_4bit_quant_type} {double} double quantization"
            parts.append(f"quantizes the base to nf4 with double quantization, trained was over {kind}")
    if not parts:
        parts.append("loads the base as it was trained over")
    return f"vLLM {' and '.join(parts)}; its kernels round in another order, so near ties can fall otherwise."
