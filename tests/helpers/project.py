"""A small project as a user has it: a base, rows, an experiment file; and the command line run in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import warm
from helpers.local_store import prepared_home
from helpers.tiny import make_base

DEFINITION = """\
version: 1
name: tiny
description: Which rank learns to add?
base_model: {base}
lora: {{r: 4, lora_alpha: 2*r, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}}
dataset:
  train: {rows}
  eval: {{split_from: train, rows: 12, seed: 0}}
  prompt: "{{a}} plus {{b}}"
  completion: "{{sum}}"
training: {{max_steps: 6, per_device_train_batch_size: 4, learning_rate: 1e-2, max_length: 64, save_steps: 2}}
sweep: {{parameters: {{lora.r: [2, 4]}}}}
evaluation: {{metrics: [loss, token_accuracy, exact_match, number], primary_metric: eval.loss, max_new_tokens: 4}}
register: {{name: tiny-adder, alias: best}}
"""


@dataclass(frozen=True)
class Project:
    """A directory with an experiment, and an environment of its own."""

    directory: Path

    @property
    def file(self) -> Path:
        return self.directory / "tiny.yaml"

    @property
    def home(self) -> Path:
        return self.directory / "mlruns"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RANKWISE_", "MLFLOW_"))}
        cache = str(self.directory / "cache")
        # One thread: many processes of one test run share two cores.
        own = {"RANKWISE_HOME": str(self.home), "RANKWISE_CACHE": cache, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return {**kept, **own, **(extra or {})}

    def command(self, *arguments: str) -> list[str]:
        return [warm.python(), "-m", "rankwise", *arguments]

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 300, cold: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command; `cold` in a new interpreter, otherwise where the libraries are imported already."""
        if not cold and not any(name.startswith(warm.READ_AT_IMPORT) for name in env or {}):
            return warm.run(
                ["-m", "rankwise", *arguments], cwd=self.directory, env=self.environment(env), timeout=timeout
            )
        return subprocess.run(
            [sys.executable, "-m", "rankwise", *arguments],
            cwd=self.directory,
            env=self.environment(env),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def succeed(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """Run a command that must succeed, and return what it printed on stdout."""
        done = self.run(*arguments, env=env)
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def sums(count: int) -> list[dict[str, int]]:
    return [{"a": n % 7, "b": n % 5, "sum": n % 7 + n % 5} for n in range(count)]


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_project(directory: Path, *, fresh: bool = False) -> Project:
    """Write a base, 80 rows and `tiny.yaml`; unless `fresh`, the MLflow database is there already."""
    directory.mkdir(parents=True, exist_ok=True)
    make_base(directory / "base")
    write_rows(directory / "rows.jsonl", sums(80))
    (directory / "tiny.yaml").write_text(DEFINITION.format(base="./base", rows="./rows.jsonl"))
    project = Project(directory)
    if not fresh:
        prepared_home(project.home)
    return project
