"""Ways to answer rows of several adapters: peft and transformers' `generate`, and this project's mixed batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig

from rankwise.compat.peft import SEVERAL_ADAPTERS
from rankwise.modeling.base import LoadedBase, expected_warning
from rankwise.modeling.decoding.generation import Decoding, end_token_ids
from rankwise.modeling.decoding.scheduler import Prompt, generate
from rankwise.modeling.lora.lean import keep_dequantized
from rankwise.modeling.lora.packed import uninstall

OURS = "rankwise, mixed batch"
PLAIN = "peft + generate, one adapter after another"
KEPT = "peft + generate over weights kept dequantized"
NAMES = "peft, adapter_names= in one batch"
NAMES_KEPT = "adapter_names= over weights kept dequantized"
WAYS = (OURS, PLAIN, KEPT, NAMES, NAMES_KEPT)
Tokens = list[tuple[int, ...]]
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way, once.

    `peak` is the largest memory allocated on a GPU meanwhile, in bytes; `passes` are those through the base.
    """

    tokens: Tokens
    wall: float
    cpu: float
    peak: int
    passes: int


class Fleet:
    """Adapters with random matrices over one base, to be run by peft or by rankwise."""

    def __init__(self, base: LoadedBase, ranks: Sequence[int], targets: Sequence[str], max_new_tokens: int) -> None:
        self.base = base
        self.names = [f"arm-{at}" for at in range(len(ranks))]
        self.max_new_tokens = max_new_tokens
        self.ends = end_token_ids(base.model, base.tokenizer)
        self.peft: Any = None
        torch.manual_seed(0)
        for name, r in zip(self.names, ranks, strict=True):
            config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets), task_type="CAUSAL_LM")
            with expected_warning(SEVERAL_ADAPTERS):
                if self.peft is None:
                    self.peft = get_peft_model(base.model, config, adapter_name=name)
                else:
                    self.peft.add_adapter(name, config)
        for name, parameter in self.peft.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.02)
        self.peft.requires_grad_(False)
        self.peft.eval()

    @contextmanager
    def ending(self, ends: Sequence[int], max_new_tokens: int) -> Iterator[None]:
        """Let rows end at other tokens and at another length inside the block, whatever the way."""
        config = self.base.model.generation_config
        kept = self.ends, self.max_new_tokens, config.eos_token_id
        config.eos_token_id = list(ends)
        self.max_new_tokens = max_new_tokens
        self.ends = end_token_ids(self.base.model, self.base.tokenizer)
        try:
            yield
        finally:
            self.ends, self.max_new_tokens, config.eos_token_id = kept

    def run(self, way: str, prompts: Sequence[tuple[str, tuple[int, ...]]], batch_size: int | None = None) -> Trial:
        """Answer prompts, each under the adapter that it names, greedily, at most so many at a time."""
        batch_size = batch_size or len(prompts)
        kept = way in {OURS, KEPT, NAMES_KEPT}
        with keep_dequantized(self.base.model) if kept else nullcontext():
            work: Callable[[Sequence[tuple[str, tuple[int, ...]]], int], Tokens]
            work = self.answers if way == OURS else self._names if way in {NAMES, NAMES_KEPT} else self._plain
            if way != OURS:
                uninstall(self.base.model)
            self._wait()
            cuda = self.base.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.base.device)
            passes: list[None] = []
            hook = self.base.model.base_model.register_forward_pre_hook(lambda *_: passes.append(None))
            try:
                wall, cpu = time.perf_counter(), time.process_time()
                tokens = work(prompts, batch_size)
                self._wait()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            finally:
                hook.remove()
            peak = int(torch.cuda.max_memory_allocated(self.base.device)) if cuda else 0
            return Trial(tokens=tokens, wall=wall, cpu=cpu, peak=peak, passes=len(passes))

    def answers(self, prompts: Sequence[tuple[str, tuple[int, ...]]], batch_size: int) -> Tokens:
        """Through rankwise's engine."""
        rows = [Prompt(token_ids=ids, adapter=adapter) for adapter, ids in prompts]
        made = generate(self.base, rows, Decoding(max_new_tokens=self.max_new_tokens), batch_size=batch_size)
        return [row.token_ids for row in made]

    def _plain(self, prompts: Sequence[tuple[str, tuple[int, ...]]], batch_size: int) -> Tokens:
        found: dict[int, tuple[int, ...]] = {}
        for name in self.names:
            self.peft.set_adapter(name)
            mine = [at for at, (adapter, _) in enumerate(prompts) if adapter == name]
            for some in _chunks(mine, batch_size):
                found |= dict(zip(some, self._generate([prompts[at][1] for at in some]), strict=True))
        self.peft.requires_grad_(False)
        return [found[at] for at in range(len(prompts))]

    def _names(self, prompts: Sequence[tuple[str, tuple[int, ...]]], batch_size: int) -> Tokens:
        made: Tokens = []
        for some in _chunks(prompts, batch_size):
            made += self._generate([ids for _, ids in some], adapter_names=[adapter for adapter, _ in some])
        return made

    def _generate(self, prompts: Sequence[tuple[int, ...]], **extra: Any) -> Tokens:
        pad = self.base.tokenizer.pad_token_id
        pad = self.ends[0] if pad is None else pad
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=list(self.ends), pad_token_id=pad
        )
        with torch.no_grad():
            out = self.peft.generate(
                input_ids=ids.to(self.base.device),
                attention_mask=mask.to(self.base.device),
                generation_config=config,
                **extra,
            )
        return [self._cut(row) for row in out[:, width:].tolist()]

    def _cut(self, row: list[int]) -> tuple[int, ...]:
        end = next((at for at, token in enumerate(row) if token in self.ends), len(row) - 1)
        return tuple(row[: end + 1])

    def _wait(self) -> None:
        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)

    def margin(self, prompt: tuple[str, tuple[int, ...]], answer: Sequence[int], other: Sequence[int]) -> float:
        """Where two answers part: how much the likeliest token's logit is above that of the other answer's token."""
        at = next(n for n in range(max(len(answer), len(other))) if answer[n : n + 1] != other[n : n + 1])
        adapter, ids = prompt
        uninstall(self.base.model)
        self.peft.set_adapter(adapter)
        with torch.no_grad():
            tokens = torch.tensor([[*ids, *answer[:at]]], device=self.base.device)
            logits = self.base.model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        self.peft.requires_grad_(False)
        return float((logits[answer[at]] - logits[other[at]]).abs())


def _chunks(entries: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))
