"""Run a base with the adapters of many rows: evaluation mode, rows to segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rankwise.modeling.packed_lora import Segment


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Hold a model in evaluation mode, and give it back as it was."""
    # Left alone when it is in evaluation mode already: bitsandbytes may repack 4-bit weights on a change of mode.
    was_training = bool(model.training)
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def segments_of(model: Any, adapters: Sequence[str | None], lengths: Sequence[int] | None = None) -> list[Segment]:
    """One segment for each run of neighbouring rows with the same adapter, without dropout.

    Args:
        model: The model that the adapters are attached to.
        adapters: The adapter of each row; None is the bare base.
        lengths: Tokens of each row, padded on the right; left out when padding is on the left.

    Raises:
        ValueError: An adapter is not attached to the model: its rows would run as the bare base, unseen.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    attached = set(getattr(inner, "peft_config", {}))
    unknown = sorted({name for name in adapters if name is not None} - attached)
    if unknown:
        raise ValueError(
            f"the model has no adapter {', '.join(unknown)}; it has {', '.join(sorted(attached)) or 'none'}"
        )
    segments: list[Segment] = []
    start = 0
    for adapter, rows in groupby(adapters):
        stop = start + sum(1 for _ in rows)
        longest = None if lengths is None else max(lengths[start:stop])
        segments.append(Segment(adapter=adapter, start=start, stop=stop, dropout=None, length=longest))
        start = stop
    return segments
