"""Decode many prompts at once, each under its own adapter, over one loaded base.

Rows of all adapters share each step, a row that has ended gives its place to the next one
(`modeling/continuous.py`). Positions count from each prompt's own first token, and a sampled row draws from its own
seed: what a row generates depends neither on its neighbours nor on the batch size, beyond the rounding of the matrix
products, by which a choice between two all but equal tokens can flip (`make bench-inference` measures how often).

A model whose layers keep something else than keys and values (a window, a state) is decoded by transformers' own
`generate` in batches of similar length, sorted by adapter; so are rows of an adapter that is not plain LoRA, by itself.

Letters: N rows in work, T tokens of the longest prompt of a group, W columns of keys and values, V vocabulary.

Prompts wait in the order of their lengths. All tokens of a prompt but the last go through the backbone in groups of
similar length, padded on the right, where causal attention cannot see the padding (prefill; within a budget of tokens,
and a prompt above it in pieces). The last one is fed as if it had been generated: so every pass through `lm_head` is
one position of each row, and rows begin and go on in the same step. A row's adapter decides its LoRA in both:
`packed_lora` by slices in prefill, `decoding_lora` in steps.

Which kinds of models this holds for is not guessed from names: see `engine_fit.py`.

An engine is compared with the model's own forward, logits against logits. Attention over a window, or a state in place
of keys and values, shows too late for that, and is known by what transformers keeps for it; such models are left to
`generation.generate_batch`.

- Decoding with rows that come and go: a row that ends leaves at once, and a waiting one takes its place.
- Which models the engine of `continuous.py` fits: found out by a comparison, once for each model.
- The loop over the rows in work: who comes in, which token is next, who leaves; what to do when memory runs out.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from transformers import DynamicCache, DynamicLayer

from rankwise.compat.transformers import attention_of
from rankwise.exceptions import ConfigError, JobError, is_out_of_memory
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.decoding.cache import SlotCache, StackedLora, most_columns, stackable
from rankwise.modeling.decoding.generation import (
    Decoding,
    Generated,
    end_token_ids,
    finish,
    generate_batch,
    generator,
    length_batches,
    noisy,
    stops,
)
from rankwise.modeling.lora.lean import free_memory
from rankwise.modeling.lora.packed import (
    Routing,
    Segment,
    evaluating,
    not_plain,
    own_forward,
    packed_forwards,
    pass_lock,
    replaced_forward,
    segments_of,
)
from rankwise.reporter import SILENT, Reporter

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
    if attention_of(model.config) == "sdpa":
        return seen
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


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
    attention = attention_of(model.config)
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


_REFILL = 4
"""Waiting rows enter once one slot in so many is free."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What to continue.

    Attributes:
        token_ids: Tokens of the rendered prompt.
        adapter: The adapter to run it under; None is the bare base.
        seed: Seed of this row's sampling; unused in greedy decoding.
    """

    token_ids: tuple[int, ...]
    adapter: str | None = None
    seed: int = 0


def in_flight(
    engine: Engine, prompts: Sequence[Prompt], decoding: Decoding, tokenizer: Any, batch_size: int
) -> Iterator[tuple[int, Generated]]:
    """Each prompt's place and generation, in the order in which they end.

    Raises:
        JobError: Memory does not suffice for a single row.
    """
    ends = end_token_ids(engine.model, tokenizer, decoding.stop)
    queue = waiting([prompt.token_ids for prompt in prompts], [prompt.adapter for prompt in prompts])
    adapters = sorted({prompt.adapter for prompt in prompts if prompt.adapter is not None})
    choose = _Choice(prompts, decoding)
    longest = max(len(prompt.token_ids) for prompt in prompts) + decoding.max_new_tokens
    slots = engine.fitting(min(batch_size, len(queue)), longest)
    flight = Flight(engine, slots=slots, adapters=adapters)
    while queue or flight.rows:
        tokens = _step(flight, queue, choose)
        if tokens is None:
            if slots == 1:
                raise JobError(
                    f"out of memory on {engine.device} with a single row; shorten the prompts or lower max_new_tokens"
                )
            slots //= 2
            logger.warning("out of memory: at most %d rows are decoded together from now on", slots)
            # Begun anew: what a row generates does not depend on when it is done.
            rows = [*queue, *flight.rows]
            queue = waiting([row.prompt for row in rows], [row.adapter for row in rows], [row.index for row in rows])
            choose.forget(row.index for row in rows)
            del flight
            torch.cuda.empty_cache()
            flight = Flight(engine, slots=slots, adapters=adapters)
            continue
        done = []
        for slot, token in enumerate(tokens):
            made = flight.rows[slot].made
            made.append(token)
            if token in ends or len(made) == decoding.max_new_tokens or stops(tokenizer, made, decoding.stop):
                done.append(slot)
        ended = [flight.rows[slot] for slot in done]
        flight.leave(done)
        choose.forget(row.index for row in ended)
        for row in ended:
            yield row.index, finish(tokenizer, row.made, decoding, ends, len(row.prompt))


class _Choice:
    """The next token of each row; where tokens are drawn, rows in work have their generators, and no others."""

    def __init__(self, prompts: Sequence[Prompt], decoding: Decoding) -> None:
        self._prompts = prompts
        self._decoding = decoding
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, rows: Sequence[Row], logits: torch.Tensor) -> list[int]:
        """One token of each row, from (N, V)."""
        decoding = self._decoding
        if decoding.samples:
            for row in rows:
                if row.index not in self._generators:
                    self._generators[row.index] = generator(self._prompts[row.index].seed)
            logits = noisy(
                logits,
                [self._generators[row.index] for row in rows],
                temperature=decoding.temperature,
                top_k=decoding.top_k,
                top_p=decoding.top_p,
            )
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        return tokens

    def forget(self, indices: Iterable[int]) -> None:
        """Rows that have left: one that comes again draws from its beginning."""
        for index in indices:
            self._generators.pop(index, None)


def _step(flight: Flight, queue: list[Row], choose: _Choice) -> list[int] | None:
    """Let waiting rows in, and give each row's next token; None if memory ran out."""
    try:
        free = min(flight.slots - len(flight.rows), len(queue))
        # Not at once for every row that ends: prompts that go through the model together cost less.
        if free and (free == len(queue) or free >= flight.slots // _REFILL):
            flight.enter([queue.pop() for _ in range(free)])
        return choose(flight.rows, flight.logits())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def generate(
    base: LoadedBase,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    progress: Reporter | None = None,
) -> list[Generated]:
    """Continue every prompt under its own adapter.

    Args:
        base: The loaded base; the named adapters are attached to its model.
        prompts: Any mixture of adapters and lengths.
        decoding: How tokens are chosen and when to stop.
        tokenizer: Decodes, and names the padding and end tokens; the base's when left out.
        batch_size: Rows that are decoded together.
        progress: Told of rows as they are done.

    Returns:
        One generation per prompt, in the order of the prompts.

    Raises:
        ConfigError: A prompt cannot be continued (see `prompt_problem`), or `batch_size` is below 1.
        JobError: Memory does not suffice for a single row; before that, fewer rows are decoded together.
        ValueError: An adapter is not attached to the base.
    """
    results: dict[int, Generated] = {}
    with (progress or SILENT).task("generate", len(prompts), "rows") as advance:
        for index, made in generate_each(base, prompts, decoding, tokenizer=tokenizer, batch_size=batch_size):
            results[index] = made
            advance(1)
    return [results[index] for index in range(len(prompts))]


def generate_each(
    base: LoadedBase, prompts: Sequence[Prompt], decoding: Decoding, *, tokenizer: Any = None, batch_size: int = 8
) -> Iterator[tuple[int, Generated]]:
    """As `generate`, but each generation as soon as it is there, with its prompt's place.

    Raises:
        RankwiseError: As `generate`, at the first step or a later one.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, got {batch_size}")
    for index, prompt in enumerate(prompts):
        problem = prompt_problem(base, len(prompt.token_ids), decoding.max_new_tokens)
        if problem:
            raise ConfigError(f"prompt {index}: {problem}")
    if not prompts:
        return
    tokenizer = base.tokenizer if tokenizer is None else tokenizer
    alone = not_plain(base.model, {prompt.adapter for prompt in prompts if prompt.adapter is not None})
    if alone:
        logger.warning(
            "%s: not plain LoRA (DoRA or a bias), so decoded by peft's own forward, one adapter after another",
            ", ".join(alone),
        )
    with evaluating(base.model):
        for own in [None, *alone]:
            places = [at for at, one in enumerate(prompts) if own == (one.adapter if one.adapter in alone else None)]
            rows = [prompts[at] for at in places]
            engine = engine_of(base.model) if own is None and rows else None
            if engine is None:
                made = _in_batches(base, rows, decoding, tokenizer, batch_size, own)
            else:
                made = in_flight(engine, rows, decoding, tokenizer, batch_size)
            for at, one in made:
                yield places[at], one


def _in_batches(
    base: LoadedBase, prompts: Sequence[Prompt], decoding: Decoding, tokenizer: Any, batch_size: int, own: str | None
) -> Iterator[tuple[int, Generated]]:
    """By transformers' `generate`: all rows through the adapter `own`, or, where it is None, each through its own."""
    for batch in length_batches([len(prompt.token_ids) for prompt in prompts], batch_size):
        order = sorted(batch, key=lambda index: prompts[index].adapter or "")
        rows = [prompts[index] for index in order]
        with pass_lock(base.model), _routed(base.model, rows) if own is None else own_forward(base.model, own):
            made = generate_batch(
                base.model, tokenizer, [row.token_ids for row in rows], decoding, seeds=[row.seed for row in rows]
            )
        yield from zip(order, made, strict=True)


@contextmanager
def _routed(model: Any, rows: Sequence[Prompt]) -> Iterator[None]:
    """Each row through its adapter."""
    routing = Routing()
    segments = segments_of(model, [row.adapter for row in rows])
    with replaced_forward(packed_forwards(model, routing)), routing.segments(segments):
        yield


def greedy(
    base: LoadedBase, *, max_new_tokens: int, batch_size: int, progress: Reporter | None = None
) -> Callable[[Sequence[Sequence[int]], Sequence[str | None]], list[Generated]]:
    """What `evaluation.evaluator.evaluate` takes: prompts' tokens and adapters in, greedy answers out, in order."""
    decoding = Decoding(max_new_tokens=max_new_tokens)

    def run(token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[Generated]:
        prompts = [
            Prompt(token_ids=tuple(ids), adapter=adapter) for ids, adapter in zip(token_ids, adapters, strict=True)
        ]
        return generate(base, prompts, decoding, batch_size=batch_size, progress=progress)

    return run


def prompt_problem(base: LoadedBase, prompt_tokens: int, max_new_tokens: int) -> str | None:
    """Say why a prompt of this many tokens cannot be continued, or None when it can."""
    if prompt_tokens == 0:
        return "it has no tokens; there is nothing to continue"
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and limit < prompt_tokens + max_new_tokens:
        return (
            f"its {prompt_tokens} tokens and max_new_tokens {max_new_tokens} exceed the {limit} positions of the base; "
            "shorten the prompt or lower max_new_tokens"
        )
    return None
