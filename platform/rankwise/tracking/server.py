"""MLflow's own server on the store in the home, and a check of how well any MLflow server is protected.

`serve` starts a server for the UI on one machine. `probe_server` only sends requests that change nothing.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import requests
from mlflow.environment_variables import (
    MLFLOW_TRACKING_INSECURE_TLS,
    MLFLOW_TRACKING_SERVER_CERT_PATH,
    MLFLOW_TRACKING_TOKEN,
)

from rankwise import supervise
from rankwise.compat.mlflow import INCOMPLETE_JOB, JOBS_ROUTE, executes_jobs, tracking_credentials
from rankwise.exceptions import TrackingError
from rankwise.files import make_directory, storage_errors
from rankwise.settings import Settings, child_environment

_START_SECONDS = 120.0  # A cold start has taken 40 seconds.
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
# On by default in MLflow, and not needed to view results: running jobs for anyone who reaches the server, and pickles.
_SAFE = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    """A running server; `process` supervises it and stops it when this process ends for any reason."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def wait(self) -> None:
        """Wait until the server ends by itself; an error is a `TrackingError`."""
        if code := self.process.wait():
            raise TrackingError(f"the MLflow server exited with code {code}: {_last_lines(self.log)}")


def is_remote(uri: str) -> bool:
    """Return whether a tracking URI names a server with its own UI."""
    return uri.startswith(("http://", "https://", "databricks"))


@contextmanager
def serve(settings: Settings, host: str = "127.0.0.1", port: int = 5000) -> Iterator[LocalServer]:
    """Run a server until the block ends; when the block begins, the server answers.

    The store must exist (`connect`), since MLflow's migrations race. There is no authentication, so only loopback is
    private. Port 0 picks a free one.

    Raises:
        TrackingError: The port is in use, or the server does not start.
        StorageError: The log is not writable.
    """
    port = _free_port(host, port)
    log = settings.home / "logs" / "mlflow-server.log"
    with storage_errors(log, "starting the MLflow server"):
        make_directory(log.parent, "starting the MLflow server")
        make_directory(settings.artifacts, "starting the MLflow server")
        output = log.open("wb")
    # -P: modules in the working directory must not shadow MLflow's.
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--no-serve-artifacts", "--default-artifact-root", settings.artifacts.as_uri()]
    with output:
        process = supervise.start(
            command, _environment(settings, host), grace=supervise.SERVER_GRACE_S, group=True, output=output
        )
    address = "127.0.0.1" if host in {"0.0.0.0", "localhost"} else f"[{host}]" if ":" in host else host
    server = LocalServer(url=f"http://{address}:{port}", log=log, process=process)
    try:
        _await(server)
        yield server
    finally:
        _stop(process)


def _environment(settings: Settings, host: str) -> Mapping[str, str]:
    # The store's URI may contain a password. Other users of the machine cannot read the environment.
    changes = {**_SAFE, "MLFLOW_BACKEND_STORE_URI": settings.tracking_uri}
    defaults = {"MLFLOW_DISABLE_TELEMETRY": "true"}
    # MLflow's default allows any name that starts like a private address, such as 10.attacker.example.
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
                "choose another port (--port), or 0 for a free one"
            ) from error
        bound_port = probe.getsockname()[1]
    assert isinstance(bound_port, int)
    return bound_port


def _await(server: LocalServer) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with requests.Session() as session:
        session.trust_env = False  # No proxy for this machine.
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


_ANSWER_S = 10.0
_SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
_FOREIGN = "rankwise-doctor.invalid"  # RFC 2606: this name never exists.


def probe_server(uri: str) -> dict[str, Any]:
    """Check how a server responds to several kinds of requests.

    Args:
        uri: `http://...` or `https://...`.

    Returns:
        `version` (or None), `https`, `loopback`, `credentials` (whether this user has any); the HTTP status of a
        search with a `foreign_host` header, of an `anonymous` one and of a `known` user's; `jobs`: `on`, `off` or
        `unknown`.

    Raises:
        requests.RequestException: The server does not answer, or its certificate is not trusted.
    """
    parsed = urlparse(uri)
    base = uri.rstrip("/")
    if parsed.username is not None:
        base = base.replace(f"{parsed.netloc}", parsed.netloc.rpartition("@")[2], 1)
    local = is_loopback(parsed.hostname or "")
    with requests.Session() as session:
        # No proxy, and no password from ~/.netrc in requests that must not have one.
        trusted = session.merge_environment_settings(base, {}, False, None, None)["verify"]
        session.trust_env = False
        session.verify = not MLFLOW_TRACKING_INSECURE_TLS.get() and (MLFLOW_TRACKING_SERVER_CERT_PATH.get() or trusted)
        secret = _credentials(parsed.username, parsed.password)
        return {
            "version": _version(session, base),
            "https": parsed.scheme == "https",
            "loopback": local,
            "credentials": bool(secret),
            "foreign_host": _status(session, base, {**secret, "Host": _FOREIGN}),
            "anonymous": _status(session, base, {}),
            "known": _status(session, base, secret),
            "jobs": _jobs(session, base, secret),
        }


def is_loopback(host: str) -> bool:
    """Return whether a name or address can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(user: str | None, password: str | None) -> dict[str, str]:
    own_user, own_password = tracking_credentials()
    if own_user or user:
        auth = requests.auth.HTTPBasicAuth(own_user or user or "", own_password or password or "")
        prepared = auth(requests.Request("GET", "http://localhost").prepare())
        return {"Authorization": str(prepared.headers["Authorization"])}
    token = MLFLOW_TRACKING_TOKEN.get()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _version(session: requests.Session, base: str) -> str | None:
    answer = session.get(f"{base}/version", timeout=_ANSWER_S)
    text = answer.text.strip()
    return text if answer.ok and len(text) < 40 and text[:1].isdigit() else None


def _status(session: requests.Session, base: str, headers: dict[str, str]) -> int:
    return session.get(base + _SEARCH, headers=headers, timeout=_ANSWER_S, allow_redirects=False).status_code


def _jobs(session: requests.Session, base: str, secret: dict[str, str]) -> str:
    """Submit a job without its parameters: it is always refused, and the answer tells whether jobs are enabled."""
    answer = session.post(f"{base}{JOBS_ROUTE}", json=INCOMPLETE_JOB, headers=secret, timeout=_ANSWER_S)
    executes = executes_jobs(answer.status_code, answer.text)
    return "unknown" if executes is None else "on" if executes else "off"
