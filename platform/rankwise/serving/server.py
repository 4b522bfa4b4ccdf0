"""What a vLLM server was started with, as far as a resolver must know it: vLLM tells it the name of the model only.

Read in vLLM 0.11 to 0.12 (`vllm/config/lora.py`, `vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`,
`vllm/lora/ops/triton_ops/`, `model_loader/bitsandbytes_loader.py`), which is not installable here:

- `max_lora_rank` is one of a few numbers; an adapter of a higher rank is refused when it is loaded.
- `adapter_config.json` must have `r`, `lora_alpha`, `target_modules`; `use_dora`, `modules_to_save` and a bias are
  refused. Keys that the loader does not know are passed over, so `rank_pattern` and `alpha_pattern` would be scaled
  wrongly, and trained token rows lost: refused here.
- Its LoRA kernels take float16 and bfloat16 only.
- In-flight quantization by bitsandbytes is NF4 with double quantization, whatever else was trained over; LLM.int8 only
  comes from a checkpoint that is quantized already.

- What vLLM's LoRA loader takes, and in what it computes otherwise than training did.
- Names of adapters as requests give them.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.guard import read_yaml
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
    elif quantization.load_in_4bit and quantization.effective() != _NF4.effective():
        double = "with" if quantization.bnb_4bit_use_double_quant else "without"
        kind = f"{quantization.bnb_4bit_quant_type} {double} double quantization"
        parts.append(f"quantizes the base to nf4 with double quantization, trained was over {kind}")
    if not parts:
        parts.append("loads the base as it was trained over")
    return f"vLLM {' and '.join(parts)}; its kernels round in another order, so near ties can fall otherwise."


logger = logging.getLogger(__name__)

DEFAULT_PORT = 8000
"""vLLM's own."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server's options.

    Attributes:
        max_rank: `--max-lora-rank`; None where the server was not started by a command line that is known, and vLLM
            alone decides when it loads.
        revision: `--revision` of the base; None for the hub's `main`.
        quantization: `--quantization`; None for none.
        url: Where it answers, without a path; None where that is not known, or over TLS.
    """

    max_rank: int | None = None
    revision: str | None = None
    quantization: str | None = None
    url: str | None = None

    @classmethod
    def of(cls, argv: Sequence[str]) -> Server:
        """Read the command line of `vllm serve`; options that do not matter here are passed over.

        Options may be spelled with underscores, and be in the file of `--config`, over which the line wins. Where that
        file cannot be read, nothing is known of the server.
        """
        given = [_dashed(argument) for argument in argv[1:]]
        try:
            line = [*_configured(given), *given]
        except (OSError, ValueError) as error:
            logger.warning("the file of --config cannot be read, so nothing is known of the server: %s", error)
            return cls()
        if "--enable-lora" not in line:
            return cls()
        parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--max-lora-rank", type=int, default=DEFAULT_MAX_RANK)
        parser.add_argument("--revision")
        parser.add_argument("--quantization", "-q")
        parser.add_argument("--port", type=int, default=DEFAULT_PORT)
        parser.add_argument("--host")
        parser.add_argument("--uds")
        parser.add_argument("--ssl-certfile")
        known, _ = parser.parse_known_args(line)
        # Any address of its own does; `0.0.0.0` and none at all are all of them.
        host = "127.0.0.1" if known.host in {None, "", "0.0.0.0", "::", "localhost"} else known.host
        elsewhere = known.uds is not None or known.ssl_certfile is not None
        return cls(
            max_rank=known.max_lora_rank,
            revision=known.revision,
            quantization=known.quantization,
            url=None if elsewhere else f"http://{f'[{host}]' if ':' in host else host}:{known.port}",
        )


def _dashed(argument: str) -> str:
    """An option by its name with dashes, as vLLM reads it; other arguments as they are."""
    if not argument.startswith("--"):
        return argument
    name, sign, value = argument.partition("=")
    return name.replace("_", "-") + sign + value


def _configured(line: Sequence[str]) -> Iterator[str]:
    """The options in the file of `--config`, where the line names one.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no YAML mapping.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(list(line))[0].config
    if path is None:
        return
    document = read_yaml(Path(path).read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{path} is no mapping of options to values")
    for name, value in document.items():
        option = _dashed(f"--{name}")
        if value is True:
            yield option
        elif isinstance(value, str | int | float) and value is not False:
            yield f"{option}={value}"


_URI = re.compile(r"models:/[^/@:]+(?:@[\w-]+|/[0-9]+)")
_SHORT = re.compile(r"[^/@:\s]+@[\w-]+")


def model_uri(name: str) -> str | None:
    """`models:/NAME@ALIAS` and `models:/NAME/VERSION` as they are, `NAME@ALIAS` as such a URI; None for others."""
    if _URI.fullmatch(name):
        return name
    return f"models:/{name}" if _SHORT.fullmatch(name) else None
