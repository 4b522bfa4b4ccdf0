"""Computes logits at supervised positions only: a prompt's logits take most of a step's memory, and no loss needs them.

Letters: `B` rows, `T` tokens, `D` model, `S` chosen positions over all rows, `V` vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from rankwise.compat.transformers import known_packing
from rankwise.modeling.lora.packed import install

logger = logging.getLogger(__name__)

# How much hidden states may differ between a batch with a mask for its padding and one without, relative to the
# largest: other kernels round in another way, a layer that looks at padding differs by as much as the numbers do.
_SAME = {torch.float32: 1e-4}
_SAME_IN_16_BIT = 3e-2
# Settings with which transformers' architectures change logits after the head (Cohere, Gemma, Granite, MiniCPM).
_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


class SupervisedLogits:
    """Computes logits (S, V) for chosen positions of a batch.

    The head is applied to the hidden states of these positions alone, where that is what the model's own forward does.
    Some architectures scale or cap logits after the head; so the two ways are compared once, on the same hidden states
    and shapes, and have to agree to the bit. Where they do not, the model's own forward runs with all logits, which is
    logged.

    Rows are padded on the right, so under causal attention no token of a row can see its padding: the mask of padding
    is left out, which saves a matrix of T by T numbers a row and layer, and lets attention run in its fastest kernels.
    That is compared once, too, and where padding does make a difference the mask is given.

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
        arguments = {"input_ids": input_ids, "use_cache": False}
        if self.masked:
            arguments["attention_mask"] = attention_mask
        with known_packing(None):
            if self.direct:
                hidden = self._backbone(**arguments).last_hidden_state
                logits = self._head(hidden[rows, positions])
            else:
                logits = self._model(**arguments).logits[rows, positions]
        return logits.float()  # type: ignore[no-any-return]

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
        arguments = {"input_ids": tokens, "use_cache": False, "output_hidden_states": True}
        with install(self._model).segments([]):
            given, left_out = (
                self._model(**arguments, attention_mask=each).hidden_states[-1][mask.bool()] for each in (mask, None)
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
