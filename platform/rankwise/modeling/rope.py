"""Rotary scaling that depends on a row's length, computed for each row as if it were alone.

transformers chooses the frequencies of two scalings by the longest position in the batch: `longrope` (Phi-3.5, MiniCPM)
has one set up to the original length and another beyond it, and `dynamic` NTK changes with every length beyond it. Rows
would depend on their neighbours, and keys that were cached before a row reached the limit would not fit its later ones.

`per_row` replaces the forward of such rotary embeddings: rows are grouped by what their lengths require, and the
model's own module runs once for each group. A row's length is, in this order,

1. what `row_lengths` says: batches that are padded on the right have the same positions in all rows;
2. its own largest position plus one.

A module sees the group's length as one more position behind the others, whose result is dropped. So nothing of the
scalings is computed here, except which lengths are alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

LONGROPE, DYNAMIC = "longrope", "dynamic"


class RowLengths:
    """The true lengths of the rows of a model's current batch; None where positions tell them."""

    def __init__(self) -> None:
        self.current: tuple[int, ...] | None = None


class RopeScaling:
    """The rotary embeddings of a model whose frequencies depend on a row's length; usually there are none."""

    def __init__(self, model: Any) -> None:
        """Find them, without changing anything."""
        self.lengths = RowLengths()
        self.embeddings = [_PerRow(module, self.lengths) for module in model.modules() if _scales(module)]

    def key(self, length: int) -> tuple[int, ...]:
        """What frequencies a row of this length needs: rows with equal keys have the same."""
        return tuple(key for embedding in self.embeddings for key in embedding.keys(length))

    def changes(self, first: int, last: int) -> bool:
        """Whether a row that grows from one length to another needs other frequencies on the way."""
        return self.key(first) != self.key(last)

    @contextmanager
    def lowered(self, limit: int) -> Iterator[None]:
        """Let frequencies change at another length inside the block, for a check with rows of a few tokens."""
        with ExitStack() as stack:
            for embedding in self.embeddings:
                stack.enter_context(embedding.lowered(limit))
            yield

    @property
    def limits(self) -> tuple[int, ...]:
        """The largest lengths before frequencies change, sorted."""
        return tuple(sorted({limit for embedding in self.embeddings for limit in embedding.limits}))


_SCALINGS: weakref.WeakKeyDictionary[Any, RopeScaling] = weakref.WeakKeyDictionary()


def rope_scaling(model: Any) -> RopeScaling:
    """The scaling of a transformers model, or of one around which peft has put a model; always the same object."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    scaling = _SCALINGS.get(inner)
    if scaling is None:
        scaling = _SCALINGS[inner] = RopeScaling(inner)
    return scaling


def per_row(model: Any) -> int:
    """Compute a model's rotary scaling for each row from now on; return how many modules that concerns."""
    scaling = rope_scaling(model)
    for embedding in scaling.embeddings:
        embedding.module.forward = embedding
    return len(scaling.embeddings)


@contextmanager
def row_lengths(model: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Set the true lengths of the rows of all forward passes inside the block, where padding is on the right."""
    holder = rope_scaling(model).lengths
    before, holder.current = holder.current, tuple(lengths)
    try:
        yield
    finally:
        holder.current = before


def position_limit(config: Any) -> int | None:
    """How many positions a model of this configuration has; None if it is not limited.

    Dynamic NTK extends the configured ones by its factor.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    parameters = getattr(text, "rope_parameters", None) or {}
    if parameters.get("rope_type") == DYNAMIC:
        return int(limit * float(parameters.get("factor") or 1.0))
    return limit


def _kinds(module: Any) -> dict[str | None, str]:
    """The scalings of a rotary embedding that depend on lengths, by type of layer (None without types)."""
    kinds = getattr(module, "rope_type", None)
    by_type: dict[str | None, str] = {None: kinds} if isinstance(kinds, str) else dict(kinds or {})
    return {
        layer_type: DYNAMIC if DYNAMIC in kind else kind
        for layer_type, kind in by_type.items()
        if DYNAMIC in kind or kind == LONGROPE
    }


def _scales(module: Any) -> bool:
    return isinstance(getattr(module, "rope_type", None), str | dict) and bool(_kinds(module))


class _PerRow:
    """The forward of one rotary embedding."""

    def __init__(self, module: Any, lengths: RowLengths) -> None:
        self.module = module
        self._lengths = lengths
        self._own = module.forward
        self._kinds = _kinds(module)

    @property
    def limits(self) -> list[int]:
        return [self._limit(layer_type) for layer_type in self._kinds]

    @contextmanager
    def lowered(self, limit: int) -> Iterator[None]:
        module, config = self.module, self.module.config
        holders = [(self._parameters(layer_type), "original_max_position_embeddings") for layer_type in self._kinds]
        before = [(holder, key, holder[key]) for holder, key in holders if key in holder]
        positions, original = config.max_position_embeddings, module.original_max_seq_len
        try:
            for holder, key, _ in before:
                holder[key] = limit
            if DYNAMIC in self._kinds.values():
                config.max_position_embeddings = module.original_max_seq_len = limit
            yield
        finally:
            for holder, key, value in before:
                holder[key] = value
            config.max_position_embeddings, module.original_max_seq_len = positions, original

    def keys(self, length: int) -> list[int]:
        return [self._key(length, layer_type) for layer_type in self._kinds]

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        if layer_type not in self._kinds or position_ids.dim() != 2:
            return self._forward(x, position_ids, layer_type)
        lengths = self._lengths.current
        if lengths is None or len(position_ids) not in (1, len(lengths)):
            lengths = tuple((position_ids.amax(dim=-1) + 1).tolist())
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault(self._key(length, layer_type), []).append(row)
        if len(groups) == 1:
            return self._at_length(x, position_ids, next(iter(groups)), layer_type)
        parts = []
        for length, rows in groups.items():
            # The same positions for all rows: one is enough for a group.
            own = position_ids if len(position_ids) == 1 else position_ids[rows]
            parts.append((rows, self._at_length(x, own, length, layer_type)))
        if isinstance(parts[0][1], torch.Tensor):
            return _together(parts, len(lengths))
        count = len(parts[0][1])
        return tuple(_together([(rows, part[at]) for rows, part in parts], len(lengths)) for at in range(count))

    def _at_length(self, x: torch.Tensor, position_ids: torch.Tensor, length: int, layer_type: str | None) -> Any:
        """The module's result for rows of this length; positions behind it are padding."""
        if self._kinds[layer_type] == DYNAMIC:
            # The module keeps the frequencies of the longest row so far, until it sees a short one.
            self._forward(x, position_ids.new_zeros((1, 1)), layer_type)
        last = position_ids.new_full((len(position_ids), 1), length - 1)
        result = self._forward(x, torch.cat([position_ids.clamp(max=length - 1), last], dim=1), layer_type)
        return result[:, :-1] if isinstance(result, torch.Tensor) else tuple(part[:, :-1] for part in result)

    def _forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None) -> Any:
        return self._own(x, position_ids) if layer_type is None else self._own(x, position_ids, layer_type)

    def _key(self, length: int, layer_type: str | None) -> int:
        """The representative length of all lengths with the same frequencies."""
        limit = self._limit(layer_type)
        if length <= limit:
            return limit
        return length if self._kinds[layer_type] == DYNAMIC else self._most(layer_type)

    def _limit(self, layer_type: str | None) -> int:
        if self._kinds[layer_type] == DYNAMIC:
            return int(self.module.original_max_seq_len)
        return int(self._parameters(layer_type)["original_max_position_embeddings"])

    def _most(self, layer_type: str | None) -> int:
        """A length beyond every position, so that none is cut."""
        longest = getattr(self.module.config, "max_position_embeddings", 0) or 0
        return max(int(longest), self._limit(layer_type) + 1, 1 << 24)

    def _parameters(self, layer_type: str | None) -> Any:
        parameters = self.module.config.rope_parameters
        return parameters if layer_type is None else parameters[layer_type]


def _together(parts: Sequence[tuple[list[int], torch.Tensor]], rows: int) -> torch.Tensor:
    first = parts[0][1]
    result = first.new_empty((rows, *first.shape[1:]))
    for places, part in parts:
        result[places] = part
    return result
