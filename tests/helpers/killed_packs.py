"""Train a pack again and again, killed by SIGKILL at random moments, each time in a process of its own.

    python -m helpers.killed_packs DIRECTORY RUNS

The children are forked from one process that has imported torch and loaded the base, and has never run a backward pass.
DIRECTORY/reference has the undisturbed pack, DIRECTORY/run-N the others; a line on stdout tells of each kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from helpers.packs import Recorder, load_tiny, make_arm, make_rows
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack

STEPS = 9


def make_tasks():
    """Three arms that differ; one ends early, one is evaluated."""
    rows = make_rows(20)
    arms = [
        make_arm(
            seed=1,
            lora={"lora_dropout": 0.2},
            training={"max_steps": STEPS, "save_steps": 2, "lr_scheduler_type": "cosine"},
        ),
        make_arm(seed=2, lora={"r": 8}, training={"max_steps": 5, "gradient_accumulation_steps": 2, "eval_steps": 2}),
        make_arm(
            seed=3,
            lora={"target_modules": "all-linear"},
            training={"max_steps": STEPS, "save_steps": 2, "weight_decay": 0.1},
        ),
    ]
    return [ArmTask(spec=arm, train=rows, evaluation=rows[:4]) for arm in arms]


class KillAt(Recorder):
    """Kills its own process when any arm has made a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step(self, spec_hash, record):
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(base, directory, *, kill_at=None, kill_after=None):
    """Train in a forked process; return whether it lived to the end."""
    child = os.fork()
    if child == 0:
        observer = Recorder() if kill_at is None else KillAt(kill_at)
        train_pack(base, make_tasks(), directory=directory, observer=observer)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def main(directory: Path, runs: int) -> None:
    """Run the reference and the killed packs."""
    torch.set_num_threads(1)
    base = load_tiny(directory / "base")
    began = time.monotonic()
    assert in_child(base, directory / "reference")
    duration = time.monotonic() - began
    for run in range(runs):
        draw = random.Random(run)
        place = directory / f"run-{run}"
        for _ in range(draw.randint(1, 2)):
            moment = {"kill_at": draw.randint(1, STEPS)} if run % 2 else {"kill_after": draw.uniform(0.0, duration)}
            lived = in_child(base, place, **moment)
            print(run, moment, "ended before" if lived else "killed", flush=True)
        assert in_child(base, place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
