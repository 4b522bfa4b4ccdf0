"""How far two models agree on a sample of prompts: token by token along the first one's greedy answers.

Letters: A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rankwise.exceptions import ConfigError
from rankwise.modeling.generation import Decoding, generate_batch, length_batches


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What the first model says to one prompt.

    Attributes:
        prompt: Token ids.
        answer: Token ids of its greedy answer.
        logits: (A, V) in fp32 on the CPU: what it chose each token of the answer from.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What was measured, over all positions of all answers.

    Attributes:
        prompts: How many prompts.
        tokens: How many positions, over all answers.
        equal_greedy_tokens: Share of positions at which both models hold the same token for the likeliest, both given
            the first model's answer so far.
        equal_greedy_answers: Share of prompts with that at every position, so that both give the same answer.
        max_logit_difference: Largest absolute difference of a logit.
        mean_kl: Mean over positions of KL(first || second), in nats.
        max_kl: The largest one.
    """

    prompts: int
    tokens: int
    equal_greedy_tokens: float
    equal_greedy_answers: float
    max_logit_difference: float
    mean_kl: float
    max_kl: float

    def to_dict(self) -> dict[str, float]:
        """As plain numbers."""
        return asdict(self)


def record_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int = 8
) -> list[Reference]:
    """Let the first model answer each prompt greedily, and keep the logits.

    Args:
        model: A causal language model in evaluation mode, its adapter active.
        tokenizer: Names the padding and end tokens.
        prompts: Token ids, at least one prompt.
        max_new_tokens: Longest answer.
        batch_size: Prompts answered together; logits are computed one prompt at a time, without padding.

    Raises:
        ConfigError: There is no prompt, or one is empty or too long.
    """
    if not prompts:
        raise ConfigError("agreement is measured on prompts; there is none")
    answers: dict[int, tuple[int, ...]] = {}
    for batch in length_batches([len(prompt) for prompt in prompts], batch_size):
        made = generate_batch(
            model, tokenizer, [prompts[index] for index in batch], Decoding(max_new_tokens=max_new_tokens)
        )
        answers.update({index: row.token_ids for index, row in zip(batch, made, strict=True)})
    return [
        Reference(prompt=tuple(prompt), answer=answers[index], logits=_logits(model, prompt, answers[index]))
        for index, prompt in enumerate(prompts)
    ]


def compare_answers(references: Sequence[Reference], model: Any) -> Agreement:
    """Let the second model go along the first one's answers.

    Args:
        references: Of the first model.
        model: The second one, of the same vocabulary.

    Raises:
        ConfigError: The vocabularies differ.
    """
    same, whole, tokens = 0, 0, 0
    largest, total, worst = 0.0, 0.0, 0.0
    for one in references:
        other = _logits(model, one.prompt, one.answer)
        if other.shape != one.logits.shape:
            raise ConfigError(f"the models have vocabularies of {one.logits.shape[1]} and {other.shape[1]} tokens")
        equal = one.logits.argmax(-1) == other.argmax(-1)
        first, second = one.logits.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence = (first.exp() * (first - second)).sum(-1)
        tokens += len(one.answer)
        same += int(equal.sum())
        whole += bool(equal.all())
        largest = max(largest, float((one.logits - other).abs().max()))
        total += float(divergence.sum())
        worst = max(worst, float(divergence.max()))
    return Agreement(
        prompts=len(references),
        tokens=tokens,
        equal_greedy_tokens=same / tokens,
        equal_greedy_answers=whole / len(references),
        max_logit_difference=largest,
        # Rounding can take the divergence of equal distributions below 0.
        mean_kl=max(0.0, total / tokens),
        max_kl=max(0.0, worst),
    )


@torch.no_grad()
def _logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """(A, V): the logits before each token of the answer."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, len(prompt) - 1 :].float().cpu()  # type: ignore[no-any-return]
