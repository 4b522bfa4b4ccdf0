"""The base: a frozen model, quantized on loading or out of the cache of quantized bases, and its tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from rankwise.assets.base import ResolvedBase
from rankwise.assets.layout import read_json
from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.dtype import DTYPES, default_device, resolve_dtype
from rankwise.modeling.exact_layers import hold_exact
from rankwise.modeling.fingerprint import Fingerprint, fingerprint_base
from rankwise.modeling.memory import model_bytes
from rankwise.modeling.quantized_cache import load_or_quantize, make_key
from rankwise.modeling.quiet import quiet_transformers, say_casts_once
from rankwise.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedBase:
    """A base in memory: in evaluation mode, no parameter asks for a gradient.

    Attributes:
        model: A transformers causal language model; adapters are injected into it.
        tokenizer: Its tokenizer, as the base has it.
        path: The local directory that it was read from.
        source: What names it in an experiment file: `org/name`, a path, `pypi:...`.
        revision: The commit or digest that was read.
        fingerprint: The identity of what was read.
        quantization: As asked for.
        compute_dtype: What quantized layers compute in.
        module_dtype: The dtype of the modules that are not quantized.
        device: Where it is.
        dtype_reason: Why that dtype, in words.
        from_cache: Whether the quantized weights came from the cache.
    """

    model: Any
    tokenizer: Any
    path: Path
    source: str
    revision: str
    fingerprint: Fingerprint
    quantization: QuantizationSpec
    compute_dtype: torch.dtype
    module_dtype: torch.dtype
    device: torch.device
    dtype_reason: str
    from_cache: bool

    @property
    def memory_bytes(self) -> int:
        """Bytes of all parameters, buffers and quantization states as they are loaded, adapters included."""
        return model_bytes(self.model)


def load_base(
    resolved: ResolvedBase,
    quantization: QuantizationSpec,
    settings: Settings,
    *,
    device: str | None = None,
    module_dtype: str | None = None,
    progress: bool = False,
) -> LoadedBase:
    """Load a base with its tokenizer, without a network, code of the base or pickles.

    Args:
        resolved: The local directory, and what it came from.
        quantization: How to quantize it; with neither 4 nor 8 bit it is loaded in the resolved dtype.
        settings: Where the caches are.
        device: `cpu`, `cuda`, `cuda:1`, ...; the first GPU, else the CPU, when left out.
        module_dtype: What the modules that are not quantized are loaded in (`float32`, ...); the compute dtype when
            left out.
        progress: Show the progress bars of transformers.

    Raises:
        AssetError: The directory is not a whole base that transformers can load.
        ConfigError: It is quantized already, and `quantization` asks for more.
        StorageError: The cache cannot be written.
    """
    target = torch.device(device) if device is not None else default_device()
    config = read_json(resolved.path / "config.json")
    quantized = quantization.load_in_4bit or quantization.load_in_8bit
    if quantized and config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"base {resolved.source} is quantized already (method {method}), and quantization asks for "
            f"{'4' if quantization.load_in_4bit else '8'} bit; name the full-precision base, or set load_in_4bit: false"
        )
    dtype = resolve_dtype(target, quantization.bnb_4bit_compute_dtype)
    loaded = dtype.dtype if module_dtype is None else DTYPES[module_dtype]
    logger.info("base %s on %s computes in %s", resolved.source, target, dtype.reason)
    fingerprint = fingerprint_base(resolved.path, settings)
    if quantization.load_in_8bit:
        say_casts_once()
    with quiet_transformers(progress=progress):
        tokenizer = load_tokenizer(resolved.path)
        if quantized:
            key = make_key(
                fingerprint,
                quantization,
                compute_dtype=dtype.name,
                module_dtype=str(loaded).removeprefix("torch."),
                device_type=target.type,
            )
            model, from_cache = load_or_quantize(
                key,
                settings,
                source=resolved.source,
                revision=resolved.revision,
                quantize=lambda: _load_model(resolved.path, loaded, target, bnb_config(quantization, dtype.dtype)),
                load=lambda path: _load_model(path, loaded, target, None),
            )
        else:
            model, from_cache = _load_model(resolved.path, loaded, target, None), False
    # peft and transformers take the name of the base from here; the cache's entry is not its name.
    model.config._name_or_path = model.name_or_path = str(resolved.path)
    model.eval()
    model.requires_grad_(False)
    hold_exact(model)
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        path=resolved.path,
        source=resolved.source,
        revision=resolved.revision,
        fingerprint=fingerprint,
        quantization=quantization,
        compute_dtype=dtype.dtype,
        module_dtype=loaded,
        device=target,
        dtype_reason=dtype.reason,
        from_cache=from_cache,
    )


def bnb_config(quantization: QuantizationSpec, compute_dtype: torch.dtype) -> Any:
    """The quantization as transformers takes it, the compute dtype resolved; None for an unquantized base."""
    if quantization.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization.load_in_8bit else None


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a base's directory.

    Raises:
        AssetError: There is none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AssetError(f"the tokenizer of {path} cannot be loaded: {error}") from error


def _load_model(path: Path, dtype: torch.dtype, device: torch.device, config: Any) -> Any:
    arguments: dict[str, Any] = {} if config is None else {"quantization_config": config}
    index = device.index if device.index is not None else 0
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            device_map={"": "cpu" if device.type == "cpu" else index},
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise AssetError(f"base {path} cannot be loaded: {error}") from error
    # transformers fills what is missing with random numbers, and says so in a log line only.
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        raise AssetError(
            f"base {path} is not whole: missing tensors {missing[:5]}, mismatched {mismatched[:5]} "
            f"({len(missing)} and {len(mismatched)} in all); fetch it again"
        )
    return model
