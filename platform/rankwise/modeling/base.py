"""Load a frozen base (quantized, or from the cache of quantized bases) and its tokenizer; dtypes, memory, skeletons.

On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights at the first forward in evaluation mode: it rounds
their scales to bfloat16 for good and multiplies in bfloat16 whatever the compute dtype is. The base would no longer
match its fingerprint, and results would depend on the CPU. `hold_exact` therefore disables that kernel for every base
that rankwise loads; `modeling.lora.lean` recovers the speed by keeping dequantized weights in memory.

A skeleton is a model without weights, built from a configuration on the meta device.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from rankwise.assets.base import ResolvedBase
from rankwise.assets.layout import read_json
from rankwise.compat.bitsandbytes import disable_cpu_repacking, log_casts_once, quantization_tensors, set_dtypes
from rankwise.compat.bitsandbytes import is_repacked as layer_is_repacked
from rankwise.compat.peft import is_adapted_linear
from rankwise.compat.transformers import experts_as_saved, is_conv1d, is_router, never_quantized
from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.attention import ResolvedAttention, resolve_attention
from rankwise.modeling.fingerprint import Fingerprint, fingerprint_base
from rankwise.modeling.prequantized import check_stored_quantization
from rankwise.modeling.quantized_cache import load_or_quantize, make_key
from rankwise.modeling.quantized_share import share_of_loaded
from rankwise.modeling.rope import per_row
from rankwise.modeling.wrappers import build, loading_of
from rankwise.settings import Settings, compute_dtype

Kernels = Literal["exact", "library"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ResolvedDtype:
    """A dtype and the reason for choosing it, for the log."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """The dtype's name in YAML files and transformers: `float32`, `bfloat16`, `float16`."""
        return str(self.dtype).removeprefix("torch.")


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def resolve_dtype(device: torch.device, requested: str = "auto") -> ResolvedDtype:
    """Choose the compute dtype for a device; `requested` is `auto` or a key of `DTYPES`.

    Raises:
        ConfigError: `RANKWISE_COMPUTE_DTYPE` is not a known dtype.
    """
    if requested != "auto":
        return ResolvedDtype(dtype=DTYPES[requested], reason=f"{requested}: as requested")
    set_here = compute_dtype()
    if set_here != "auto":
        return ResolvedDtype(dtype=DTYPES[set_here], reason=f"{set_here}: set by RANKWISE_COMPUTE_DTYPE")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        version = f"CUDA capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return ResolvedDtype(dtype=torch.bfloat16, reason=f"bfloat16: {version}")
        # Small gradients would underflow in float16.
        reason = f"float32: {version} has no bfloat16; float16 would need loss scaling"
        return ResolvedDtype(dtype=torch.float32, reason=reason)
    if device.type == "cpu":
        fast = _fast_bfloat16_on_cpu()
        if fast is not None:
            return ResolvedDtype(dtype=torch.bfloat16, reason=f"bfloat16: the CPU has {fast}")
        return ResolvedDtype(
            dtype=torch.float32,
            reason="float32: the CPU has neither AVX512-BF16 nor AMX, where bfloat16 is several times slower",
        )
    return ResolvedDtype(dtype=torch.float32, reason=f"float32: unknown device type {device.type}")


def _fast_bfloat16_on_cpu() -> str | None:
    capabilities = torch.cpu.get_capabilities()
    for flag, name in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16")):
        if capabilities.get(flag):
            return name
    return None


REPACKED = (
    "bitsandbytes has repacked the 4-bit weights of this model for AVX512-BF16, which rounds their scales and computes "
    "in bfloat16. By default a stored adapter is loaded over the base without that rounding, so its results differ "
    "slightly from this model's; load_model(..., kernels='library') gives this model's. To prevent it, call "
    "rankwise.modeling.base.hold_exact(model) right after loading a base"
)


def hold_exact(model: Any) -> int:
    """Keep 4-bit layers from being repacked, and return how many there are. Call it before the first forward."""
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        disable_cpu_repacking(layer)
    return len(layers)


def is_repacked(model: Any) -> bool:
    """Whether bitsandbytes has repacked a weight of this model, so that it differs from what was loaded."""
    return any(layer_is_repacked(module) for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))


# Block sizes of bitsandbytes: weights per scaling factor, and scaling factors per second-level factor.
BLOCK = 64
NESTED_BLOCK = 256
_CODE_BYTES = 16 * 4
_NESTED_CODE_BYTES = 256 * 4 + 4  # The table of 8-bit values and the offset.


def model_bytes(model: Any) -> int:
    """Bytes of all parameters, buffers and quantization states; shared tensors count once."""
    sizes: dict[tuple[str, int], int] = {}
    for tensor in _tensors(model):
        if tensor.numel():
            sizes[str(tensor.device), tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def quantized_linear_bytes(weights: int, *, bits: int, double_quant: bool, out_features: int) -> int:
    """Bytes of one linear layer's weight (in_features * out_features numbers) in bitsandbytes.

    `bits` is 4 (NF4 or FP4, in blocks of 64) or 8 (LLM.int8, one float32 for each output). `double_quant`: whether the
    blocks' scaling factors are quantized to 8 bit (4 bit only).
    """
    if bits == 8:
        return weights + 4 * out_features
    blocks = -(-weights // BLOCK)
    packed = -(-weights // 2)
    if not double_quant:
        return packed + 4 * blocks + _CODE_BYTES
    return packed + blocks + 4 * -(-blocks // NESTED_BLOCK) + _CODE_BYTES + _NESTED_CODE_BYTES


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter.data
        yield from quantization_tensors(parameter)
    yield from model.buffers()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Make transformers log only errors and show no progress bars inside the block."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def expected_warning(message: str) -> Iterator[None]:
    """Ignore one third-party warning, by its exact message."""
    with warnings.catch_warnings():
        # `filterwarnings` takes a regular expression that matches from the start.
        warnings.filterwarnings("ignore", message=re.escape(message) + r"\Z")
        yield


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedBase:
    """A base in memory, in evaluation mode and without gradients.

    Attributes:
        source: Its name in an experiment file: `org/name`, a path, `pypi:...`.
        revision: The commit or digest that was read.
        compute_dtype: Dtype that quantized layers compute in.
        module_dtype: Dtype of the modules that are not quantized.
        attention: The attention implementation, and why it was chosen.
        from_cache: Whether the quantized weights came from the cache.
        prequantized: Whether its files are quantized; they were loaded as they are.
        towers: Whether the vision and audio towers of a multimodal wrapper were loaded too.
        kernels: Whether 4-bit layers compute exactly, or as bitsandbytes chooses (see the module).
        share_4bit: Share of its weights that are in 4 bit (`modeling.quantized_share`).
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
    attention: ResolvedAttention
    from_cache: bool
    prequantized: bool
    towers: bool
    kernels: Kernels
    share_4bit: float

    @property
    def memory_bytes(self) -> int:
        """Bytes of all parameters, buffers and quantization states, adapters included."""
        return model_bytes(self.model)


def load_base(
    resolved: ResolvedBase,
    quantization: QuantizationSpec,
    settings: Settings,
    *,
    device: str | None = None,
    module_dtype: str | None = None,
    attn_implementation: str = "auto",
    towers: bool = False,
    kernels: Kernels = "exact",
) -> LoadedBase:
    """Load a base and its tokenizer. Never uses a network, code from the base, or pickles.

    `device` (`cpu`, `cuda:1`, ...) defaults to the first GPU, or the CPU; `module_dtype`, that of modules that are not
    quantized, to the compute dtype. `attn_implementation` is `auto`, or a name of `modeling.attention`. Of a multimodal
    wrapper, only the text model is loaded, unless `towers` is set. `kernels` is `exact`, or `library`: what a plain
    peft model computes on CPUs with AVX512-BF16.

    Raises:
        AssetError: The directory is not a complete base that transformers can load.
        ConfigError: The base's files are quantized in another way than `quantization` requests, or the attention
            implementation is not supported.
        StorageError: The cache cannot be written.
    """
    target = torch.device(device) if device is not None else default_device()
    config = read_json(resolved.path / "config.json")
    prequantized = check_stored_quantization(config, quantization, resolved.source)
    dtype = resolve_dtype(target, quantization.bnb_4bit_compute_dtype)
    loaded = dtype.dtype if module_dtype is None else DTYPES[module_dtype]
    attention = _attention(config, target, loaded, attn_implementation, resolved.path, towers)
    logger.info("base %s on %s computes in %s", resolved.source, target, dtype.reason)
    logger.info("base %s runs attention %s", resolved.source, attention.reason)
    fingerprint = fingerprint_base(resolved.path, settings)
    if quantization.load_in_8bit:
        log_casts_once()
    with quiet_transformers():
        tokenizer = load_tokenizer(resolved.path)
        if prequantized:
            model, from_cache = _load_model(resolved.path, loaded, target, attention.name, None, towers), False
            set_dtypes(model, dtype.dtype, loaded)
            cast_modules(model, loaded)  # transformers leaves them in the dtype of the files.
        elif quantization.bits is not None:
            key = make_key(
                fingerprint,
                quantization,
                compute_dtype=dtype.name,
                module_dtype=str(loaded).removeprefix("torch."),
                device_type=target.type,
                towers=towers,
            )
            model, from_cache = load_or_quantize(
                key,
                settings,
                source=resolved.source,
                revision=resolved.revision,
                quantize=lambda: _load_model(
                    resolved.path, loaded, target, attention.name, bnb_config(quantization, dtype.dtype, config), towers
                ),
                load=lambda path: _load_cached(path, loaded, target, attention.name, towers),
            )
        else:
            model, from_cache = _load_model(resolved.path, loaded, target, attention.name, None, towers), False
    # peft and transformers read the base's name from here; it must not be the path of the cache entry.
    model.config.name_or_path = model.name_or_path = str(resolved.path)
    model.eval()
    model.requires_grad_(False)
    if kernels == "exact":
        hold_exact(model)
    share = share_of_loaded(model)
    if quantization.bits == 4 and share.warning:
        logger.warning("base %s: %s", resolved.source, share.warning)
    if per_row(model):
        logger.info("base %s: rotary frequencies depend on length, and are chosen for each row", resolved.source)
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
        attention=attention,
        from_cache=from_cache,
        prequantized=prequantized,
        towers=towers,
        kernels=kernels,
        share_4bit=share.share,
    )


def base_attention(
    resolved: ResolvedBase, quantization: QuantizationSpec, requested: str = "auto", *, device: str | None = None
) -> ResolvedAttention:
    """The attention implementation that `load_base` would choose with these arguments.

    Raises:
        AssetError: The architecture has no causal language model.
        ConfigError: The requested one is not supported.
    """
    target = torch.device(device) if device is not None else default_device()
    dtype = resolve_dtype(target, quantization.bnb_4bit_compute_dtype).dtype
    return _attention(read_json(resolved.path / "config.json"), target, dtype, requested, resolved.path, False)


def _attention(
    config: Any, device: torch.device, dtype: torch.dtype, requested: str, path: Path, towers: bool
) -> ResolvedAttention:
    try:
        model_class = loading_of(config_from(config), towers=towers).wrapped
    except ConfigError as error:
        raise AssetError(f"base {path} cannot be loaded: {error}") from error
    if model_class is None:
        raise AssetError(
            f"base {path} cannot be loaded: there is no causal language model of type {config.get('model_type')!r}"
        )
    return resolve_attention(model_class, device, dtype, requested)


def bnb_config(quantization: QuantizationSpec, compute_dtype: torch.dtype, config: Any) -> Any:
    """The quantization settings for transformers, with the compute dtype resolved; None for an unquantized base.

    `config` is the base's configuration, or the content of its `config.json`.
    """
    if quantization.bits is None:
        return None
    skipped = never_quantized(config_from(config))
    compute = {"bnb_4bit_compute_dtype": compute_dtype} if quantization.bits == 4 else {}
    return BitsAndBytesConfig(**quantization.effective(), **compute, llm_int8_skip_modules=skipped)


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer from a base's directory.

    Raises:
        AssetError: transformers cannot load one.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AssetError(f"the tokenizer of {path} cannot be loaded: {error}") from error


def _load_model(path: Path, dtype: torch.dtype, device: torch.device, attention: str, config: Any, towers: bool) -> Any:
    arguments: dict[str, Any] = {} if config is None else {"quantization_config": config}
    index = device.index if device.index is not None else 0
    loading = loading_of(config_from(read_json(path / "config.json")), towers=towers)
    if loading.config is not None:
        arguments |= {"config": loading.config, "key_mapping": loading.key_mapping}
    try:
        model, info = (loading.model_class or AutoModelForCausalLM).from_pretrained(
            str(path),
            dtype=dtype,
            device_map={"": "cpu" if device.type == "cpu" else index},
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **({} if loading.model_class else {"trust_remote_code": False}),
            **arguments,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise AssetError(f"base {path} cannot be loaded: {error}") from error
    # transformers fills missing tensors with random numbers and only logs it.
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched:
        raise AssetError(
            f"base {path} is incomplete: missing tensors {missing[:5]}, mismatched {mismatched[:5]} "
            f"({len(missing)} and {len(mismatched)} in all); fetch it again"
        )
    return model


def cast_modules(model: Any, dtype: torch.dtype) -> None:
    """Cast what is not quantized, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(dtype)


def _load_cached(path: Path, dtype: torch.dtype, device: torch.device, attention: str, towers: bool) -> Any:
    with experts_as_saved():
        return _load_model(path, dtype, device, attention, None, towers)


def config_from(source: Any) -> Any:
    """Build a transformers configuration from the content of a `config.json`; return a configuration unchanged.

    Raises:
        ConfigError: `model_type` is missing, or this transformers does not know it, or a value is not valid.
    """
    if not isinstance(source, Mapping):
        return source
    model_type = source.get("model_type")
    if model_type is None:
        raise ConfigError(
            "the base's config.json has no model_type, so its architecture is unknown; use a base that has one"
        )
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"the installed transformers does not know the base's model_type {model_type!r}; upgrade transformers "
            "(models that need their own code are never loaded)"
        )
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[model_type].from_dict(_with_infinities(dict(source)))
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"the base's config.json is not valid for {model_type!r}: {error}") from error


def _with_infinities(value: Any) -> Any:
    """Replace what transformers writes for numbers that JSON lacks: `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_infinities(entry) for key, entry in value.items()}
    return [_with_infinities(entry) for entry in value] if isinstance(value, list) else value


def skeleton(config: Any, *, towers: bool = False) -> Any:
    """Build an unquantized causal language model without weights from a configuration (or a `config.json`'s content).

    It has the towers of a multimodal wrapper only with `towers`.

    Raises:
        ConfigError: No causal language model exists for it.
    """
    config = copy.deepcopy(config_from(config))
    # A quantized base's modules have the shapes of the unquantized ones.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"), quiet_transformers():
            model = build(config, towers=towers)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"there is no causal language model of type {config.model_type!r}: {error}") from error
    model.tie_weights()
    return model.eval()


def linear_modules(model: Any) -> dict[str, tuple[int, int]]:
    """Every linear layer that LoRA can target, by full name, as (in_features, out_features); not the head.

    For an adapted model: the base's layers, under their original names.
    """
    head = model.get_output_embeddings()
    layers: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if is_conv1d(module):
            layers[name] = (int(module.weight.shape[0]), int(module.weight.shape[1]))
            continue
        linear = isinstance(module, torch.nn.Linear) and not is_router(module)
        plain = linear and module is not head and not _inside(name, layers)
        if plain or is_adapted_linear(module):
            layers[name] = (int(module.in_features), int(module.out_features))
    return layers


def _inside(name: str, layers: Mapping[str, Any]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in layers for end in range(1, len(parts)))
