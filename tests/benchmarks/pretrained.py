"""A small base that has learnt something, and what adapters are to learn over it: a stand-in for sweeps on real bases.

A random base is no model of what an adapter does to a trained one. This one (two layers, 64 wide) is trained from
scratch on three tasks over digits until it has them, and gets NF4 like any other. What it stands in for, and how:

- Adapters learn what the base knows under another name, as fine-tuning mostly does: losses fall early, then slowly.
- A share of what is to be foretold is left to chance, as in every text: the loss has a floor, and good arms lie within
  some percent of one another.
- A step sees 8 rows with 8 digits each, about 130 supervised tokens; 1,024 rows are one epoch of 128 steps. With the
  24 tokens a step that were tried first, gradients are noisier than those of any real sweep: arms differ at a rung by
  their noise, and a large learning rate shows what it is worth only when the schedule has lowered it.
- Cosine with a warm-up of one sixteenth, rankwise's default schedule; 256 evaluation rows; no dropout.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from helpers.tiny import make_base
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.subjects import Subject

SMALL_BATCH = 8
SMALL_STEPS = 128
SMALL_EVALUATION_ROWS = 256
_ROWS = SMALL_BATCH * SMALL_STEPS
_WARMUP = 8
_LEARNT = ("same", "up", "down")
_BATCH, _LENGTH = 24, 8
_CERTAIN = 0.7


def small_subject(base: Path, directory: Path, seed: int) -> Subject:
    """The base, and rows of what it has not learnt, other ones for each seed."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = directory / "raise.jsonl"
    first = seed * 100_000
    examples = [example(first + number, "raise") for number in range(_ROWS + SMALL_EVALUATION_ROWS)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
    dataset = {
        "train": str(rows),
        "eval": {"split_from": "train", "rows": SMALL_EVALUATION_ROWS, "seed": 0},
        "limit": {"train": _ROWS, "eval": SMALL_EVALUATION_ROWS},
        "prompt": "{prompt}",
        "completion": "{completion}",
    }
    training = {"lr_scheduler_type": "cosine", "warmup_steps": _WARMUP}
    sections = {"base_model": str(base), "dataset": dataset, "training": training}
    return Subject(name="a small base, pretrained here", sections=sections)


def example(number: int, task: str) -> dict[str, str]:
    """One row: digits, and what becomes of them.

    `raise` is what adapters are to learn: it is `up`, but for a share of digits that are left to chance.
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


def make_pretrained_base(path: Path, steps: int) -> Path:
    """Train a tiny base on three tasks and write it; 600 steps take a quarter of a minute."""
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
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for step in range(steps):
        texts = []
        for row in range(_BATCH):
            one = example(step * _BATCH + row, _LEARNT[row % len(_LEARNT)])
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
