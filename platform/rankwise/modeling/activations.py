"""What a forward pass keeps for the backward pass, from the model's configuration: no weight is read, nothing is run.

Letters: `H` hidden size, `Q` heads * head size, `K` key-value heads * head size, `F` intermediate size, `R` rank, `S`
supervised positions, `V` vocabulary.

The base is frozen, so its linear layers keep nothing. What one decoder layer keeps for each token:

| what | numbers |
|---|---|
| inputs of the two norms, and a number each | 2 H + 2, in fp32 |
| attention: queries, keys, values and result, and a number a head | 2 Q + 2 K + heads |
| where one layer makes queries, keys and values, the values keep all of its output | Q + K more |
| gated feed-forward: gate and up (`feed_forward`); where that cannot help, the activation too | 2 F, or 3 F |
| feed-forward without a gate: the activation's input | F |
| inputs of layers with adapters, each distinct one once | H, Q, F |
| dropout masks on a CPU, for each module and arm with dropout | a byte for each feature |
| x A^T of each adapter | R |

With gradient checkpointing a layer keeps its input, and one layer at a time has the whole. On top comes what the
backward pass makes and drops inside one layer. Logits are counted three times in fp32: themselves, their log-softmax,
its gradient; in 16 bit twice more for the head's output and its gradient.

Compared with the peak of torch's allocations in a step on a CPU (activations and logits together, estimate / peak):
for SmolLM2-135M with adapters on q, k, v, o (4 arms, 640 tokens) 1.08, with gradient checkpointing 0.99; for tiny bases
of llama's and gpt_neox's kind 1.08 to 1.21.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.experiment.module_names import layer_of
from rankwise.modeling.feed_forward import is_lean

_FLOAT32 = 4
_BACKWARD_FEATURES = 3
"""Gradients of the feed-forward's width that the backward pass of a layer has at once, beside two of the model's."""


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """An adapter as a forward pass sees it.

    Attributes:
        inputs: Module to its input features, for every layer that has the adapter.
        r: Rank.
        dropout: Whether a dropout mask is drawn.
    """

    inputs: Mapping[str, int]
    r: int
    dropout: bool


@dataclass(frozen=True, kw_only=True)
class ActivationShape:
    """The sizes of a causal language model that its activations depend on; sizes are counts of numbers.

    Attributes:
        layers: Decoder layers.
        hidden: `H`.
        heads: Attention heads.
        attention: `Q`.
        keys: `K`.
        fused: Whether one layer makes queries, keys and values.
        intermediate: `F`, times the experts that a token goes to.
        gated: Whether the feed-forward has a gate.
        lean: Whether `feed_forward` keeps a tensor less of it.
        vocabulary: `V`.
        itemsize: Bytes of a number in the model's dtype.
        keeps_masks: Whether dropout masks are kept (CPU) or drawn again (CUDA).
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

    @classmethod
    def of(cls, config: Any, linear: Mapping[str, tuple[int, int]], *, itemsize: int, cpu: bool) -> ActivationShape:
        """Read a model's configuration.

        Args:
            config: A transformers configuration.
            linear: Its linear layers, of `skeleton.linear_modules`; a gate shows in them.
            itemsize: Bytes of a number in the dtype that it computes in.
            cpu: Whether it runs on a CPU.
        """
        text = config.get_text_config()
        hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
        head = int(getattr(text, "head_dim", None) or hidden // heads)
        intermediate = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden)
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
            lean=experts == 1 and is_lean(linear),
            vocabulary=int(text.vocab_size),
            itemsize=itemsize,
            keeps_masks=cpu,
        )

    def peak(
        self, passes: Iterable[tuple[int, int, AdapterShape]], positions: int, *, gradient_checkpointing: bool
    ) -> tuple[int, int]:
        """Bytes of the activations and of the logits when both together are at their largest.

        That is at the end of the forward pass, or in the last layer's backward pass, when the logits have gone.

        Args:
            passes: For each arm of a forward pass its rows, the tokens of the pass's longest row, and its adapter.
            positions: Supervised positions of all of them.
            gradient_checkpointing: Whether layers are run again in the backward pass.
        """
        passes = list(passes)
        tokens = sum(rows * length for rows, length, _ in passes)
        adapted = {(module.rpartition(".")[0], size) for _, _, each in passes for module, size in each.inputs.items()}
        inputs = sum(size for module, size in adapted)
        feed_forward = (2 if self.lean else 3 if self.gated else 1) * self.intermediate
        attention = (3 if self.fused else 2) * (self.attention + self.keys)
        layer = tokens * (_FLOAT32 * (2 * self.hidden + 2) + self.itemsize * (attention + feed_forward))
        layer += tokens * _FLOAT32 * self.heads
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
        logits = self.logits(positions)
        return kept + max(0, backward - logits), logits

    def logits(self, positions: int) -> int:
        """Bytes that the logits of so many positions take at their largest."""
        return positions * self.vocabulary * (3 * _FLOAT32 + (0 if self.itemsize == _FLOAT32 else 2 * self.itemsize))
