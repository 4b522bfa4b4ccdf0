"""Logits at chosen positions only: a prompt's logits are most of the memory of a step, and no loss needs them.

Letters: `B` rows, `T` tokens, `D` model, `S` chosen positions over all rows, `V` vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from rankwise.modeling.packed_lora import install

logger = logging.getLogger(__name__)

# Settings with which transformers' architectures change logits after the head (Cohere, Gemma, Granite, MiniCPM).
_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")


class SupervisedLogits:
    """Computes logits (S, V) for chosen positions of a batch.

    The head is applied to the hidden states of these positions alone, where that is what the model's own forward does.
    Some architectures scale or cap logits after the head; so the two ways are compared once, on the same hidden states
    and shapes, and have to agree to the bit. Where they do not, the model's own forward runs with all logits, which is
    logged.

    Attributes:
        direct: Whether the head is applied to the chosen positions alone.
    """

    def __init__(self, model: Any) -> None:
        """Compare the two ways on a few tokens of the bare base."""
        self._model = model
        self._backbone = model.base_model
        self._head = model.get_output_embeddings()
        self.direct = self._is_direct()

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Run the model.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T).
            rows: (S,) row of each chosen position.
            positions: (S,) position in that row; its logits are those of the token after it.

        Returns:
            (S, V) in fp32.
        """
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
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
