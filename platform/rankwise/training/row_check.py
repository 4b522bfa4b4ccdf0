"""Whether a row of a batch computes what it computes alone, tried once for each model.

Rows of all lengths share passes because causal attention does not see padding. An architecture whose rows depend on
their neighbours in another way would make arms depend on each other; its rows go through separate passes.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch

from rankwise.exceptions import is_out_of_memory
from rankwise.modeling.length_limits import affordable_tokens, length_limits, probe_lengths
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import install
from rankwise.modeling.rope import rope_scaling, row_lengths

logger = logging.getLogger(__name__)

# Relative to the largest logit, as in the decoding engine's check.
_SAME = {torch.float32: 1e-3}
_SAME_IN_16_BIT = 5e-2
_LOWERED = 8
_INDEPENDENT: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def rows_are_independent(model: Any, logits: SupervisedLogits) -> bool:
    """Whether rows on both sides of every length limit give the same logits in one batch as alone; logged if not."""
    independent = _INDEPENDENT.get(model)
    if independent is None:
        independent = _INDEPENDENT[model] = _try(model, logits)
    return independent


def _try(model: Any, logits: SupervisedLogits) -> bool:
    try:
        worst = _difference(model, logits, probe_lengths(model, length_limits(model.config)))
        rope = rope_scaling(model)
        if any(limit + 3 > affordable_tokens(model) for limit in rope.limits):
            with rope.lowered(_LOWERED):
                worst = max(worst, _difference(model, logits, [4, _LOWERED - 1, _LOWERED + 3]))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("%s: out of memory while trying whether rows depend on their neighbours", type(model).__name__)
        return True
    # LLM.int8 chooses outliers over all rows, which is documented.
    exact = next(model.parameters()).dtype == torch.float32 and not _in_8_bit(model)
    limit = _SAME[torch.float32] if exact else _SAME_IN_16_BIT
    if worst <= limit:
        return True
    logger.warning(
        "%s: a row's logits depend on its neighbours (by %.3g of the largest, limit %g), so rows of different lengths "
        "go through separate passes, which is slower",
        type(model).__name__,
        worst,
        limit,
    )
    return False


@torch.no_grad()
def _difference(model: Any, logits: SupervisedLogits, lengths: Sequence[int]) -> float:
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = [(torch.arange(length) * 89 + 7 * index) % vocabulary for index, length in enumerate(lengths)]
    together = _last_logits(model, logits, rows, device)
    worst = 0.0
    for index, row in enumerate(rows):
        alone = _last_logits(model, logits, [row], device)[0]
        far = float((alone - together[index]).abs().max() / alone.abs().max())
        worst = math.inf if math.isnan(far) else max(worst, far)
    return worst


def _last_logits(
    model: Any, logits: SupervisedLogits, rows: Sequence[torch.Tensor], device: torch.device
) -> torch.Tensor:
    lengths = [len(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    with install(model).segments([]), row_lengths(model, lengths):
        at = torch.arange(len(rows), device=device)
        return logits(ids, mask, at, torch.tensor(lengths, device=device) - 1)


def _in_8_bit(model: Any) -> bool:
    return any(isinstance(module, bnb.nn.Linear8bitLt) for module in model.modules())
