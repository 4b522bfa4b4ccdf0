"""What an arm will take, from the base's configuration alone: parameters, bytes, memory. No weight is read.

A LoRA adapter of rank r on a linear layer has r * (in_features + out_features) parameters (Hu et al. 2021, 4.1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.layout import read_json
from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.module_names import layer_sums
from rankwise.experiment.schema import LoraSpec, QuantizationSpec
from rankwise.modeling.dtype import DTYPES, default_device, resolve_dtype
from rankwise.modeling.memory import quantized_linear_bytes
from rankwise.modeling.skeleton import linear_modules, skeleton

_FLOAT32, _BFLOAT16 = 4, 2
# Weight, gradient and AdamW's two moments of each adapter parameter, all in float32.
_TRAINING_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class BaseEstimate:
    """A base's size.

    Attributes:
        parameters: All parameters, those that are shared counted once.
        bytes_fp32: In full precision.
        bytes_bf16: In 16 bit.
        bytes_quantized: Linear layers quantized, everything else in 16 bit.
        bytes_loaded: Linear layers quantized, everything else in the dtype that is loaded on this machine.
    """

    parameters: int
    bytes_fp32: int
    bytes_bf16: int
    bytes_quantized: int
    bytes_loaded: int


@dataclass(frozen=True, kw_only=True)
class TargetEstimate:
    """One linear layer with an adapter: `lora_A` is (r, in_features), `lora_B` is (out_features, r)."""

    module: str
    lora_A: tuple[int, int]
    lora_B: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Rank times the sum of the layer's inputs and outputs."""
        return self.lora_A[0] * self.lora_A[1] + self.lora_B[0] * self.lora_B[1]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimates of one arm.

    Attributes:
        base: The base's size.
        targets: The adapted layers, in the model's order.
        adapter_parameters: Over all targets.
        adapter_bytes_fp32: Of the adapter's tensors, as they are stored.
        adapter_parameters_per_layer: Of each layer; None where layers differ.
        memory_bytes: The base as loaded here, and the adapter's weights, gradients and optimizer. Activations come on
            top: they depend on rows and lengths.
        memory_inference_bytes: The base as loaded here, and the adapter's weights.
    """

    base: BaseEstimate
    targets: tuple[TargetEstimate, ...]
    adapter_parameters: int
    adapter_bytes_fp32: int
    adapter_parameters_per_layer: int | None
    memory_bytes: int
    memory_inference_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The numbers as `plan --json` gives them, without the targets."""
        return {
            "adapter_parameters": self.adapter_parameters,
            "adapter_bytes_fp32": self.adapter_bytes_fp32,
            "adapter_parameters_per_layer": self.adapter_parameters_per_layer,
            **{f"base_{name}": value for name, value in asdict(self.base).items()},
            "memory_bytes": self.memory_bytes,
        }


class Estimator:
    """Estimates for the arms of one base: the model without weights is built once.

    Args:
        config: The content of a `config.json`, the file, the directory that has it, or a transformers configuration.

    Raises:
        ConfigError: The architecture is not known, or is no causal language model.
    """

    def __init__(self, config: Any) -> None:
        """Build the model without weights."""
        self._model = skeleton(read_config(config))
        self.linear = linear_modules(self._model)
        self._parameters: int = sum(parameter.numel() for parameter in self._model.parameters())
        # Tables such as those of rotary embeddings, in the dtype that the architecture gives them.
        self._buffers: int = sum(buffer.numel() * buffer.element_size() for buffer in self._model.buffers())

    def arm(self, lora: LoraSpec, quantization: QuantizationSpec, *, module_dtype: str | None = None) -> Estimate:
        """Estimate one arm.

        Args:
            lora: Rank and target modules.
            quantization: Of the base.
            module_dtype: Of the modules that are not quantized; what this machine would load when left out.

        Raises:
            ConfigError: A target module does not exist; the message lists those that do.
        """
        targets = tuple(
            TargetEstimate(module=name, lora_A=(lora.r, inputs), lora_B=(outputs, lora.r))
            for name, (inputs, outputs) in match_targets(self.linear, lora.target_modules).items()
        )
        parameters = sum(target.parameters for target in targets)
        base = self.base(quantization, module_dtype=module_dtype)
        layers = set(layer_sums((target.module, target.parameters) for target in targets).values())
        return Estimate(
            base=base,
            targets=targets,
            adapter_parameters=parameters,
            adapter_bytes_fp32=_FLOAT32 * parameters,
            adapter_parameters_per_layer=layers.pop() if len(layers) == 1 else None,
            memory_bytes=base.bytes_loaded + _TRAINING_BYTES * parameters,
            memory_inference_bytes=base.bytes_loaded + _FLOAT32 * parameters,
        )

    def base(self, quantization: QuantizationSpec, *, module_dtype: str | None = None) -> BaseEstimate:
        """Estimate the base alone; arguments as for `arm`."""
        dtype = module_dtype or resolve_dtype(default_device(), quantization.bnb_4bit_compute_dtype).name
        return BaseEstimate(
            parameters=self._parameters,
            bytes_fp32=_FLOAT32 * self._parameters,
            bytes_bf16=_BFLOAT16 * self._parameters,
            bytes_quantized=self._bytes(quantization, _BFLOAT16),
            bytes_loaded=self._bytes(quantization, DTYPES[dtype].itemsize) + self._buffers,
        )

    def _bytes(self, quantization: QuantizationSpec, itemsize: int) -> int:
        if not (quantization.load_in_4bit or quantization.load_in_8bit):
            return itemsize * self._parameters
        quantized = self.linear.values()
        rest: int = self._parameters - sum(inputs * outputs for inputs, outputs in quantized)
        return itemsize * rest + sum(
            quantized_linear_bytes(
                inputs * outputs,
                bits=4 if quantization.load_in_4bit else 8,
                double_quant=quantization.bnb_4bit_use_double_quant,
                out_features=outputs,
            )
            for inputs, outputs in quantized
        )


def estimate_arm(
    config: Any, lora: LoraSpec, quantization: QuantizationSpec, *, module_dtype: str | None = None
) -> Estimate:
    """Estimate one arm; see `Estimator` for several arms over one base.

    Raises:
        ConfigError: The architecture or a target module is not known.
    """
    return Estimator(config).arm(lora, quantization, module_dtype=module_dtype)


def read_config(config: Any) -> Any:
    """The content of a configuration that is given as a path to a file or to a directory; anything else as it is.

    Raises:
        ConfigError: The file cannot be read.
    """
    if not isinstance(config, str | Path):
        return config
    path = Path(config)
    try:
        return read_json(path / "config.json" if path.is_dir() else path)
    except AssetError as error:
        raise ConfigError(f"the base's configuration: {error}") from error


def match_targets(linear: Mapping[str, tuple[int, int]], targets: Iterable[str] | str) -> dict[str, tuple[int, int]]:
    """The linear layers that target names mean: a name stands for every layer that ends in it, as in peft.

    Args:
        linear: Full names and (in_features, out_features), of `linear_modules`.
        targets: Names, or `all-linear`.

    Raises:
        ConfigError: A name stands for no linear layer.
    """
    if targets == "all-linear":
        return dict(linear)
    names = [targets] if isinstance(targets, str) else list(targets)
    unknown = [name for name in names if not any(_means(name, module) for module in linear)]
    if unknown:
        known = sorted({module.rsplit(".", 1)[-1] for module in linear})
        problems = []
        for name in unknown:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(
                f"lora.target_modules: the base has no linear layer {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
                + f" It has {', '.join(known)}"
            )
        raise ConfigError("\n".join(problems), tuple(problems))
    return {module: shape for module, shape in linear.items() if any(_means(name, module) for name in names)}


def _means(target: str, module: str) -> bool:
    return module == target or module.endswith("." + target)
