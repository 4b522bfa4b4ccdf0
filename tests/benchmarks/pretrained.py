"""A small base that has learnt something: a random one is no model of what an adapter does to a trained one."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from helpers.tiny import make_base
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

LEARNT = ("same", "up", "down")
_STEPS, _BATCH, _LENGTH = 250, 24, 4
_CERTAIN = 0.7


def example(number: int, task: str) -> dict[str, str]:
    """One row: digits, and what becomes of them.

    `raise` is what adapters are to learn: what the base knows under another name, but a share of the digits is left to
    chance, as there is something in every text that cannot be foretold: the loss has a floor, and good arms lie close
    together.
    """
    draw = random.Random(f"{task} {number}")
    digits = [draw.randint(1, 7) for _ in range(_LENGTH)]
    after = {
        "same": digits,
        "up": [digit + 1 for digit in digits],
        "down": [digit - 1 for digit in digits],
        "raise": [digit + 1 if draw.random() < _CERTAIN else draw.randint(1, 9) for digit in digits],
    }[task]
    return {"prompt": f"{task} {' '.join(map(str, digits))}", "completion": " ".join(map(str, after))}


def make_pretrained_base(path: Path) -> Path:
    """Train a tiny base on three tasks, for some seconds, and write it."""
    make_base(path, hidden_size=64, layers=2)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=_STEPS)
    model.train()
    for step in range(_STEPS):
        texts = []
        for row in range(_BATCH):
            one = example(step * _BATCH + row, LEARNT[row % len(LEARNT)])
            chat = [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one["completion"]}]
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(path)
    return path
