"""The flavor stands alone."""

from __future__ import annotations

import json
import subprocess
import sys

from helpers import warm


def test_the_flavor_pulls_in_no_queue_no_command_line_and_no_training():
    code = "import json, sys, rankwise.flavor; print(json.dumps([n for n in sys.modules if n.startswith('rankwise.')]))"
    done = subprocess.run([warm.python(), "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert loaded.isdisjoint(
        {f"rankwise.{name}" for name in ("jobs", "cli", "tasks", "worker", "training", "evaluation", "inference")}
    )
    assert done.stderr == ""


def test_pull_s_help_needs_neither_torch_nor_mlflow():
    code = (
        "import sys, rankwise.cli.registry; print([n for n in ('torch', 'mlflow', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
