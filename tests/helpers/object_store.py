"""An S3 server that can go away and come back with all it holds, and an MLflow server that keeps artifacts there."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import requests
from moto.server import ThreadedMotoServer

from helpers.local_store import prepared_home
from rankwise import supervise
from rankwise.settings import child_environment

BUCKET = "artifacts"
_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
_START_S = 120.0


@dataclass
class ObjectStore:
    """moto's server; what it holds lives as long as this process."""

    port: int = 0
    _server: ThreadedMotoServer | None = field(default=None, repr=False)

    def on(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    def off(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {**_KEYS, "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name=_KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id=_KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=_KEYS["AWS_SECRET_ACCESS_KEY"],
        )

    def read(self, end: str) -> dict[str, bytes]:
        """Objects whose key ends so."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        keys = [each["Key"] for page in pages for each in page.get("Contents", ()) if each["Key"].endswith(end)]
        return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


@contextmanager
def tracking_on(store: ObjectStore, home: Path, *, proxied: bool) -> Iterator[str]:
    """An MLflow server whose artifacts are in the object store, through it or past it; its URL."""
    settings = prepared_home(home)
    port = _free_port()
    place = ["--artifacts-destination", f"s3://{BUCKET}/run"]
    if not proxied:
        place = ["--no-serve-artifacts", "--default-artifact-root", f"s3://{BUCKET}/run"]
    command = [sys.executable, "-P", "-m", "mlflow", "server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", *place]
    own = {
        **store.environment,
        "MLFLOW_BACKEND_STORE_URI": settings.tracking_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (home / "server.log").open("wb") as log:
        server = supervise.start(
            command, child_environment(own), grace=supervise.SERVER_GRACE_S, group=True, output=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _await(url, server)
        yield url
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        assert server.poll() is None, "the MLflow server did not start"
        try:
            requests.get(f"{url}/health", timeout=2).raise_for_status()
        except requests.RequestException:
            assert time.monotonic() < deadline, "the MLflow server does not answer"
            time.sleep(0.3)
        else:
            return
