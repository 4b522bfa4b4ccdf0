"""Which models the engine of `continuous.py` fits: found out by a comparison, once for each model.

An engine is compared with the model's own forward, logits against logits. Attention over a window, or a state in place
of keys and values, shows too late for that, and is known by what transformers keeps for it; such models are left to
`generation.generate_batch`.
"""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rankwise.modeling.continuous import Engine, Flight, Row
from rankwise.modeling.out_of_memory import is_out_of_memory
from rankwise.modeling.pass_lock import pass_lock

logger = logging.getLogger(__name__)

# Of the largest logit: what other kernels round in another way stays below, a wrong position or mask does not.
_SAME = {torch.float32: 1e-3}
_SAME_IN_16_BIT = 5e-2


@dataclass(frozen=True)
class _Known:
    """What was found out about a model."""

    reason: str | None


_KNOWN: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()
_FINDING = Lock()


def engine_of(model: Any) -> Engine | None:
    """An engine for a model; None for a model of a kind that it does not fit, which is logged once."""
    with _FINDING:
        known = _KNOWN.get(model)
        if known is None:
            known = _KNOWN[model] = _Known(_misfit(Engine(model, pass_lock(model))))
            if known.reason:
                logger.warning(
                    "%s is decoded by transformers' generate in batches, more slowly: %s",
                    type(model).__name__,
                    known.reason,
                )
    return Engine(model, pass_lock(model)) if known.reason is None else None


def _misfit(engine: Engine) -> str | None:
    """Why an engine cannot take its model; None if it can."""
    model = engine.model
    attention = model.config._attn_implementation
    if attention not in {"sdpa", "eager"}:
        return f"its attention is {attention}"
    try:
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if kinds != {DynamicLayer}:
            return f"its layers keep {', '.join(sorted(kind.__name__ for kind in kinds))}"
        difference = _difference(engine)
    except Exception as error:
        # What a model does in a trial that it was not made for cannot be foretold; that memory ran out says nothing.
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    limit = _SAME.get(next(model.parameters()).dtype, _SAME_IN_16_BIT)
    return None if difference <= limit else f"logits differ by {difference:.3g} of the largest"


@torch.no_grad()
def _difference(engine: Engine) -> float:
    """How far logits are from those of the model's own forward: two prompts of different lengths, two steps."""
    vocabulary = engine.model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(9) * 97 % vocabulary).tolist()
    rows = [Row(index=0, prompt=tokens[:7], adapter=None), Row(index=1, prompt=tokens[3:7], adapter=None)]
    flight = Flight(engine, slots=2, adapters=())
    flight.enter(rows)
    ours = []
    for token in tokens[7:]:
        ours.append(flight.logits().float())
        for row in rows:
            row.made.append(token)
    worst = 0.0
    for at, row in enumerate(rows):
        whole = torch.tensor([[*row.prompt, *row.made[:-1]]], device=engine.device)
        with engine.running(()):
            own = engine.model(input_ids=whole, use_cache=False).logits[0, -2:].float()
        mine = torch.stack([step[at] for step in ours])
        far = float((own - mine).abs().max() / own.abs().max())
        # Not by `max` alone, which keeps the first of two where one is NaN.
        worst = math.inf if math.isnan(far) else max(worst, far)
    return worst
