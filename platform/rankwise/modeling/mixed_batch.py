"""Decode many prompts at once, each under its own adapter, over one loaded base.

Rows of all adapters share each step, a row that has ended gives its place to the next one
(`modeling/continuous.py`). Positions count from each prompt's own first token, and a sampled row draws from its own
seed: what a row generates depends neither on its neighbours nor on the batch size, beyond the rounding of the matrix
products, by which a choice between two all but equal tokens can flip (`make bench-inference` measures how often).

A model whose layers keep something else than keys and values (a window, a state) is decoded by transformers' own
`generate` in batches of similar length, sorted by adapter; so are rows of an adapter that is not plain LoRA, by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rankwise.assets.progress import SILENT, Progress
from rankwise.exceptions import ConfigError
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.engine_fit import engine_of
from rankwise.modeling.flight import Prompt, in_flight
from rankwise.modeling.forward import evaluating, segments_of
from rankwise.modeling.generation import Decoding, Generated, generate_batch, length_batches
from rankwise.modeling.own_forward import not_plain, own_forward
from rankwise.modeling.packed_lora import Routing, packed_forwards
from rankwise.modeling.pass_lock import pass_lock
from rankwise.modeling.replaced_forward import replaced_forward

logger = logging.getLogger(__name__)

__all__ = ["Prompt", "encode_prompts", "generate", "generate_each", "greedy", "prompt_problem"]


def encode_prompts(base: LoadedBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of rendered prompts. The chat template has put all special tokens in already, so none are added."""
    if not texts:
        return []
    return [tuple(ids) for ids in base.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def generate(
    base: LoadedBase,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    progress: Progress | None = None,
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
    base: LoadedBase, *, max_new_tokens: int, batch_size: int, progress: Progress | None = None
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
