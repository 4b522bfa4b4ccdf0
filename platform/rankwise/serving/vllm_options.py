"""A vLLM server's options, limits of vLLM's LoRA loader, and the adapter names that requests may use.

The limits come from the sources of vLLM 0.11 to 0.12 (`vllm/config/lora.py`, `vllm/lora/peft_helper.py`,
`vllm/lora/lora_model.py`, `vllm/lora/ops/triton_ops/`, `model_loader/bitsandbytes_loader.py`); vLLM was not run:

- `max_lora_rank` is one of a few numbers; loading an adapter of a higher rank fails.
- `adapter_config.json` must have `r`, `lora_alpha`, `target_modules`; `use_dora`, `modules_to_save` and a bias are
  refused. The loader ignores unknown keys, so it would scale `rank_pattern` and `alpha_pattern` wrongly and lose
  trained token rows: refused here.
- LoRA kernels support float16 and bfloat16 only.
- In-flight bitsandbytes quantization is always NF4 with double quantization; LLM.int8 needs a quantized checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.assets.input_checks import read_yaml
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec

if TYPE_CHECKING:
    from rankwise.modeling.adapter_config import AdapterConfig

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Allowed values of `--max-lora-rank`, without 1, which some releases lack."""
DEFAULT_MAX_RANK = 16
_NF4 = QuantizationSpec()


def max_rank_for(rank: int) -> int:
    """The smallest `--max-lora-rank` for a rank; above vLLM's limit a `ConfigError`."""
    for allowed in MAX_RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(f"vLLM serves adapters up to rank {MAX_RANKS[-1]}, this one has r = {rank}")


def obstacles(config: AdapterConfig) -> list[str]:
    """Why vLLM cannot serve an adapter with this `adapter_config.json`, or would serve it wrongly."""
    reasons = []
    if config.use_dora:
        reasons.append("use_dora: vLLM has no DoRA")
    if config.modules_to_save:
        reasons.append(f"modules_to_save ({', '.join(config.modules_to_save)}): vLLM loads low-rank matrices only")
    if config.bias != "none" or config.lora_bias:
        reasons.append("a bias: vLLM's loader refuses it")
    for key in ("rank_pattern", "alpha_pattern"):
        if getattr(config, key):
            reasons.append(f"{key}: vLLM scales all modules alike, so the answers would be wrong")
    if config.trainable_token_indices:
        reasons.append("trainable_token_indices: vLLM would ignore the trained token rows")
    for key in ("target_parameters", "fan_in_fan_out"):
        if getattr(config, key):
            reasons.append(f"{key}: not supported by vLLM's loader")
    if config.r > MAX_RANKS[-1]:
        reasons.append(f"r = {config.r}: vLLM serves up to {MAX_RANKS[-1]}")
    return reasons


def served_dtype(compute_dtype: str) -> str:
    """The vLLM dtype closest to the one used in training."""
    return "float16" if compute_dtype == "float16" else "bfloat16"


def served_quantization(quantization: QuantizationSpec) -> str:
    """The vLLM quantization closest to the one used in training: `bitsandbytes` or empty."""
    return "bitsandbytes" if quantization.load_in_4bit else ""


def differences(quantization: QuantizationSpec, compute_dtype: str) -> str:
    """How vLLM's arithmetic differs from training, in one sentence."""
    parts = []
    served = served_dtype(compute_dtype)
    if served != compute_dtype:
        parts.append(f"computes in {served} instead of {compute_dtype} (its LoRA kernels support 16 bit only)")
    if quantization.load_in_8bit:
        parts.append("loads the base in 16 bit instead of LLM.int8")
    elif quantization.load_in_4bit and quantization.effective() != _NF4.effective():
        double = "with" if quantization.bnb_4bit_use_double_quant else "without"
        kind = f"{quantization.bnb_4bit_quant_type} {double} double quantization"
        parts.append(f"quantizes the base to nf4 with double quantization instead of {kind}")
    if not parts:
        parts.append("loads the base as in training")
    return f"vLLM {' and '.join(parts)}; its kernels round in a different order, so near ties may resolve differently."


logger = logging.getLogger(__name__)

DEFAULT_PORT = 8000  # of vLLM


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """Options that the server was started with; vLLM tells a resolver the model's name only.

    Without a known command line, all are None. `url` has no path, and is None for a server with TLS.
    """

    max_rank: int | None = None
    revision: str | None = None
    quantization: str | None = None
    url: str | None = None

    @classmethod
    def from_command_line(cls, argv: Sequence[str]) -> VllmOptions:
        """Read the command line of `vllm serve` and the file of its `--config`; other options are ignored."""
        given = [_dashed(argument) for argument in argv[1:]]
        try:
            line = [*_configured(given), *given]
        except (OSError, ValueError) as error:
            logger.warning("the file of --config cannot be read, so the server's options are unknown: %s", error)
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
        # Without a host, or with a wildcard address, the server listens on the loopback interface too.
        host = "127.0.0.1" if known.host in {None, "", "0.0.0.0", "::", "localhost"} else known.host
        elsewhere = known.uds is not None or known.ssl_certfile is not None
        return cls(
            max_rank=known.max_lora_rank,
            revision=known.revision,
            quantization=known.quantization,
            url=None if elsewhere else f"http://{f'[{host}]' if ':' in host else host}:{known.port}",
        )


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, sign, value = argument.partition("=")
    return name.replace("_", "-") + sign + value


def _configured(line: Sequence[str]) -> Iterator[str]:
    """The options in the file of `--config`, if the line has one."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(list(line))[0].config
    if path is None:
        return
    document = read_yaml(Path(path).read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a mapping of options to values")
    for name, value in document.items():
        option = _dashed(f"--{name}")
        if value is True:
            yield option
        elif isinstance(value, str | int | float) and value is not False:
            yield f"{option}={value}"


_URI = re.compile(r"models:/[^/@:]+(?:@[\w-]+|/[0-9]+)")
_SHORT = re.compile(r"[^/@:\s]+@[\w-]+")


def model_uri(name: str) -> str | None:
    """The URI for `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `NAME@ALIAS`; None for other names."""
    if _URI.fullmatch(name):
        return name
    return f"models:/{name}" if _SHORT.fullmatch(name) else None
