"""Generate text for many prompts, each with its own adapter: queueing, admission, token choice, retries out of memory.

1. Prompts wait in a queue, sorted by length.
2. While slots are free, queued rows join the running batch (`engine.py`); each step chooses one token per row.
3. A row that ends is yielded at once and frees its slot.
4. When memory runs out, half as many rows restart from their prompts. Their results do not change.

Models that the engine does not fit, and adapters that are not plain LoRA, are decoded by transformers' `generate` in
batches of similar length (`generation.generate_batch`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.exceptions import ConfigError, JobError, is_out_of_memory
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.decoding.engine import DecodingRow, Engine, RunningBatch, engine_of, queue_rows
from rankwise.modeling.decoding.generation import (
    Decoding,
    Generation,
    add_gumbel_noise,
    end_token_ids,
    finish_row,
    generate_batch,
    length_batches,
    reaches_stop,
    row_generator,
)
from rankwise.modeling.lora.packed import (
    Routing,
    evaluating,
    not_plain,
    own_forward,
    packed_forwards,
    pass_lock,
    replaced_forward,
    segments_of,
)
from rankwise.modeling.rope import position_limit
from rankwise.reporter import SILENT, Reporter

logger = logging.getLogger(__name__)

_REFILL = 4
"""Queued rows are admitted once one slot in so many is free."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to continue: its token ids, its adapter (None is the bare base), and the seed for sampling."""

    token_ids: tuple[int, ...]
    adapter: str | None = None
    seed: int = 0


def decode_continuously(
    engine: Engine, prompts: Sequence[Prompt], decoding: Decoding, tokenizer: Any, batch_size: int
) -> Iterator[tuple[int, Generation]]:
    """Yield each prompt's index and generation as rows end.

    Raises:
        JobError: Memory does not suffice for a single row.
    """
    ends = end_token_ids(engine.model, tokenizer, decoding.stop)
    queue = queue_rows([prompt.token_ids for prompt in prompts], [prompt.adapter for prompt in prompts])
    adapters = sorted({prompt.adapter for prompt in prompts if prompt.adapter is not None})
    choose = _TokenChooser(prompts, decoding)
    longest = max(len(prompt.token_ids) for prompt in prompts) + decoding.max_new_tokens
    slots = engine.rows_that_fit(min(batch_size, len(queue)), longest)
    running = RunningBatch(engine, slots=slots, adapters=adapters)
    while queue or running.rows:
        tokens = _step(running, queue, choose)
        if tokens is None:
            if slots == 1:
                raise JobError(
                    f"out of memory on {engine.device} with a single row; shorten the prompts or lower max_new_tokens"
                )
            slots //= 2
            logger.warning("out of memory: at most %d rows are decoded together from now on", slots)
            # All rows restart: their results do not depend on when they run.
            rows = [*queue, *running.rows]
            queue = queue_rows([row.prompt for row in rows], [row.adapter for row in rows], [row.index for row in rows])
            choose.forget(row.index for row in rows)
            del running
            torch.cuda.empty_cache()
            running = RunningBatch(engine, slots=slots, adapters=adapters)
            continue
        done = []
        for slot, token in enumerate(tokens):
            tokens_so_far = running.rows[slot].generated
            tokens_so_far.append(token)
            full = len(tokens_so_far) == decoding.max_new_tokens
            if token in ends or full or reaches_stop(tokenizer, tokens_so_far, decoding.stop):
                done.append(slot)
        ended = [running.rows[slot] for slot in done]
        running.remove(done)
        choose.forget(row.index for row in ended)
        for row in ended:
            yield row.index, finish_row(tokenizer, row.generated, decoding, ends, len(row.prompt))


class _TokenChooser:
    """Chooses the next token of each row; keeps a random generator per active row if tokens are sampled."""

    def __init__(self, prompts: Sequence[Prompt], decoding: Decoding) -> None:
        self._prompts = prompts
        self._decoding = decoding
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, rows: Sequence[DecodingRow], logits: torch.Tensor) -> list[int]:
        decoding = self._decoding
        if decoding.samples:
            for row in rows:
                if row.index not in self._generators:
                    self._generators[row.index] = row_generator(self._prompts[row.index].seed)
            logits = add_gumbel_noise(
                logits,
                [self._generators[row.index] for row in rows],
                temperature=decoding.temperature,
                top_k=decoding.top_k,
                top_p=decoding.top_p,
            )
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        return tokens

    def forget(self, indices: Iterable[int]) -> None:
        """Drop the generators of rows; a restarted row samples from the beginning."""
        for index in indices:
            self._generators.pop(index, None)


def _step(running: RunningBatch, queue: list[DecodingRow], choose: _TokenChooser) -> list[int] | None:
    """Admit queued rows and choose each row's next token; None if memory ran out."""
    try:
        free = min(running.slots - len(running.rows), len(queue))
        # Not for every single free slot: prefilling several prompts together is cheaper.
        if free and (free == len(queue) or free >= running.slots // _REFILL):
            running.admit([queue.pop() for _ in range(free)])
        return choose(running.rows, running.logits())
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
) -> list[Generation]:
    """Continue every prompt under its own adapter; results are in the order of the prompts.

    The adapters are attached to the base's model. `batch_size` limits the active rows; `tokenizer` defaults to the
    base's.

    Raises:
        ConfigError: A prompt cannot be continued (see `prompt_problem`), or `batch_size` is below 1.
        JobError: Memory does not suffice for a single row; fewer rows are tried first.
        ValueError: An adapter is not attached to the base.
    """
    results: dict[int, Generation] = {}
    with (progress or SILENT).task("generate", len(prompts), "rows") as advance:
        for index, generation in generate_each(base, prompts, decoding, tokenizer=tokenizer, batch_size=batch_size):
            results[index] = generation
            advance(1)
    return [results[index] for index in range(len(prompts))]


def generate_each(
    base: LoadedBase, prompts: Sequence[Prompt], decoding: Decoding, *, tokenizer: Any = None, batch_size: int = 8
) -> Iterator[tuple[int, Generation]]:
    """Like `generate`, but yields each prompt's index and generation as soon as it ends.

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
            "%s: not plain LoRA (DoRA or a bias); these adapters are decoded by peft's own forward, one after another",
            ", ".join(alone),
        )
    with evaluating(base.model):
        for own in [None, *alone]:
            indices = [
                index
                for index, prompt in enumerate(prompts)
                if own == (prompt.adapter if prompt.adapter in alone else None)
            ]
            rows = [prompts[index] for index in indices]
            engine = engine_of(base.model) if own is None and rows else None
            if engine is None:
                generations = _in_batches(base, rows, decoding, tokenizer, batch_size, own)
            else:
                generations = decode_continuously(engine, rows, decoding, tokenizer, batch_size)
            for row, generation in generations:
                yield indices[row], generation


def _in_batches(
    base: LoadedBase, prompts: Sequence[Prompt], decoding: Decoding, tokenizer: Any, batch_size: int, own: str | None
) -> Iterator[tuple[int, Generation]]:
    """Decode with transformers' `generate`: all rows through `own`, or each through its own adapter if it is None."""
    for batch in length_batches([len(prompt.token_ids) for prompt in prompts], batch_size):
        order = sorted(batch, key=lambda index: prompts[index].adapter or "")
        rows = [prompts[index] for index in order]
        with pass_lock(base.model), _routed(base.model, rows) if own is None else own_forward(base.model, own):
            generations = generate_batch(
                base.model, tokenizer, [row.token_ids for row in rows], decoding, seeds=[row.seed for row in rows]
            )
        yield from zip(order, generations, strict=True)


@contextmanager
def _routed(model: Any, rows: Sequence[Prompt]) -> Iterator[None]:
    routing = Routing()
    segments = segments_of(model, [row.adapter for row in rows])
    with replaced_forward(packed_forwards(model, routing)), routing.segments(segments):
        yield


def greedy(
    base: LoadedBase, *, max_new_tokens: int, batch_size: int, progress: Reporter | None = None
) -> Callable[[Sequence[Sequence[int]], Sequence[str | None]], list[Generation]]:
    """A function from prompt tokens and adapters to greedy answers, as `evaluation.evaluate` takes it."""
    decoding = Decoding(max_new_tokens=max_new_tokens)

    def run(token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[Generation]:
        prompts = [
            Prompt(token_ids=tuple(ids), adapter=adapter) for ids, adapter in zip(token_ids, adapters, strict=True)
        ]
        return generate(base, prompts, decoding, batch_size=batch_size, progress=progress)

    return run


def prompt_problem(base: LoadedBase, prompt_tokens: int, max_new_tokens: int) -> str | None:
    """Return why a prompt of this many tokens cannot be continued, or None."""
    if prompt_tokens == 0:
        return "it has no tokens; give it at least one"
    limit = position_limit(base.model.config)
    if limit is not None and limit < prompt_tokens + max_new_tokens:
        return (
            f"its {prompt_tokens} tokens and max_new_tokens {max_new_tokens} exceed the {limit} positions of the base; "
            "shorten the prompt or lower max_new_tokens"
        )
    return None
