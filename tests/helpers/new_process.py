"""Stored adapters loaded by alias in a new process without a network, and compared with the logits from before."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from helpers import warm

CHILD = """
import json, os, sys
import torch
from safetensors.torch import load_file
import mlflow
from huggingface_hub import constants
import rankwise.flavor as flavor
# A process whose libraries are imported already has read this variable before it was set.
constants.HF_HUB_CACHE = os.environ.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
torch.set_num_threads(1)
mlflow.set_tracking_uri(sys.argv[1])
wanted = load_file(sys.argv[2])
found = {}
for name in wanted:
    loaded = flavor.load_model(f"models:/{name}@champion")
    tokens = torch.arange(4, 28).reshape(2, 12)
    tokens[0, -1] = wanted[name].shape[-1] - 1
    with torch.no_grad():
        got = loaded.model(input_ids=tokens).logits
    found[name] = {
        "difference": float((got - wanted[name]).abs().max()),
        "dtype": str(got.dtype),
        "overrides": [str(override) for override in loaded.overrides],
        "template": loaded.tokenizer.chat_template,
        "tokens": loaded.tokenizer("a <|price|> b")["input_ids"],
    }
print(json.dumps(found))
"""


def load_elsewhere(
    settings, wanted: dict[str, Any], directory: Path, *, python: str | None = None, **environment: str
) -> dict[str, Any]:
    """Load every model by its alias `champion`; what was found, by name.

    Args:
        settings: Of the store and the caches.
        wanted: The logits of `helpers.bases.logits` by the name of the model.
        directory: For the logits; the process runs in it.
        python: The interpreter; by default one whose libraries are imported already.
        **environment: More variables of the process.
    """
    from safetensors.torch import save_file

    save_file(wanted, str(directory / "wanted.safetensors"))
    # Whatever tries to reach a network fails at once.
    nowhere = "http://127.0.0.1:9"
    own = {
        "RANKWISE_HOME": str(settings.home),
        "RANKWISE_CACHE": str(settings.cache),
        "HF_HUB_OFFLINE": "1",
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
    }
    done = subprocess.run(
        [python or warm.python(), "-c", CHILD, settings.tracking_uri, str(directory / "wanted.safetensors")],
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def set_champion(name: str, info: Any) -> None:
    """Point the alias `champion` of a registered model to what was just logged."""
    import mlflow

    mlflow.MlflowClient().set_registered_model_alias(name, "champion", info.registered_model_version)
