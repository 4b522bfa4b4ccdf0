"""Writes `VERSION.tar.xz` beside this file: a project whose home has a bit of everything, made by that version.

Run once for a release, with that release installed, on a CPU, by a user who may create `/home-of-rankwise`:

    PYTHONPATH=tests python tests/helpers/homes/make.py

A home that is there is never overwritten: later versions are tested on what the earlier one wrote.

In the project are `base`, `rows.jsonl`, `ask.jsonl`, `expected.json`, and in its home `mlruns`

- a finished sweep `done` of three arms, registered as `tiny-adder` 1 to 3; the best has the alias `best`,
- an evaluation, a forced promotion of version 1 to `champion`, then of version 2,
- a sweep `paused` of one arm that a signal stopped after a checkpoint; it is queued again,
- a sweep `queued` of two arms that no worker has claimed, and a prediction in two parts, queued.

`expected.json` has the comparison of `done`, all jobs, the step of the paused arm's last checkpoint, the answers of
`predict`, and logits of two adapters.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from helpers.homes import ROOT, replace_in_database
from helpers.project import sums, write_rows

HERE = Path(__file__).parent
# `tests/acceptance/test_old_home.py` uses SWEEPS, PREDICT and LOGITS too: they describe every home that is stored here.
DEFINITION = """\
version: 1
name: {name}
description: Which rank learns to add?
base_model: ./base
lora: {{r: 4, lora_alpha: 2*r, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}}
dataset:
  train: ./rows.jsonl
  eval: {{split_from: train, rows: 12, seed: 0}}
  prompt: "{{a}} plus {{b}}"
  completion: "{{sum}}"
training:
  {{max_steps: {steps}, per_device_train_batch_size: 4, learning_rate: 1e-2, max_length: 64, save_steps: {save}}}
sweep: {{parameters: {{seed: [{seed}], lora.r: {ranks}}}}}
evaluation: {{metrics: [loss, exact_match, number], primary_metric: eval.loss, max_new_tokens: 4}}
promotion: {{min_examples: 5, max_overlap: 0.5}}
register: {{name: tiny-adder, alias: {alias}}}
"""
SWEEPS = {
    "done": {"steps": 20, "save": 5, "seed": 0, "ranks": [2, 4, 8], "alias": "best"},
    "paused": {"steps": 200, "save": 10, "seed": 1, "ranks": [2], "alias": "best-paused"},
    "queued": {"steps": 10, "save": 5, "seed": 2, "ranks": [2, 4], "alias": "best-queued"},
}
PREDICT = [
    "predict", "--model", "models:/tiny-adder/3", "--prompt", "{a} plus {b}", "--max-new-tokens", "4", "ask.jsonl",
]  # fmt: skip
# Names of the machine and of its user do not belong into the repository.
NAMELESS = """
import platform, socket
socket.gethostname = socket.getfqdn = platform.node = lambda *_: "machine"
platform.release = lambda: "0"
"""
LOGITS = """
import json, sys, torch, mlflow
import rankwise.flavor as flavor
mlflow.set_tracking_uri(sys.argv[1])
torch.set_num_threads(1)
found = {}
for uri in sys.argv[2:]:
    adapter = flavor.load_model(uri)
    with torch.no_grad():
        logits = adapter.model(input_ids=torch.arange(4, 28).reshape(2, 12)).logits
    found[uri] = logits[:, -1].float().tolist()
print(json.dumps(found))
"""
"""A program that prints the logits of the last tokens; its arguments are the tracking URI and the models."""


def main() -> None:
    """Write the home of the installed version."""
    target = HERE / f"{version('rankwise')}.tar.xz"
    if target.exists():
        sys.exit(f"{target} is there; homes are never written anew")
    root = Path(ROOT)
    root.mkdir()
    try:
        fill(root)
        scrub(root)
        pack(root, target)
    finally:
        shutil.rmtree(root)
    print(f"{target}: {target.stat().st_size:,} bytes")


def fill(root: Path) -> None:
    """Write the project."""
    shutil.copytree(HERE.parent / "tiny_base", root / "base")
    write_rows(root / "rows.jsonl", sums(80))
    write_rows(root / "ask.jsonl", [{"a": n % 7, "b": n % 3} for n in range(6)])
    for name, values in SWEEPS.items():
        (root / f"{name}.yaml").write_text(DEFINITION.format(name=name, **values), encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "sitecustomize.py").write_text(NAMELESS, encoding="utf-8")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RANKWISE_", "MLFLOW_"))},
            "PYTHONPATH": directory,
            "RANKWISE_HOME": f"{root}/mlruns",
            "RANKWISE_CACHE": f"{directory}/cache",
            "RANKWISE_COMPUTE_DTYPE": "float32",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "LOGNAME": "user",
        }
        commands(root, environment)


def commands(root: Path, environment: dict[str, str]) -> None:
    """What fills the home, in order; `expected.json` comes last."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "rankwise", *arguments],
            cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    run("run", "done.yaml")
    run("evaluate", "models:/tiny-adder@best", "--json")
    for number in ("1", "2"):
        run("promote", "tiny-adder", "--candidate", number, "--force", "--reason", "for this home")
    run(*PREDICT, "answers.jsonl")
    run("submit", "paused.yaml")
    pause(root, environment)
    run("submit", "queued.yaml")
    run(*PREDICT, "queued-answers.jsonl", "--submit", "--shard-rows", "2", "--shards", "2")
    models = ["models:/tiny-adder@best", "models:/tiny-adder/1"]
    logits = subprocess.run(
        [sys.executable, "-c", LOGITS, f"sqlite:///{root}/mlruns/mlflow.db", *models],
        cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    expected = {
        "comparison": json.loads(run("compare", "done", "--json")),
        "jobs": json.loads(run("jobs", "list", "--json")),
        "paused_at": max(steps(root)),
        "answers": [json.loads(line) for line in (root / "answers.jsonl").read_text(encoding="utf-8").splitlines()],
        "logits": json.loads(logits.stdout),
    }
    (root / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def pause(root: Path, environment: dict[str, str]) -> None:
    """Start a worker, and stop it when it has written a checkpoint."""
    worker = subprocess.Popen([sys.executable, "-m", "rankwise", "worker", "--drain"], cwd=root, env=environment)
    while not steps(root):
        if worker.poll() is not None:
            raise RuntimeError(f"the worker ended with {worker.returncode} before it had written a checkpoint")
        time.sleep(0.01)
    worker.send_signal(signal.SIGTERM)
    worker.wait()


def steps(root: Path) -> list[int]:
    """Steps of the checkpoints."""
    found = (root / "mlruns" / "checkpoints").glob("*/step-*/manifest.json")
    return [int(path.parent.name.removeprefix("step-")) for path in found]


def scrub(root: Path) -> None:
    """Take out what the machine is made of."""
    for path in root.rglob("provenance.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        with closing(sqlite3.connect(root / "mlruns" / "mlflow.db")) as database, database:
            replace_in_database(database, facts["cpu"], "CPU")
        facts |= {"cpu": "CPU", "cpu_count": 1, "memory_bytes": 1}
        path.write_text(json.dumps(facts, indent=1), encoding="utf-8")


def pack(root: Path, target: Path) -> None:
    """Write the archive, without who owned the files and when they were written."""
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(str(path.relative_to(root)))
                content = path.read_bytes()
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
