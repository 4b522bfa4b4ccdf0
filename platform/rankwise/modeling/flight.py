"""The loop over the rows in work: who comes in, which token is next, who leaves; what to do when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.exceptions import JobError
from rankwise.modeling.continuous import Engine, Flight, Row, waiting
from rankwise.modeling.generation import Decoding, Generated, end_token_ids, finish, stops
from rankwise.modeling.out_of_memory import is_out_of_memory
from rankwise.modeling.sampling import generator, noisy

logger = logging.getLogger(__name__)

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
