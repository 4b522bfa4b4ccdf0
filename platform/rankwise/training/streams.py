"""Which rows of a micro-batch share a sequence, so that little of a forward pass is padding.

Rows of very different lengths, as conversations are, leave nearly half of a padded batch empty. Put one after the other
into a few *streams*, with positions that restart and attention that stays within a row, they fill it. But attention
over a stream is computed for all pairs of its tokens, and with a mask, while that over a padded row is causal and
short: fewer and longer streams save padding and cost attention. The number of streams is chosen by estimated cost:

    cost = tokens * (multiplications of the linear layers + weight * length * multiplications of attention a pair)

The weight says how much longer a multiplication takes in attention than in a linear layer, forward and backward, for
all pairs. Measured on one core with AVX512 for 9 heads of 64 at 330 to 1,280 tokens, in fp32: 2.3 with a mask and 1.9
without; in bf16, where linear layers are four times as fast, 9 and 8. For a GPU they are reckoned, and not measured:
its causal kernels skip half of the pairs. Flash attention takes streams without a mask, so one stream is best.

On a CPU, where calls cost nothing, attention runs for each row of a stream by itself: no mask, no pair too many, and
one stream without any padding.

Which rows an optimizer step covers is not touched, and neither are dropout masks, which belong to a row and a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rankwise.compat.transformers import attention_of
from rankwise.data.tokens import Encoded
from rankwise.modeling.base import linear_modules

# Weight of attention with a mask, and without one, by device and whether products are in 16 bit.
_WEIGHTS = {
    ("cpu", False): (2.3, 1.9),
    ("cpu", True): (9.0, 8.0),
    ("cuda", False): (1.5, 0.6),
    ("cuda", True): (2.0, 0.8),
}


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The rows of one arm's micro-batch in streams.

    Attributes:
        rows: The indices of the rows in each stream, in their order.
        length: Tokens of the longest stream.
    """

    rows: tuple[tuple[int, ...], ...]
    length: int

    @property
    def shared(self) -> bool:
        """Whether any stream has several rows."""
        return any(len(stream) > 1 for stream in self.rows)


@dataclass(frozen=True, kw_only=True)
class StreamCost:
    """What decides about streams.

    Attributes:
        linear: Multiplications of a token in linear layers.
        pair: Multiplications of a pair of tokens in attention.
        masked: Weight of attention over streams with several rows.
        causal: Weight of attention over single rows.
    """

    linear: float
    pair: float
    masked: float
    causal: float

    @classmethod
    def of(cls, model: Any, device: torch.device, dtype: torch.dtype) -> StreamCost:
        """The costs of a model."""
        text = model.config.get_text_config()
        heads = int(text.num_attention_heads)
        head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        masked, causal = _WEIGHTS["cpu" if device.type == "cpu" else "cuda", dtype.itemsize == 2]
        if "flash" in (attention_of(model.config) or ""):
            masked = 0.0
        return cls(
            linear=float(sum(inputs * outputs for inputs, outputs in linear_modules(model).values())),
            pair=2.0 * heads * head * int(text.num_hidden_layers),
            masked=masked,
            causal=causal,
        )

    def __call__(self, streams: Sequence[Streams]) -> float:
        """The cost of the micro-batches of some arms in one pass, padded to the longest stream."""
        length = max(each.length for each in streams)
        weight = self.masked if any(each.shared for each in streams) else self.causal
        return sum(len(each.rows) for each in streams) * length * (self.linear + weight * length * self.pair)


def attends_by_rows(model: Any, device: torch.device) -> bool:
    """Whether attention can run for each row of a stream by itself (`attention_by_rows`)."""
    return device.type == "cpu" and attention_of(model.config) == "sdpa"


def single(lengths: Sequence[int]) -> Streams:
    """A stream for each row."""
    return Streams(rows=tuple((index,) for index in range(len(lengths))), length=max(lengths))


def spread(lengths: Sequence[int], count: int) -> Streams:
    """`count` streams of about equal length: the longest row first, each into the shortest stream so far."""
    if count >= len(lengths):
        return single(lengths)
    streams: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        least = loads.index(min(loads))
        streams[least].append(index)
        loads[least] += lengths[index]
    return Streams(rows=tuple(tuple(sorted(stream)) for stream in streams), length=max(loads))


def choose(micro_batches: Sequence[Sequence[int]], cost: StreamCost) -> list[Streams]:
    """The cheapest streams for the lengths of the rows of some arms that share a pass, as many for each arm."""
    most = max(map(len, micro_batches))
    ways = [[spread(lengths, count) for lengths in micro_batches] for count in range(1, most + 1)]
    return min(ways, key=cost)


@dataclass(kw_only=True, eq=False)
class StreamBatch:
    """Micro-batches of some arms as tensors on the CPU.

    Attributes:
        input_ids: (B, T).
        position_ids: (B, T), restarting with each row.
        sequences: (B, T), equal for the tokens of one row and different from those of the rest of a stream.
        attention_mask: (B, T), 1 on tokens.
        shared: Whether any stream has several rows.
        rows: Stream of each supervised token, (S,).
        positions: Place in the stream of the token before it, (S,).
        targets: The supervised tokens, (S,).
        places: Row of each supervised token in its arm's micro-batch, (S,).
        counts: Supervised tokens of each arm.
        spans: The lengths of the rows in each stream, and of its padding.
        words: Dropout words, (B, T); zeros without dropout.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sequences: torch.Tensor
    attention_mask: torch.Tensor
    shared: bool
    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    counts: list[int]
    spans: list[list[int]]
    words: torch.Tensor


def lay_out(
    arms: Sequence[tuple[Sequence[Encoded], Streams]], words: Sequence[np.ndarray | None], pad_token_id: int
) -> StreamBatch:
    """Put the rows of some arms into the streams of one batch.

    Args:
        arms: The rows of each arm's micro-batch, and their streams.
        words: The dropout words of each arm's tokens, (rows, longest row); None without dropout.
        pad_token_id: What fills the rest.
    """
    shape = (sum(len(streams.rows) for _, streams in arms), max(streams.length for _, streams in arms))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.tile(np.arange(shape[1]), (shape[0], 1))
    sequences, mask, words_of = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    supervised: list[tuple[int, int, np.ndarray, np.ndarray]] = []
    counts, spans = [], []
    number = 0
    for (rows, streams), own_words in zip(arms, words, strict=True):
        count = 0
        for stream in streams.rows:
            start = 0
            for sequence, index in enumerate(stream):
                row = rows[index]
                place = slice(start, start + len(row.input_ids))
                input_ids[number, place] = row.input_ids
                position_ids[number, place] = np.arange(len(row.input_ids))
                sequences[number, place] = sequence
                mask[number, place] = 1
                if own_words is not None:
                    words_of[number, place] = own_words[index, : len(row.input_ids)]
                (tokens,) = row.supervised.nonzero()
                assert not row.supervised[0], "nothing predicts the first token of a row"
                supervised.append((number, index, tokens + start, row.input_ids[tokens]))
                count += len(tokens)
                start = place.stop
            spans.append([len(rows[index].input_ids) for index in stream])
            if start < shape[1]:
                spans[-1].append(shape[1] - start)
            sequences[number, start:] = len(stream)
            position_ids[number, start:] = np.arange(shape[1] - start)
            number += 1
        counts.append(count)

    def joined(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64))

    return StreamBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        sequences=torch.from_numpy(sequences),
        attention_mask=torch.from_numpy(mask),
        shared=any(streams.shared for _, streams in arms),
        rows=joined([np.full(len(tokens), stream) for stream, _, tokens, _ in supervised]),
        positions=joined([tokens - 1 for _, _, tokens, _ in supervised]),
        targets=joined([targets for *_, targets in supervised]),
        places=joined([np.full(len(tokens), index) for _, index, tokens, _ in supervised]),
        counts=counts,
        spans=spans,
        words=torch.from_numpy(words_of),
    )
