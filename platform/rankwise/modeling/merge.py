"""Merge an adapter into its base (one model in 16-bit weights, without peft), and measure how well two models agree.

An adapter can be merged into the 16-bit base on disk, which is closer to the published model, or into the dequantized
4-bit base it was trained over, which is closer to what was measured. Each merged weight is computed in float32 and
rounded once.

Letters: A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from rankwise.compat.peft import (
    DEPRECATED_CHECKPOINTING,
    TRANSPOSED_WEIGHT,
    base_name,
    plain_module,
    target_names,
)
from rankwise.compat.transformers import is_conv1d
from rankwise.exceptions import AdapterIntegrityError, ConfigError
from rankwise.modeling.adapter import PREFIX, adapter_tensors, add_rows
from rankwise.modeling.base import expected_warning
from rankwise.modeling.decoding.generation import Decoding, generate_batch, length_batches
from rankwise.modeling.wrappers import has_towers

_NAME = "merged"


def take_dequantized(plain: Any, quantized: Any) -> int:
    """Replace an unquantized model's weights by the dequantized ones of its 4-bit base; return how many.

    The new weights have the dtype that they were quantized from.

    Raises:
        ConfigError: No layer is quantized to 4 bit.
    """
    count = 0
    for name, module in quantized.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        target = plain.get_submodule(base_name(name))
        with torch.no_grad():
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            if is_conv1d(target):
                weight = weight.t().contiguous()
        target.weight = torch.nn.Parameter(weight.to(target.weight.device), requires_grad=False)
        count += 1
    if not count:
        raise ConfigError("no layer of the base is quantized to 4 bit, so there is nothing to dequantize; use 16bit")
    return count


def merge_adapter(plain: Any, config: LoraConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """Merge an adapter into an unquantized base, in place; return a plain transformers model in evaluation mode.

    `tensors` are named as in `modeling.adapter.adapter_tensors`. Meanwhile the weights that the adapter targets are in
    float32: 4 bytes per number. All parameters of the result have `dtype`.

    Raises:
        AdapterIntegrityError: The adapter does not fit, or a merged weight is not finite.
        ConfigError: The adapter changes a weight that embedding and head share.
    """
    add_rows(plain, config)
    own = copy.deepcopy(config)
    own.base_model_name_or_path = plain.name_or_path  # Otherwise peft warns.
    if has_towers(plain):
        # Names that were meant for the text model match in the towers, too.
        own.target_modules = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors if ".lora_" in name}
    with (
        torch.random.fork_rng(devices=[]),
        expected_warning(DEPRECATED_CHECKPOINTING),
        expected_warning(TRANSPOSED_WEIGHT),
        target_names(own),
    ):
        model = get_peft_model(plain, own, adapter_name=_NAME)
    _check_tied(plain)
    places = adapter_tensors(model, _NAME)
    if set(places) != set(tensors):
        differing = sorted(set(places) ^ set(tensors))
        raise AdapterIntegrityError(f"the adapter's tensors do not fit the base: {', '.join(differing[:5])}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            # peft multiplies A and B in their own dtype.
            places[name].data = tensor.detach().to(places[name].device, torch.float32, copy=True)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.get_base_layer().to(torch.float32)
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise AdapterIntegrityError(f"the adapter cannot be merged: {error}") from error
        for parameter in merged.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(False)
    return merged.eval()


def _check_tied(plain: Any) -> None:
    if not getattr(plain.config, "tie_word_embeddings", False):
        return
    for name, module in (("embedding", plain.get_input_embeddings()), ("head", plain.get_output_embeddings())):
        if isinstance(module, BaseTunerLayer) and module is not plain_module(module):
            raise ConfigError(
                f"the adapter changes the {name}, but embedding and head share one weight in this base, so merging "
                "would change both. Load the adapter with rankwise.flavor.load_model instead"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """The first model's greedy answer to a prompt; logits before each answer token: (A, V), fp32, CPU."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of two models over all positions of all answers.

    Attributes:
        equal_greedy_tokens: Share of positions where both models prefer the same token, given the first model's answer
            so far.
        equal_greedy_answers: Share of prompts with the same answer from both models.
        mean_kl: Mean over positions of KL(first || second), in nats.
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
    """Let the first model, in evaluation mode with its adapter active, answer each prompt greedily; keep its logits.

    Prompts are answered in batches, but logits are computed one prompt at a time, without padding.

    Raises:
        ConfigError: There is no prompt, or one is empty or too long.
    """
    if not prompts:
        raise ConfigError("agreement is measured on prompts, but there are none; give at least one")
    answers: dict[int, tuple[int, ...]] = {}
    for batch in length_batches([len(prompt) for prompt in prompts], batch_size):
        generations = generate_batch(
            model, tokenizer, [prompts[index] for index in batch], Decoding(max_new_tokens=max_new_tokens)
        )
        answers.update({index: row.token_ids for index, row in zip(batch, generations, strict=True)})
    return [
        Reference(prompt=tuple(prompt), answer=answers[index], logits=_logits(model, prompt, answers[index]))
        for index, prompt in enumerate(prompts)
    ]


def compare_answers(references: Sequence[Reference], model: Any) -> Agreement:
    """Run the second model along the first one's answers and compare their logits.

    Raises:
        ConfigError: The vocabularies differ.
    """
    same, whole, tokens = 0, 0, 0
    largest, total, worst = 0.0, 0.0, 0.0
    for reference in references:
        other = _logits(model, reference.prompt, reference.answer)
        if other.shape != reference.logits.shape:
            raise ConfigError(
                f"the models have vocabularies of {reference.logits.shape[1]} and {other.shape[1]} tokens"
            )
        equal = reference.logits.argmax(-1) == other.argmax(-1)
        first, second = reference.logits.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence = (first.exp() * (first - second)).sum(-1)
        tokens += len(reference.answer)
        same += int(equal.sum())
        whole += bool(equal.all())
        largest = max(largest, float((reference.logits - other).abs().max()))
        total += float(divergence.sum())
        worst = max(worst, float(divergence.max()))
    return Agreement(
        prompts=len(references),
        tokens=tokens,
        equal_greedy_tokens=same / tokens,
        equal_greedy_answers=whole / len(references),
        max_logit_difference=largest,
        # Rounding can make the divergence of equal distributions negative.
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
