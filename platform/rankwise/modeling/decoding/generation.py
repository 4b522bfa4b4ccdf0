"""Text generation for one left-padded batch with transformers: greedy or sampled, stop texts, one seed per row.

Letters: B rows, V vocabulary.

The base's own `generation_config` is ignored, except for its end tokens: many contain a temperature or a repetition
penalty that would change results unnoticed. `Decoding` holds all settings.

Sampling adds Gumbel noise to the logits and takes the argmax, which samples from the softmax exactly (Gumbel 1954;
Maddison et al. 2014, "A* sampling"). The noise comes from a CPU generator per row, so a row gets the same tokens in any
batch and on any device. As in transformers, candidates are limited by `top_k`, then by `top_p`, after the temperature.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from rankwise.exceptions import ConfigError
from rankwise.modeling.rope import position_limit, rope_scaling


def row_generator(seed: int) -> torch.Generator:
    """The random generator of one row."""
    return torch.Generator().manual_seed(seed)


def add_gumbel_noise(
    logits: torch.Tensor, generators: Sequence[torch.Generator], *, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Noisy scores, (B, V) in fp32, whose argmax is a sample from softmax(logits / temperature).

    Only the `top_k` likeliest tokens (0: all), and of these the likeliest with a total probability of at least `top_p`,
    can be sampled; the others get -inf.
    """
    scores = logits.float() / temperature
    vocabulary = scores.shape[-1]
    if 0 < top_k < vocabulary:
        least = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True)
        chances = ordered.softmax(dim=-1)
        # A token stays if those before it do not reach top_p, so the likeliest one always stays.
        drop = (chances.cumsum(dim=-1) - chances) >= top_p
        scores = scores.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    exponential = torch.stack([torch.empty(vocabulary).exponential_(generator=one) for one in generators])
    return scores - exponential.log().to(scores.device)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen.

    Args:
        max_new_tokens: Maximum tokens per row, including the end token; at least 1.
        temperature: 0 takes the likeliest token; above 0 divides the logits before sampling.
        top_k: Sampling keeps this many of the likeliest tokens; 0 keeps all.
        top_p: Sampling keeps the likeliest tokens (after `top_k`) with at least this total probability; in (0, 1].
        stop: Texts that end a row, including special tokens; the row's text ends before them.

    Raises:
        ConfigError: A value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature > 0

    def __post_init__(self) -> None:
        """Reject values out of range, all at once."""
        problems = []
        # The length never equals 2.5, so generation would continue to the last position.
        whole: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "top_k": self.top_k}
        problems += [
            f"{name} must be a whole number, got {value!r}"
            for name, value in whole.items()
            if not isinstance(value, Integral)
        ]
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not (0.0 <= self.temperature < float("inf")):
            problems.append(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k < 0:
            problems.append(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if not (0.0 < self.top_p <= 1.0):
            problems.append(f"top_p must be above 0 and at most 1, got {self.top_p}")
        stop: Any = self.stop
        if isinstance(stop, str) or not all(isinstance(text, str) for text in stop):
            problems.append(f"stop must be a sequence of texts, got {stop!r}")
        if any(not text for text in self.stop):
            problems.append("stop must not contain an empty text: it would end every row at once")
        if problems:
            raise ConfigError("; ".join(problems), tuple(problems))


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Result of one row; `token_ids` include the end token but no padding.

    `text` has no special tokens and is cut before the first stop text. `finish_reason` is `stop` after an end token or
    a stop text, `length` after `max_new_tokens`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


def row_seed(seed: int, row: int | str) -> int:
    """Derive a row's seed, a non-negative 63-bit number, from the call's seed and the row's index or id."""
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of at most `batch_size`, longest first: little padding, and lack of memory shows at once."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def end_token_ids(model: Any, tokenizer: Any, stop: Sequence[str] = ()) -> tuple[int, ...]:
    """Tokens that end a row.

    These are the tokenizer's end token, those of the base's generation configuration, and special tokens among the stop
    texts: decoded text contains no special tokens, so `<|im_end|>` would never match. Special tokens without a role are
    missing from `all_special_tokens`.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])]
    ends += [tokenizer.convert_tokens_to_ids(text) for text in stop if text in tokenizer.all_special_tokens]
    if stop:
        added = tokenizer.added_tokens_decoder.items()
        ends += [number for number, token in added if token.special and token.content in stop]
    return tuple(sorted({int(end) for end in ends if end is not None}))


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue every prompt with a model in evaluation mode; rows keep their order, so callers can route by position.

    Where a row grows into other rotary frequencies (`modeling.rope`), all tokens are computed again at every step.

    Raises:
        ConfigError: A prompt is empty or exceeds the model's positions, or sampling lacks one seed per row.
    """
    if not prompts:
        return []
    _check(model, prompts, decoding, seeds)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ConfigError(
            "the tokenizer has neither a pad nor an end token, so rows of a batch cannot be padded; set a pad_token in "
            "the base's tokenizer_config.json"
        )
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.int64)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=torch.int64)
    device = model.get_input_embeddings().weight.device
    ends = end_token_ids(model, tokenizer, decoding.stop)
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        use_cache=not any(
            rope_scaling(model).changes(len(prompt), len(prompt) + decoding.max_new_tokens) for prompt in prompts
        ),
    )
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        processors.append(_GumbelSampler(decoding, seeds or ()))
    criteria = StoppingCriteriaList()
    if decoding.stop:
        criteria.append(_StopTexts(tokenizer, decoding.stop, width))
    with torch.no_grad(), _own_configuration(model, config):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=criteria,
        )
    rows = output[:, width:].tolist()
    return [finish_row(tokenizer, row, decoding, ends, len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]


def _check(model: Any, prompts: Sequence[Sequence[int]], decoding: Decoding, seeds: Sequence[int] | None) -> None:
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"row {index} has an empty prompt; a prompt needs at least one token")
    longest = max(len(prompt) for prompt in prompts)
    positions = position_limit(model.config)
    if positions is not None and longest + decoding.max_new_tokens > positions:
        raise ConfigError(
            f"the longest prompt has {longest} tokens; with max_new_tokens={decoding.max_new_tokens} that is more than "
            f"the {positions} positions of the base; shorten the prompt or lower max_new_tokens"
        )
    if decoding.temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ConfigError(
            f"sampling (temperature={decoding.temperature}) needs one seed per row, "
            f"got {'none' if seeds is None else len(seeds)} for {len(prompts)} rows"
        )


def finish_row(
    tokenizer: Any, row: Sequence[int], decoding: Decoding, ends: tuple[int, ...], prompt_tokens: int
) -> Generation:
    """Cut a row's tokens after the end token or at a stop text; the rest is padding."""
    end = next((index for index, token in enumerate(row) if token in ends), None)
    tokens = list(row if end is None else row[: end + 1])
    reason: Literal["stop", "length"] = "length" if end is None else "stop"
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    cut = _first_stop(text, decoding.stop)
    if cut is not None:
        reason = "stop"
        text = text[:cut]
        tokens = _until_stop(tokenizer, tokens, decoding.stop)
    return Generation(text=text, token_ids=tuple(tokens), finish_reason=reason, prompt_tokens=prompt_tokens)


def reaches_stop(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether a row's last tokens may have completed a stop text."""
    # Tokens have at least one byte, except special ones; the margin covers those and context-dependent decoding.
    near = max(len(text.encode()) for text in stop) + 8 if stop else 0
    return near > 0 and _first_stop(tokenizer.decode(tokens[-near:], skip_special_tokens=True), stop) is not None


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    offsets = [position for position in (text.find(one) for one in stop) if position >= 0]
    return min(offsets, default=None)


def _until_stop(tokenizer: Any, tokens: list[int], stop: Sequence[str]) -> list[int]:
    """The tokens up to the one that completed a stop text."""

    def stopped(count: int) -> bool:
        return _first_stop(tokenizer.decode(tokens[:count], skip_special_tokens=True), stop) is not None

    # Once complete, a stop text stays in the text, so bisection finds the token that completed it.
    return tokens[: bisect_left(range(len(tokens)), True, lo=1, key=stopped)]


@contextmanager
def _own_configuration(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replace the base's generation configuration, from which `generate` fills unset values."""
    kept = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = kept


class _GumbelSampler(LogitsProcessor):  # type: ignore[misc]
    """Turns the argmax of greedy decoding into a sample."""

    def __init__(self, decoding: Decoding, seeds: Sequence[int]) -> None:
        self.decoding = decoding
        self.generators = [row_generator(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        decoding = self.decoding
        return add_gumbel_noise(
            scores, self.generators, temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p
        )


class _StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its decoded text contains a stop text, however it is tokenized."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], prompt_width: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_width :], skip_special_tokens=True)
        done = [_first_stop(text, self.stop) is not None for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
