"""What a registered version lists as its requirements suffices: a fresh environment with them alone loads it.

The environment takes minutes and gigabytes; `make proofs` runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from helpers.flavored import make_world
from safetensors.torch import save_file

import rankwise.flavor as flavor

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
CHILD = """
import json, sys
import mlflow, rankwise, torch
from safetensors.torch import load_file
torch.set_num_threads(1)
model = mlflow.pyfunc.load_model("models:/elsewhere@champion")
tokens = torch.arange(4, 28).reshape(2, 12)
tokens[0, -1] = 319
loaded = model.get_raw_model()
with torch.no_grad():
    found = loaded.model(input_ids=tokens).logits
print(json.dumps({
    "answers": model.predict(["carat 0.23", "carat 1.5"], params={"max_new_tokens": 4}),
    "difference": float((found - load_file(sys.argv[1])["logits"]).abs().max()),
    "rankwise": rankwise.__file__,
    "prefix": sys.prefix,
    "path": sys.path,
}))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("environment"))


@pytest.mark.proof
def test_a_fresh_environment_with_the_recorded_requirements_loads_the_model_by_its_alias(world, tmp_path):
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    try:
        info = flavor.log_adapter(world.adapter, world.load_base(), registered_model_name="elsewhere")
        client = mlflow.MlflowClient()
        client.set_registered_model_alias("elsewhere", "champion", "1")
        expected = mlflow.pyfunc.load_model("models:/elsewhere@champion").predict(
            ["carat 0.23", "carat 1.5"], params={"max_new_tokens": 4}
        )
        directory = Path(client.get_logged_model(info.model_id).artifact_location.removeprefix("file://"))
    finally:
        mlflow.set_tracking_uri(before)
    listed = (directory / "requirements.txt").read_text().splitlines()
    (wheel,) = [line for line in listed if line.startswith("wheels/")]
    assert (directory / wheel).is_file()
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    # As MLflow's own environments do: pip runs in the model's directory, where the wheel's path begins.
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "-r", "requirements.txt", "-c", str(CONSTRAINTS)],
        check=True, cwd=directory, env=clean,
    )  # fmt: skip
    save_file({"logits": world.logits.contiguous()}, str(tmp_path / "wanted.safetensors"))
    done = subprocess.run(
        [str(python), "-I", "-W", "ignore", "-c", CHILD, str(tmp_path / "wanted.safetensors")],
        env={
            **clean,
            "MLFLOW_TRACKING_URI": world.settings.tracking_uri,
            "RANKWISE_HOME": str(world.settings.home),
            # An empty cache: the base is quantized anew there.
            "RANKWISE_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
            "HTTP_PROXY": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prefix"] == str(tmp_path / "venv")
    assert found["rankwise"].startswith(str(tmp_path / "venv"))
    assert not [path for path in found["path"] if path.startswith(str(CONSTRAINTS.parent))]
    assert found["answers"] == expected
    assert found["difference"] == 0.0
