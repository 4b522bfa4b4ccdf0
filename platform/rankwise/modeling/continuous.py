"""Decoding with rows that come and go: a row that ends leaves at once, and a waiting one takes its place.

Letters: N rows in work, T tokens of the longest prompt of a group, W columns of keys and values, V vocabulary.

Prompts wait in the order of their lengths. All tokens of a prompt but the last go through the backbone in groups of
similar length, padded on the right, where causal attention cannot see the padding (prefill; within a budget of tokens,
and a prompt above it in pieces). The last one is fed as if it had been generated: so every pass through `lm_head` is
one position of each row, and rows begin and go on in the same step. A row's adapter decides its LoRA in both:
`packed_lora` by slices in prefill, `decoding_lora` in steps.

Which kinds of models this holds for is not guessed from names: see `engine_fit.py`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from transformers import DynamicCache

from rankwise.modeling.decoding_lora import StackedLora, stackable
from rankwise.modeling.dequantized import free_memory
from rankwise.modeling.forward import segments_of
from rankwise.modeling.out_of_memory import is_out_of_memory
from rankwise.modeling.packed_lora import Routing, Segment, packed_forwards
from rankwise.modeling.replaced_forward import replaced_forward
from rankwise.modeling.slot_cache import SlotCache, most_columns

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 4096
"""Tokens of one pass over prompts, padding included."""
STACK_SHARE = 0.1
"""At most this share of the memory that is free goes into copies of the adapters."""
CACHE_SHARE = 0.5
"""At most this share of a CPU's free memory goes into keys and values."""


@dataclass
class Row:
    """One prompt on its way.

    Attributes:
        index: Its place among the prompts.
        prompt: Its tokens, one at least.
        adapter: The adapter that it goes through; None is the bare base.
        made: The tokens generated so far.
    """

    index: int
    prompt: Sequence[int]
    adapter: str | None
    made: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of the token that is fed next."""
        return len(self.prompt) - 1 + len(self.made)

    @property
    def token(self) -> int:
        """The one that is fed next."""
        return self.made[-1] if self.made else self.prompt[-1]


class Engine:
    """Passes of one model over the rows of flights; several flights may take turns, in threads too."""

    def __init__(self, model: Any, lock: Lock) -> None:
        """Of a causal language model of transformers, with or without LoRA layers, that `lock` belongs to."""
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self._lock = lock
        self._routing = Routing()
        self._attached: tuple[str, ...] | None = None
        self._forwards: list[tuple[Any, Any]] = []
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self._backbone = model.base_model
        own = self._backbone is model and "logits_to_keep" in names
        self._no_head: dict[str, int] = {"logits_to_keep": 1} if own else {}

    @contextmanager
    def running(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Hold the model for a pass whose rows go through these adapters and through no other.

        Between passes somebody else may make another adapter active or attach one: peft's own forward would run it on
        all rows. So the layers get their forwards for each pass anew, and those that they had after it.
        """
        with self._lock:
            attached = tuple(getattr(self.model, "peft_config", None) or ())
            if attached != self._attached:
                self._forwards, self._attached = packed_forwards(self.model, self._routing), attached
            with replaced_forward(self._forwards), self._routing.segments(segments):
                yield

    def prefill(self, rows: Sequence[Row]) -> Any:
        """Keys and values of all tokens but the last of each row, of which each has two tokens at least."""
        width = max(len(row.prompt) for row in rows) - 1
        # Any id does for padding: causal attention does not see it from the tokens before it.
        padded = [[*row.prompt[:-1], *[0] * (width + 1 - len(row.prompt))] for row in rows]
        ids = torch.tensor(padded, device=self.device)
        cache = DynamicCache(config=self.model.config)
        lengths = [len(row.prompt) - 1 for row in rows]
        with self.running(segments_of(self.model, [row.adapter for row in rows], lengths)):
            # Several pieces mean a single row, without padding.
            for piece in torch.split(ids, PREFILL_TOKENS, dim=1):
                self._backbone(input_ids=piece, use_cache=True, **{self.cache_name: cache}, **self._no_head)
        return cache

    def fitting(self, slots: int, columns: int) -> int:
        """How many of so many rows may be in work at a time, each of up to so many tokens.

        A CPU's memory is not refused: the kernel would end the process. A GPU's is.
        """
        if self.device.type != "cpu":
            return slots
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row: int = 2 * config.num_hidden_layers * heads * size * most_columns(columns) * self.model.dtype.itemsize
        most: int = max(1, int(CACHE_SHARE * free_memory()) // row)
        if most < slots:
            logger.info(
                "%d of %d rows are decoded together: keys and values of one take %d MiB", most, slots, row >> 20
            )
        return min(slots, most)

    def stack(self, adapters: Sequence[str]) -> StackedLora | None:
        """The adapters as one stack, where they are of a kind for it and fit."""
        free = free_memory() if self.device.type == "cpu" else torch.cuda.mem_get_info(self.device)[0]
        try:
            if not adapters or not stackable(self.model, adapters, int(STACK_SHARE * free)):
                return None
            return StackedLora(self.model, adapters)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        logger.warning("out of memory for a stack of %d adapters: they are run one after another", len(adapters))
        return None


class Flight:
    """The rows in work, in slots of one cache."""

    def __init__(self, engine: Engine, *, slots: int, adapters: Sequence[str]) -> None:
        """Take up to `slots` rows, each of one of these adapters or of the bare base."""
        self.rows: list[Row] = []
        self.slots = slots
        self._engine = engine
        self._cache = SlotCache(slots, len(DynamicCache(config=engine.model.config).layers))
        self._stack = engine.stack(adapters)
        self._moved = True

    @torch.no_grad()
    def enter(self, rows: Sequence[Row]) -> None:
        """Put rows behind those in work, and fill their slots."""
        first = len(self.rows)
        self.rows += rows
        self._moved = True
        self._cache.clear(slice(first, len(self.rows)))
        for group in _groups(rows):
            group.sort(key=lambda at: rows[at].adapter or "")
            self._cache.put([first + at for at in group], self._engine.prefill([rows[at] for at in group]))

    def leave(self, slots: Sequence[int]) -> None:
        """Take rows out; the last ones move into their slots."""
        for slot in sorted(slots, reverse=True):
            last = self.rows.pop()
            if slot < len(self.rows):
                self._cache.move(len(self.rows), slot)
                self.rows[slot] = last
            self._moved = True

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Feed each row's token: (N, V) for the token after it."""
        engine = self._engine
        where = torch.tensor([row.position for row in self.rows], device=engine.device)
        width = max(row.position for row in self.rows) + 1
        self._cache.step(where, width)
        seen = torch.arange(width, device=engine.device)[None] <= where[:, None]
        with self._through():
            out = engine.model(
                input_ids=torch.tensor([[row.token] for row in self.rows], device=engine.device),
                attention_mask=attention_mask(seen, engine.model),
                position_ids=where[:, None],
                use_cache=True,
                **{engine.cache_name: self._cache},
            )
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    @contextmanager
    def _through(self) -> Iterator[None]:
        """Each row through its adapter."""
        owners = [row.adapter for row in self.rows]
        if self._stack is None:
            with self._engine.running(segments_of(self._engine.model, owners)):
                yield
            return
        if self._moved:
            self._stack.assign(owners)
            self._moved = False
        with self._engine.running(()), self._stack.active():
            yield


def waiting(
    prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], places: Sequence[int] | None = None
) -> list[Row]:
    """Rows from the shortest prompt to the longest: the last one is taken first, so that the cache grows early."""
    rows = [
        Row(index=index, prompt=prompt, adapter=adapter)
        for index, prompt, adapter in zip(places or range(len(prompts)), prompts, adapters, strict=True)
    ]
    return sorted(rows, key=lambda row: (len(row.prompt), -row.index))


def _groups(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Places of rows whose prompts go through the model together; those of one token need not."""
    group: list[int] = []
    longest = 0
    for at in sorted(range(len(rows)), key=lambda at: -len(rows[at].prompt)):
        tokens = len(rows[at].prompt) - 1
        if tokens == 0:
            break
        if group and (len(group) + 1) * longest > PREFILL_TOKENS:
            yield group
            group = []
        if not group:
            longest = tokens
        group.append(at)
    if group:
        yield group


def attention_mask(seen: torch.Tensor, model: Any) -> torch.Tensor:
    """(N, 1, 1, W), as the attention takes it: whether it is seen, or a number to add."""
    seen = seen[:, None, None]
    if model.config._attn_implementation == "sdpa":
        return seen
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
