"""Estimates of parameters, bytes and peak memory of an arm, from the base's configuration alone.

A LoRA adapter of rank r on a linear layer has r * (in_features + out_features) parameters (Hu et al. 2021, 4.1).

Letters: `H` hidden size, `Q` heads * head size, `K` key-value heads * head size, `F` intermediate size, `R` rank, `S`
supervised positions, `V` vocabulary.

Activations that one decoder layer keeps for the backward pass, for each token. The frozen linear layers keep nothing:

| what | numbers |
|---|---|
| inputs of the two norms, and one number each | 2 H + 2, in fp32 |
| attention: queries, keys, values and result, and one number per head | 2 Q + 2 K + heads |
| if one layer computes queries, keys and values, the values keep all of its output | Q + K more |
| gated feed-forward: gate and up (lean); otherwise also the activation | 2 F, or 3 F |
| feed-forward without a gate: the activation's input | F |
| inputs of layers with adapters, each distinct one once | H, Q, F |
| dropout masks on a CPU, for each module and arm with dropout | one byte per feature |
| x A^T of each adapter | R |

With gradient checkpointing each layer keeps its input, and one layer at a time keeps everything. The temporary tensors
of one layer's backward pass come on top. Logits are there for a chunk of tokens, twice in fp32 (`modeling.lora.loss`).
Where an architecture changes them after its head, those of all tokens are there with their gradient, and those of
supervised tokens three times in fp32 (logits, log-softmax, gradient), in 16 bit twice more. The benchmarks page
compares the estimates with measured peaks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.assets.layout import read_json
from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.module_names import in_tower, layer_of, layer_sums
from rankwise.experiment.schema import LoraSpec, QuantizationSpec
from rankwise.modeling.attention import check_attention
from rankwise.modeling.base import (
    DTYPES,
    default_device,
    linear_modules,
    quantized_linear_bytes,
    resolve_dtype,
    skeleton,
)
from rankwise.modeling.lora.lean import is_lean
from rankwise.modeling.lora.loss import BYTES as LOGIT_BYTES
from rankwise.modeling.lora.loss import chunk_rows
from rankwise.modeling.prequantized import check_stored_quantization
from rankwise.modeling.quantized_share import quantizable, share_of_skeleton

_FLOAT32, _BFLOAT16 = 4, 2
# Weight, gradient and AdamW's two moments per adapter parameter, in float32.
_TRAINING_BYTES = 16
CPU_PROCESS_BYTES = 720 << 20
"""What a worker's process takes on a CPU besides weights and activations: Python, libraries, rows (measured)."""


@dataclass(frozen=True, kw_only=True)
class BaseEstimate:
    """Size of a base.

    `bytes_quantized`: linear layers quantized, the rest in 16 bit; `bytes_loaded`: the rest in the dtype loaded here;
    `share_4bit`: share of the weights that are in 4 bit (`modeling.quantized_share`), 0 for another quantization.
    """

    parameters: int
    bytes_fp32: int
    bytes_bf16: int
    bytes_quantized: int
    bytes_loaded: int
    share_4bit: float


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
    """Estimates for one arm.

    Attributes:
        targets: In the model's order.
        adapter_parameters_per_layer: None if layers differ.
        process_bytes: Python, libraries and rows; 0 for a GPU, whose memory they do not take.
        memory_bytes: The process, the base as loaded here, the adapter's weights, gradients and optimizer state; no
            activations.
        memory_inference_bytes: Base as loaded here, plus the adapter's weights.
    """

    base: BaseEstimate
    targets: tuple[TargetEstimate, ...]
    adapter_parameters: int
    adapter_bytes_fp32: int
    adapter_parameters_per_layer: int | None
    process_bytes: int
    memory_bytes: int
    memory_inference_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The numbers that `plan --json` prints, without the targets."""
        return {
            "adapter_parameters": self.adapter_parameters,
            "adapter_bytes_fp32": self.adapter_bytes_fp32,
            "adapter_parameters_per_layer": self.adapter_parameters_per_layer,
            **{f"base_{name}": value for name, value in asdict(self.base).items()},
            "process_bytes": self.process_bytes,
            "memory_bytes": self.memory_bytes,
        }


def _head(model: Any) -> dict[str, tuple[int, int]]:
    """The head's name with (in_features, out_features): peft adapts it if it is named."""
    head = model.get_output_embeddings()
    return {
        name: (int(module.in_features), int(module.out_features))
        for name, module in model.named_modules()
        if module is head and hasattr(module, "in_features")
    }


class Estimator:
    """Estimates for the arms of one base; the model without weights is built once.

    `config` is the content of a `config.json`, its path, its directory, or a transformers configuration.

    Raises:
        ConfigError: The architecture is unknown or not a causal language model.
    """

    def __init__(self, config: Any, *, towers: bool = False) -> None:
        """Build the model without weights; with `towers`, all of a multimodal wrapper."""
        self._config = read_config(config)
        self._model = skeleton(self._config, towers=towers)
        self.linear = linear_modules(self._model)
        self.with_head = {**self.linear, **_head(self._model)}
        self._quantizable = quantizable(self._model, self._config)
        self.share = share_of_skeleton(self._model, self._config)
        self._parameters: int = sum(parameter.numel() for parameter in self._model.parameters())
        # Such as tables of rotary embeddings, in the architecture's dtype.
        self._buffers: int = sum(buffer.numel() * buffer.element_size() for buffer in self._model.buffers())

    def check_attention(self, requested: str) -> None:
        """Check that the architecture supports an attention implementation, on whatever device.

        Raises:
            ConfigError: It does not.
        """
        check_attention(type(self._model), requested)

    def check_quantization(self, requested: QuantizationSpec, source: str) -> None:
        """Check that a base whose files are quantized is requested as it is.

        Raises:
            ConfigError: It is not.
        """
        if isinstance(self._config, Mapping):
            check_stored_quantization(self._config, requested, source)

    def arm(self, lora: LoraSpec, quantization: QuantizationSpec, *, module_dtype: str | None = None) -> Estimate:
        """Estimate one arm. `module_dtype` (of unquantized modules) defaults to what this machine would load.

        Raises:
            ConfigError: A target module does not exist; the message lists the existing ones.
        """
        targets = tuple(
            TargetEstimate(module=name, lora_A=(lora.r, inputs), lora_B=(outputs, lora.r))
            for name, (inputs, outputs) in match_targets(self.linear, lora.target_modules).items()
        )
        parameters = sum(target.parameters for target in targets)
        base = self.base(quantization, module_dtype=module_dtype)
        process = CPU_PROCESS_BYTES if default_device().type == "cpu" else 0
        layers = set(layer_sums((target.module, target.parameters) for target in targets).values())
        return Estimate(
            base=base,
            targets=targets,
            adapter_parameters=parameters,
            adapter_bytes_fp32=_FLOAT32 * parameters,
            adapter_parameters_per_layer=layers.pop() if len(layers) == 1 else None,
            process_bytes=process,
            memory_bytes=process + base.bytes_loaded + _TRAINING_BYTES * parameters,
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
            share_4bit=self.share.share if quantization.bits == 4 else 0.0,
        )

    def _bytes(self, quantization: QuantizationSpec, itemsize: int) -> int:
        if quantization.bits is None:
            return itemsize * self._parameters
        quantized = [shape for _, shape in self._quantizable]
        rest: int = self._parameters - sum(inputs * outputs for inputs, outputs in quantized)
        return itemsize * rest + sum(
            quantized_linear_bytes(
                inputs * outputs,
                bits=quantization.bits,
                double_quant=quantization.bnb_4bit_use_double_quant,
                out_features=outputs,
            )
            for inputs, outputs in quantized
        )


def read_config(config: Any) -> Any:
    """Read a configuration given as a path to a file or directory; return anything else unchanged.

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
    """Select the linear layers that target names match: a name matches every layer ending in it, as in peft.

    `targets` are names or `all-linear`.

    Raises:
        ConfigError: A name matches no linear layer.
    """
    if targets == "all-linear":
        return {module: shape for module, shape in linear.items() if not in_tower(module)}
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
    if in_tower(module) and not in_tower(target):
        return False
    return module == target or module.endswith("." + target)


_FLOAT32_BYTES = 4
_BACKWARD_FEATURES = 3
"""Gradients of feed-forward width alive at once in a layer's backward pass, beside two of hidden width."""


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """An adapter as a forward pass sees it; `inputs` maps each adapted module to its input features."""

    inputs: Mapping[str, int]
    r: int
    dropout: bool


@dataclass(frozen=True, kw_only=True)
class ActivationShape:
    """Sizes of a causal language model that determine its activations, as counts of numbers (letters as above).

    Attributes:
        fused: Whether one layer computes queries, keys and values.
        intermediate: `F`, times the experts per token.
        lean: Whether the lean feed-forward saves one tensor of it.
        keeps_masks: Whether dropout masks are kept (CPU) or looked up again (CUDA).
        direct: Whether the head is applied to supervised positions alone.
    """

    layers: int
    hidden: int
    heads: int
    attention: int
    keys: int
    fused: bool
    intermediate: int
    gated: bool
    lean: bool
    vocabulary: int
    itemsize: int
    keeps_masks: bool
    direct: bool

    @classmethod
    def of(
        cls,
        config: Any,
        linear: Mapping[str, tuple[int, int]],
        *,
        itemsize: int,
        cpu: bool,
        lean: bool | None = None,
        direct: bool = True,
    ) -> ActivationShape:
        """Derive the sizes from a transformers configuration and its linear layers (which show a gate).

        `lean` and `direct` are what was found of the loaded model, where that is known.
        """
        text = config.get_text_config()
        hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
        head = int(getattr(text, "head_dim", None) or hidden // heads)
        width = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
        intermediate = max(width) if isinstance(width, list | tuple) else int(width)  # Gemma 3n has one for each layer.
        experts = int(getattr(text, "num_experts_per_tok", None) or 1)
        keys = int(getattr(text, "num_key_value_heads", None) or heads) * head
        first = {name: outputs for name, (_, outputs) in linear.items() if layer_of(name) == 0}
        widths = [outputs for name, outputs in first.items() if "mlp" in name]
        others = [outputs for name, outputs in first.items() if "mlp" not in name]
        return cls(
            layers=int(text.num_hidden_layers),
            hidden=hidden,
            heads=heads,
            attention=heads * head,
            keys=keys,
            fused=heads * head + 2 * keys in others,
            intermediate=experts * intermediate,
            gated=sum(widths) >= 2 * intermediate or experts > 1,
            lean=experts == 1 and is_lean(linear) if lean is None else lean,
            vocabulary=int(text.vocab_size),
            itemsize=itemsize,
            keeps_masks=cpu,
            direct=direct,
        )

    def peak(
        self, passes: Iterable[tuple[int, int, AdapterShape]], positions: int, *, gradient_checkpointing: bool
    ) -> tuple[int, int]:
        """Bytes of activations and of logits when their sum is largest.

        That is either at the end of the forward pass, or in the last layer's backward pass, after the logits are freed.
        `passes` holds, for each arm, its rows, the tokens of the pass's longest row, and its adapter.
        """
        passes = list(passes)
        tokens = sum(rows * length for rows, length, _ in passes)
        adapted = {
            (module.rpartition(".")[0], size) for _, _, adapter in passes for module, size in adapter.inputs.items()
        }
        inputs = sum(size for module, size in adapted)
        feed_forward = (2 if self.lean else 3 if self.gated else 1) * self.intermediate
        attention = (3 if self.fused else 2) * (self.attention + self.keys)
        layer = tokens * (_FLOAT32_BYTES * (2 * self.hidden + 2) + self.itemsize * (attention + feed_forward))
        layer += tokens * _FLOAT32_BYTES * self.heads
        adapters = tokens * self.itemsize * inputs
        for rows, length, adapter in passes:
            adapters += rows * length * self.itemsize * adapter.r * len(adapter.inputs)
            if adapter.dropout and self.keeps_masks:
                adapters += rows * length * sum(adapter.inputs.values())
        backward = tokens * self.itemsize * (_BACKWARD_FEATURES * self.intermediate + 2 * self.hidden)
        kept = self.layers * layer + adapters
        if gradient_checkpointing:
            kept = self.layers * tokens * self.itemsize * self.hidden
            backward += layer + adapters // self.layers
        logits = self.logits(positions, tokens)
        return kept + max(0, backward - logits), logits

    def logits(self, positions: int, tokens: int) -> int:
        """Peak bytes of the logits of so many positions among so many tokens, with hidden states' gradients."""
        if self.direct:
            chunk = min(positions, chunk_rows(self.vocabulary, torch.device("cpu" if self.keeps_masks else "cuda")))
            return chunk * self.vocabulary * LOGIT_BYTES + 2 * positions * self.hidden * self.itemsize
        own = 0 if self.itemsize == _FLOAT32_BYTES else 2 * self.itemsize
        return self.vocabulary * (2 * tokens * self.itemsize + positions * (3 * _FLOAT32_BYTES + own))
