"""MLflow's own server on the store of this project: for the UI on one machine, and for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from rankwise.exceptions import TrackingError
from rankwise.settings import Settings, child_environment, storage_errors

# A cold start was seen to take 40 seconds.
_START_SECONDS = 120.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
# On by default in MLflow, and not needed to look at results: running jobs for whoever reaches the server, pickles.
_SAFE = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server.

    Attributes:
        url: Where it answers.
        log: What it says goes to this file.
        process: What holds it: it ends when this process does, however that comes about.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        """Return when the server ends by itself.

        Raises:
            TrackingError: It ended with an error.
        """
        if code := self.process.wait():
            raise TrackingError(f"the MLflow server ended with {code}: {_last_lines(self.log)}")


def is_remote(uri: str) -> bool:
    """Whether a tracking URI names a server with a UI of its own."""
    return uri.startswith(("http://", "https://", "databricks"))


@contextmanager
def serve(settings: Settings, host: str = "127.0.0.1", port: int = 5000) -> Iterator[Server]:
    """Run a server until the block ends; it answers when the block begins.

    The store must be there already (`connect`): MLflow's migrations race.

    Args:
        settings: The store, which must not be a server itself.
        host: Network interface. Anything but loopback is open to whoever reaches it: there is no authentication.
        port: 0 takes a free one.

    Raises:
        TrackingError: The port is in use, or the server does not start.
        StorageError: The log cannot be written.
    """
    port = _free_port(host, port)
    log = settings.home / "logs" / "mlflow-server.log"
    with storage_errors(log, "starting the MLflow server"):
        log.parent.mkdir(parents=True, exist_ok=True)
        settings.artifacts.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    # -P: a module of the working directory must not stand in for one of MLflow's.
    command = [sys.executable, "-P", "-m", "rankwise.tracking.tied"]
    command += [sys.executable, "-P", "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--no-serve-artifacts", "--default-artifact-root", settings.artifacts.as_uri()]
    with output:
        process = subprocess.Popen(
            command,
            env=_environment(settings, host),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which then ends the server.
        )
    address = "127.0.0.1" if host in {"0.0.0.0", "localhost"} else f"[{host}]" if ":" in host else host
    server = Server(url=f"http://{address}:{port}", log=log, process=process)
    try:
        _await(server)
        yield server
    finally:
        _stop(process)


def _environment(settings: Settings, host: str) -> Mapping[str, str]:
    # The store's URI may hold a password: in the environment, other users of the machine do not see it.
    changes = {**_SAFE, "MLFLOW_BACKEND_STORE_URI": settings.tracking_uri}
    defaults = {"MLFLOW_DISABLE_TELEMETRY": "true"}
    # MLflow's default takes any name that begins like a private address, such as 10.attacker.example.
    names = ["localhost", "127.0.0.1", "[::1]"]
    if host not in _LOOPBACK:
        names += [socket.gethostname(), host]
    hosts = [entry for name in names for entry in (name, f"{name.replace('[', '[[]')}:*")]
    defaults["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(hosts)
    return child_environment(changes, defaults)


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TrackingError(
                f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0) if error.errno else error}; "
                "name another port (--port), or 0 for a free one"
            ) from error
        found = probe.getsockname()[1]
    assert isinstance(found, int)
    return found


def _await(server: Server) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with requests.Session() as session:
        session.trust_env = False  # A proxy is not asked for this machine.
        while True:
            if server.process.poll() is not None:
                raise TrackingError(f"the MLflow server did not start: {_last_lines(server.log)}")
            try:
                if session.get(f"{server.url}/health", timeout=2.0).status_code == requests.codes.ok:
                    return
            except requests.RequestException:
                if time.monotonic() > deadline:
                    raise TrackingError(
                        f"the MLflow server did not answer within {_START_SECONDS:g} seconds; its log is {server.log}"
                    ) from None
            time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{' / '.join(lines[-3:])} (log: {log})"
