"""`mlflow models serve` answers texts and chats over HTTP; `mlflow.models.evaluate` scores the model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from helpers.flavored import make_world

import rankwise.flavor as flavor

CHAT = [{"role": "user", "content": "carat 0.23"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server(world):
    """The address of a server of the stored model, in the current environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "RANKWISE_HOME": str(world.settings.home),
        "RANKWISE_CACHE": str(world.settings.cache),
        "OMP_NUM_THREADS": "1",
        # MLflow starts uvicorn by its name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": world.settings.tracking_uri,
    }
    with (world.root / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(world.saved), "-p", str(port),
             "--env-manager", "local"],
            env=environment, stdout=log, stderr=log, start_new_session=True, cwd=world.root,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=2)
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, (world.root / "server.log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def post(address, body):
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_server_answers_every_form_over_http(server):
    params = {"max_new_tokens": 4}
    (answer,) = post(server, {"inputs": "carat 0.23", "params": params})["predictions"]
    for body in (
        {"inputs": ["carat 0.23"]},
        {"inputs": CHAT},
        {"inputs": [CHAT]},
        {"inputs": [{"messages": CHAT}]},
        {"inputs": {"messages": CHAT}},
        {"instances": ["carat 0.23"]},
        {"dataframe_split": {"columns": ["prompt"], "data": [["carat 0.23"]]}},
        {"dataframe_records": [{"messages": CHAT}]},
    ):
        assert post(server, {**body, "params": params}) == {"predictions": [answer]}, body
    two = {"predictions": [answer, answer]}
    assert post(server, {"inputs": [CHAT, CHAT], "params": params}) == two
    assert post(server, {"inputs": {"messages": [CHAT, CHAT]}, "params": params}) == two
    longer = [{"role": "system", "content": "be brief"}, *CHAT]
    assert (
        len(post(server, {"inputs": [{"messages": CHAT}, {"messages": longer}], "params": params})["predictions"]) == 2
    )
    # The form of chat clients: parameters beside the messages, and a bare list back.
    assert post(server, {"messages": CHAT, **params}) == [answer]
    assert post(server, {"prompt": "carat 0.23", **params}) == [answer]
    status, text = post(server, {"inputs": ["a", ""], "params": params})
    assert status == 400
    assert "row 1: the text is empty" in text


# mlflow 3.17 calls pandas as pandas 4 will not allow.
@pytest.mark.filterwarnings(
    r"ignore:Starting with pandas version 4\.0 all arguments of all will be keyword-only\.\Z",
    r"ignore:The inplace keyword in DataFrame\.drop is deprecated and will be removed in a future version",
)
def test_mlflow_evaluates_a_registered_model(world, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(world.settings.cache))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    try:
        flavor.log_adapter(world.adapter, world.load_base(), registered_model_name="evaluated")
        table = pd.DataFrame({"prompt": ["carat 0.23", "carat 1.5"], "price": ["Price is $326", "Price is $1000"]})
        exact = mlflow.metrics.make_metric(
            eval_fn=lambda predictions, targets: float((predictions == targets).mean()),
            greater_is_better=True,
            name="exact",
        )
        with mlflow.start_run():
            result = mlflow.models.evaluate(
                "models:/evaluated/1",
                table,
                targets="price",
                model_type=None,
                extra_metrics=[exact],
                evaluators="default",
            )
        assert result.metrics["exact"] == 0.0
    finally:
        mlflow.set_tracking_uri(before)
