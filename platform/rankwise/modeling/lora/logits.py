"""Computes logits at supervised positions only: a prompt's logits take most of a step's memory, and no loss needs them.

Letters: `B` rows, `T` tokens, `D` model, `S` chosen positions over all rows, `V` vocabulary.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional

from rankwise.compat.transformers import known_packing
from rankwise.modeling.lora.loss import head_losses, is_frozen_linear
from rankwise.modeling.lora.packed import install
from rankwise.modeling.rope import rope_scaling

logger = logging.getLogger(__name__)

# How much logits may differ between a batch with a mask for its padding and one without, relative to the
# largest: other kernels round in another way, a layer that looks at padding differs by as much as the numbers do.
_SAME = {torch.float32: 1e-4}
_SAME_IN_16_BIT = 3e-2
# Architectures whose layers keep rows of a shared sequence apart by position ids and mask: compared with separate rows,
# in values and gradients, in `tests/unit/modeling/lora/test_supervised.py`.
PACKING = {
    "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
}  # fmt: skip
# Settings with which transformers' architectures change logits after the head (Cohere, Gemma, Granite, MiniCPM).
_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


class SupervisedLogits:
    """Computes logits (S, V), or losses (S,), for chosen positions of a batch.

    The head is applied to the hidden states of these positions alone, where that is what the model's own forward does.
    Some architectures scale or cap logits after the head; so the two ways are compared once, on the same hidden states
    and shapes, and have to agree to the bit. Where they do not, the model's own forward runs with all logits, which is
    logged.

    Rows are padded on the right, so under causal attention no token of a row can see its padding: the mask of padding
    is left out, which saves a matrix of T by T numbers a row and layer, and lets attention run in its fastest kernels.
    That is compared once, too, and where padding does make a difference the mask is given.

    Rows can share a sequence: positions restart and attention stays within a row. Architectures for which that is known
    to work are listed, and it is compared once with separate rows: layers that carry a state from token to token
    (linear attention, state-space models) would silently mix rows.

    Attributes:
        direct: Whether the head is applied to the chosen positions alone.
        masked: Whether padding has to be masked.
    """

    def __init__(self, model: Any) -> None:
        """Compare the ways on a few tokens of the bare base."""
        self._model = model
        self._backbone = model.base_model
        self._head = model.get_output_embeddings()
        self.direct = self._is_direct()
        self.masked = self._sees_padding()

    @cached_property
    def packs(self) -> bool:
        """Whether rows can share a sequence; the first use compares."""
        reason = self._misses_packing()
        if reason is not None:
            logger.info(
                "%s: rows are padded and do not share sequences: %s keep them apart", type(self._model).__name__, reason
            )
        return reason is None

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, rows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Run the model.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T): 1 on a row's tokens, 0 on its padding on the right. Needed where `masked`.
            rows: (S,) row of each chosen position.
            positions: (S,) position in that row; its logits are those of the token after it.

        Returns:
            (S, V) in fp32.
        """
        logits = self._run(input_ids, attention_mask, rows, positions)
        return (self._head(logits) if self.direct else logits).float()

    def losses(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rows: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        sequences: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the model for losses.

        Args:
            input_ids: As in a call.
            attention_mask: As in a call.
            rows: As in a call.
            positions: As in a call.
            targets: (S,) the token after each chosen position.
            position_ids: (B, T) positions that restart with each row of a shared sequence; None with one row each.
            sequences: (B, T) equal numbers for the tokens of one row; None with one row each.

        Returns:
            Negative log likelihoods (S,) in nats and fp32.
        """
        found = self._run(input_ids, attention_mask, rows, positions, position_ids, sequences)
        if self.direct and is_frozen_linear(self._head):
            return head_losses(found, self._head, targets)
        logits = self._head(found) if self.direct else found
        return functional.cross_entropy(logits.float(), targets, reduction="none")

    def _run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rows: torch.Tensor,
        positions: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        sequences: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of the chosen positions where `direct`, else their logits."""
        arguments = {"input_ids": input_ids, "use_cache": False}
        if self.masked:
            arguments["attention_mask"] = attention_mask
        if position_ids is not None:
            arguments["position_ids"] = position_ids
        with known_packing(sequences):
            if self.direct:
                return self._backbone(**arguments).last_hidden_state[rows, positions]  # type: ignore[no-any-return]
            return self._model(**arguments).logits[rows, positions]  # type: ignore[no-any-return]

    @torch.no_grad()
    def _is_direct(self) -> bool:
        config = self._model.config.get_text_config()
        changing = [name for name in _CHANGES_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
        reason = f"{', '.join(changing)} in its configuration" if changing else ""
        if not reason and (self._backbone is self._model or self._head is None):
            reason = "it has no head of its own"
        if not reason:
            vocabulary = self._head.weight.shape[0]
            tokens = (torch.arange(16, device=self._head.weight.device) * 97 % vocabulary).view(2, 8)
            arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
            with install(self._model).segments([]):
                own = self._model(**arguments).logits
                ours = self._head(self._backbone(**arguments).last_hidden_state)
            if not torch.equal(own, ours):
                reason = f"its own forward differs by up to {float((own - ours).abs().max()):.3g} on a test batch"
        if reason:
            logger.info(
                "%s: all logits are computed, not only those of supervised tokens: %s",
                type(self._model).__name__,
                reason,
            )
        return not reason

    @torch.no_grad()
    def _sees_padding(self) -> bool:
        device = self._model.get_input_embeddings().weight.device
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(24, device=device) * 89 % vocabulary).view(2, 12)
        mask = torch.ones_like(tokens)
        mask[0, 7:] = 0
        arguments = {"input_ids": tokens, "use_cache": False}
        with install(self._model).segments([]):
            given, left_out = (
                self._model(**arguments, attention_mask=each).logits[mask.bool()] for each in (mask, None)
            )
        difference, largest = float((given - left_out).abs().max()), float(given.abs().max())
        if difference <= _SAME.get(given.dtype, _SAME_IN_16_BIT) * largest:
            return False
        logger.info(
            "%s: padding is masked, since its tokens differ by up to %.3g without a mask",
            type(self._model).__name__,
            difference,
        )
        return True

    @torch.no_grad()
    def _misses_packing(self) -> str | None:
        """Why rows cannot share a sequence; None if they can."""
        kind = self._model.config.get_text_config().model_type
        if kind not in PACKING:
            return f"{kind} is not among the architectures that are known to"
        if self.masked:
            return "where padding has to be masked, nothing is known to"
        if rope_scaling(self._model).embeddings:
            return "rotary frequencies that depend on a row's length cannot"
        embedding = self._model.get_input_embeddings().weight
        tokens = (torch.arange(20, device=embedding.device) * 83 % embedding.shape[0])[None]
        lengths = (9, 11)
        positions = torch.cat([torch.arange(length) for length in lengths])[None].to(embedding.device)
        sequences = torch.tensor([0] * lengths[0] + [1] * lengths[1])[None].to(embedding.device)
        arguments = {"use_cache": False, "output_hidden_states": True}
        with install(self._model).segments([]):
            alone = [
                self._model(input_ids=part, **arguments).hidden_states[-1] for part in tokens.split(lengths, dim=1)
            ]
            with known_packing(sequences):
                packed = self._model(input_ids=tokens, position_ids=positions, **arguments).hidden_states[-1]
        apart = torch.cat(alone, dim=1)
        difference = float((packed - apart).abs().max())
        if difference <= _SAME.get(apart.dtype, _SAME_IN_16_BIT) * float(apart.abs().max()):
            return None
        return f"with a difference of up to {difference:.3g} on a test batch, it does not"
