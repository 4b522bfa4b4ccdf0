"""Decoding engine: a running batch of rows over one model, each row through its own adapter (continuous batching).

1. `RunningBatch.admit` adds rows. All tokens of a prompt but the last go through the backbone in groups of similar
   length, padded on the right, where causal attention cannot see the padding (prefill, in passes of at most
   `PREFILL_TOKENS` tokens; longer prompts in pieces). A row's adapter applies by slices: `lora.packed`.
2. `RunningBatch.logits` feeds one token per row, the first time the prompt's last one, so rows can start and continue
   in the same step. Adapters apply by `stacked_lora`.
3. `RunningBatch.remove` frees the slots of finished rows.

A row's result depends neither on its neighbours nor on the batch size, beyond rounding of the matrix products, which
can flip a choice between two nearly equal tokens (`make bench-inference` measures how often).

`engine_of` decides once per model whether the engine fits, by comparing its logits with the model's own forward, for
rows on both sides of every length limit in the configuration. Windows may be too long for that, so the kind of cache
layers is checked as well. A row that grows into other rotary frequencies (`modeling.rope`) is prefilled again.
Other models are decoded by `generation.generate_batch`.

Letters: N active rows, W columns of keys and values, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from transformers import DynamicCache, DynamicLayer

from rankwise.compat.transformers import attention_of
from rankwise.exceptions import is_out_of_memory
from rankwise.modeling.decoding.slot_cache import SlotCache, most_columns
from rankwise.modeling.decoding.stacked_lora import StackedLora, stackable
from rankwise.modeling.length_limits import affordable_tokens, length_limits, probe_lengths
from rankwise.modeling.lora.lean import free_memory
from rankwise.modeling.lora.packed import (
    Routing,
    Segment,
    packed_forwards,
    pass_lock,
    replaced_forward,
    segments_of,
)
from rankwise.modeling.rope import position_limit, rope_scaling, row_lengths

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 4096
"""Maximum tokens of one prefill pass, including padding."""
STACK_SHARE = 0.1
"""Maximum share of free memory for copies of the adapters."""
CACHE_SHARE = 0.5
"""Maximum share of a CPU's free memory for keys and values."""


@dataclass
class DecodingRow:
    """One prompt being continued; `index` is its index among the prompts, `adapter` None the bare base."""

    index: int
    prompt: Sequence[int]
    adapter: str | None
    generated: list[int] = field(default_factory=list)
    frequencies: tuple[int, ...] = ()
    """What rotary frequencies its cached keys have (`RopeScaling.key`)."""

    @property
    def position(self) -> int:
        """Position of the next token to feed."""
        return len(self.prompt) - 1 + len(self.generated)

    @property
    def context(self) -> Sequence[int]:
        """The tokens before the next one to feed."""
        return [*self.prompt, *self.generated][:-1]

    @property
    def token(self) -> int:
        """The next token to feed."""
        return self.generated[-1] if self.generated else self.prompt[-1]


class Engine:
    """Passes of one model; several running batches may take turns, also from threads."""

    def __init__(self, model: Any, lock: Lock) -> None:
        """For a transformers causal language model, with or without LoRA layers; `lock` serializes its passes."""
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self._lock = lock
        self._routing = Routing()
        self.rope = rope_scaling(model)
        self._attached: tuple[str, ...] | None = None
        self._forwards: list[tuple[Any, Any]] = []
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self._backbone = model.base_model
        own = self._backbone is model and "logits_to_keep" in names
        self._no_head: dict[str, int] = {"logits_to_keep": 1} if own else {}

    @contextmanager
    def running(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Lock the model for a pass whose rows go through exactly these adapters.

        The LoRA forwards are replaced for each pass and restored afterwards: between passes, other code may activate or
        attach an adapter, and peft's own forward would apply it to all rows.
        """
        with self._lock:
            attached = tuple(getattr(self.model, "peft_config", None) or ())
            if attached != self._attached:
                self._forwards, self._attached = packed_forwards(self.model, self._routing), attached
            with replaced_forward(self._forwards), self._routing.segments(segments):
                yield

    def prefill(self, rows: Sequence[DecodingRow]) -> Any:
        """Keys and values of all tokens before each row's next one, of which every row needs at least one.

        Their rotary frequencies are those of the row with its next token.
        """
        contexts = [row.context for row in rows]
        lengths = [len(context) for context in contexts]
        width = max(lengths)
        # Any id serves as padding: causal attention does not see later tokens.
        padded = [[*context, *[0] * (width - len(context))] for context in contexts]
        ids = torch.tensor(padded, device=self.device)
        cache = DynamicCache(config=self.model.config)
        segments = segments_of(self.model, [row.adapter for row in rows], lengths)
        with self.running(segments), row_lengths(self.model, [length + 1 for length in lengths]):
            # Only a single row, without padding, is ever split.
            for piece in torch.split(ids, PREFILL_TOKENS, dim=1):
                self._backbone(input_ids=piece, use_cache=True, **{self.cache_name: cache}, **self._no_head)
        return cache

    def rows_that_fit(self, slots: int, columns: int) -> int:
        """How many of `slots` rows of up to `columns` tokens fit into memory at once.

        Only limited on a CPU, where the kernel would kill the process; a GPU raises an error that is handled.
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
                "%d of %d rows are decoded together: keys and values of one row take %d MiB", most, slots, row >> 20
            )
        return min(slots, most)

    def stack(self, adapters: Sequence[str]) -> StackedLora | None:
        """Stack the adapters, or return None if they cannot be stacked or do not fit."""
        free = free_memory() if self.device.type == "cpu" else torch.cuda.mem_get_info(self.device)[0]
        try:
            if not adapters or not stackable(self.model, adapters, int(STACK_SHARE * free)):
                return None
            return StackedLora(self.model, adapters)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        logger.warning("out of memory for a stack of %d adapters: they run one after another", len(adapters))
        return None


class RunningBatch:
    """The active rows, in the slots of one cache."""

    def __init__(self, engine: Engine, *, slots: int, adapters: Sequence[str]) -> None:
        """Allow up to `slots` rows, each of one of these adapters or of the bare base."""
        self.rows: list[DecodingRow] = []
        self.slots = slots
        self._engine = engine
        self._cache = SlotCache(slots, len(DynamicCache(config=engine.model.config).layers))
        self._stack = engine.stack(adapters)
        self._rows_changed = True

    @torch.no_grad()
    def admit(self, rows: Sequence[DecodingRow]) -> None:
        """Append rows and prefill their slots."""
        first = len(self.rows)
        self.rows += rows
        self._rows_changed = True
        self._cache.clear(slice(first, len(self.rows)))
        self._prefill(range(first, len(self.rows)))

    def _prefill(self, slots: Sequence[int]) -> None:
        rows = [self.rows[slot] for slot in slots]
        for group in _groups(rows):
            group.sort(key=lambda at: rows[at].adapter or "")
            self._cache.put([slots[at] for at in group], self._engine.prefill([rows[at] for at in group]))
        for row in rows:
            row.frequencies = self._engine.rope.key(row.position + 1)

    def remove(self, slots: Sequence[int]) -> None:
        """Remove rows; the last ones move into the free slots."""
        for slot in sorted(slots, reverse=True):
            last = self.rows.pop()
            if slot < len(self.rows):
                self._cache.move(len(self.rows), slot)
                self.rows[slot] = last
            self._rows_changed = True

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Feed each row's next token and return the logits that follow: (N, V)."""
        engine = self._engine
        # Rows that have grown into other rotary frequencies: their cached keys are computed again.
        outgrown = [slot for slot, row in enumerate(self.rows) if row.frequencies != engine.rope.key(row.position + 1)]
        if outgrown:
            self._prefill(outgrown)
        positions = torch.tensor([row.position for row in self.rows], device=engine.device)
        width = max(row.position for row in self.rows) + 1
        self._cache.step(positions, width)
        visible = torch.arange(width, device=engine.device)[None] <= positions[:, None]
        with self._through(), row_lengths(engine.model, [row.position + 1 for row in self.rows]):
            out = engine.model(
                input_ids=torch.tensor([[row.token] for row in self.rows], device=engine.device),
                attention_mask=attention_mask(visible, engine.model),
                position_ids=positions[:, None],
                use_cache=True,
                **{engine.cache_name: self._cache},
            )
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    @contextmanager
    def _through(self) -> Iterator[None]:
        owners = [row.adapter for row in self.rows]
        if self._stack is None:
            with self._engine.running(segments_of(self._engine.model, owners)):
                yield
            return
        if self._rows_changed:
            self._stack.assign(owners)
            self._rows_changed = False
        with self._engine.running(()), self._stack.active():
            yield


def queue_rows(
    prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], places: Sequence[int] | None = None
) -> list[DecodingRow]:
    """Queue rows by prompt length. The longest is last and is taken first, so the cache grows early."""
    rows = [
        DecodingRow(index=index, prompt=prompt, adapter=adapter)
        for index, prompt, adapter in zip(places or range(len(prompts)), prompts, adapters, strict=True)
    ]
    return sorted(rows, key=lambda row: (len(row.prompt), -row.index))


def _groups(rows: Sequence[DecodingRow]) -> Iterator[list[int]]:
    """Indices of rows to prefill together; prompts of one token need no prefill."""
    group: list[int] = []
    longest = 0
    for at in sorted(range(len(rows)), key=lambda at: -rows[at].position):
        tokens = rows[at].position
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


def attention_mask(visible: torch.Tensor, model: Any) -> torch.Tensor:
    """(N, 1, 1, W) in the form that the attention takes: bool, or numbers to add."""
    visible = visible[:, None, None]
    if attention_of(model.config) == "sdpa":
        return visible
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


# Relative to the largest logit. Rounding in other kernels stays below; a wrong position or mask does not.
_SAME = {torch.float32: 1e-3}
_SAME_IN_16_BIT = 5e-2


@dataclass(frozen=True)
class _Compatibility:
    """Result of the comparison for a model; `reason` is None if the engine fits."""

    reason: str | None


_COMPATIBILITY: weakref.WeakKeyDictionary[Any, _Compatibility] = weakref.WeakKeyDictionary()
_COMPATIBILITY_LOCK = Lock()


def engine_of(model: Any) -> Engine | None:
    """An engine for a model, or None (logged once) if the engine does not fit it."""
    with _COMPATIBILITY_LOCK:
        compatibility = _COMPATIBILITY.get(model)
        if compatibility is None:
            compatibility = _COMPATIBILITY[model] = _Compatibility(_incompatibility(Engine(model, pass_lock(model))))
            if compatibility.reason:
                logger.warning(
                    "%s is decoded by transformers' generate, which is slower, because %s",
                    type(model).__name__,
                    compatibility.reason,
                )
    return Engine(model, pass_lock(model)) if compatibility.reason is None else None


def _incompatibility(engine: Engine) -> str | None:
    """The reason why an engine does not fit its model, or None."""
    model = engine.model
    attention = attention_of(model.config)
    if attention not in {"sdpa", "eager"}:
        return f"its attention is {attention}"
    try:
        layers = DynamicCache(config=model.config).layers
        kinds = {type(layer).__name__ for layer in layers if not _keeps_everything(layer, model)}
        if kinds:
            return f"its layers keep {', '.join(sorted(kinds))}"
        difference = _largest_difference(engine)
    except Exception as error:
        # Unknown models can fail in any way here. Running out of memory says nothing about the model.
        if is_out_of_memory(error):
            raise
        return f"the trial failed with {type(error).__name__}: {error}"
    limit = _limit(model)
    return None if difference <= limit else f"logits differ by {difference:.3g} of the largest (limit {limit:g})"


def _limit(model: Any) -> float:
    return _SAME.get(next(model.parameters()).dtype, _SAME_IN_16_BIT)


def _keeps_everything(layer: Any, model: Any) -> bool:
    """Whether a layer's cache keeps all keys and values of any row: windows may be longer than every row."""
    if type(layer) is DynamicLayer:
        return True
    positions, window = position_limit(model.config), getattr(layer, "sliding_window", None)
    return isinstance(layer, DynamicLayer) and positions is not None and window is not None and window >= positions


_LOWERED = 8


def _largest_difference(engine: Engine) -> float:
    """The largest difference over rows on both sides of every length limit in the model's configuration."""
    model = engine.model
    lengths = probe_lengths(model, length_limits(model.config))
    worst = _logit_difference(engine, lengths)
    if worst <= _limit(model) and any(limit + 3 > affordable_tokens(model) for limit in engine.rope.limits):
        # Rows of that length would take too long; the scaling computes the same wherever its limit is.
        with engine.rope.lowered(_LOWERED):
            worst = max(worst, _logit_difference(engine, [4, _LOWERED - 1, _LOWERED + 3]))
    return worst


@torch.no_grad()
def _logit_difference(engine: Engine, lengths: Sequence[int], steps: int = 4) -> float:
    """Largest relative difference from the logits of the model's own forward, for prompts of these lengths."""
    vocabulary = engine.model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(max(lengths) + len(lengths) + steps) * 97 % vocabulary).tolist()
    positions = position_limit(engine.model.config)
    if positions is not None:
        steps = max(1, min(steps, positions - max(lengths)))
    rows = [
        DecodingRow(index=index, prompt=tokens[index : index + length], adapter=None)
        for index, length in enumerate(lengths)
    ]
    running = RunningBatch(engine, slots=len(rows), adapters=())
    running.admit(rows)
    ours = []
    for token in tokens[-steps:]:
        ours.append(running.logits().float())
        for row in rows:
            row.generated.append(token)
    worst = 0.0
    for at, row in enumerate(rows):
        own = _own_logits(engine, row, steps)
        mine = torch.stack([step[at] for step in ours])
        far = float((own - mine).abs().max() / own.abs().max())
        # `max` alone keeps its first argument if one is NaN.
        worst = math.inf if math.isnan(far) else max(worst, far)
    return worst


def _own_logits(engine: Engine, row: DecodingRow, steps: int) -> torch.Tensor:
    """Logits of a row's last steps by the model's own forward, alone and without a cache: (steps, V)."""
    whole = [*row.prompt, *row.generated][:-1]
    # Where rotary frequencies change with the length, every step has a forward of its own.
    ends = range(len(whole) - steps + 1, len(whole) + 1) if engine.rope.embeddings else [len(whole)]
    logits = []
    for end in ends:
        with engine.running(()):
            out = engine.model(input_ids=torch.tensor([whole[:end]], device=engine.device), use_cache=False).logits
        logits.append(out[0, -steps:] if len(ends) == 1 else out[0, -1:])
    return torch.cat(logits).float()
