"""Checks of services: the model hub, Ray, the queue with its clock and workers, MLflow and its artifact store."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse, urlsplit

from rankwise.doctor.finding import HealthFinding, ProbeError, ok, problem, run_probe, skipped, warning
from rankwise.jobs.queries import QueueSnapshot, database_file_exists, take_snapshot
from rankwise.settings import Settings

_ANSWER_S = 5.0
_RAY_ADDRESS_FILE = Path("/tmp/ray/ray_current_cluster")
_LOOPBACK = ("127.", "localhost", "[::1]", "::1")


def hub(settings: Settings) -> Sequence[HealthFinding]:
    """Whether the hub answers; skipped offline."""
    if settings.offline:
        return [skipped("hub", "offline (HF_HUB_OFFLINE): only local bases and datasets are used")]
    began = time.monotonic()
    try:
        request = urllib.request.Request(settings.hub, method="HEAD")
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        advice = "set HF_HUB_OFFLINE=1 to skip it; bases then come from RANKWISE_BASES, directories or pypi: sources"
        return [warning("hub", f"{settings.hub} does not answer: {reason}", advice)]
    seen = f"{settings.hub} answers ({status}) in {(time.monotonic() - began) * 1000:.0f} ms"
    return [ok("hub", seen) if status < 500 else warning("hub", seen, "the hub has an internal error: try again later")]


def ray(settings: Settings) -> Sequence[HealthFinding]:
    """Whether Ray is installed, and whether a cluster answers and requires a token."""
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        return [skipped("ray", "not installed; only needed for workers on a cluster (extra `ray`)")]
    address = settings.ray_address or _local_cluster()
    if address in {None, "auto", "local"}:
        return [skipped("ray", f"ray {version}; no cluster on this machine, and RAY_ADDRESS is not set")]
    assert address is not None
    parsed = urlparse(address if "://" in address else f"//{address}")
    try:
        with socket.create_connection((parsed.hostname or "", parsed.port or 6379), timeout=_ANSWER_S):
            pass
    except (OSError, ValueError) as error:
        advice = "start it with `ray start --head`, or correct RAY_ADDRESS"
        return [warning("ray", f"ray {version}; no cluster answers at {address}: {error}", advice)]
    seen = f"ray {version}; a cluster answers at {address}"
    if not settings.ray_token and not address.startswith(_LOOPBACK):
        advice = "start it with RAY_AUTH_MODE=token and a token (`ray get-auth-token --generate`); set both here too"
        return [
            warning(
                "ray",
                f"{seen}; RAY_AUTH_MODE is not token: anyone who can connect can run programs",
                advice,
            )
        ]
    return [ok("ray", seen)]


def _local_cluster() -> str | None:
    try:
        return _RAY_ADDRESS_FILE.read_text().strip() or None
    except OSError:
        return None


_SILENT_S = 120.0  # workers announce themselves more often
# MLflow metrics carry the worker's time; S3 refuses requests whose time is off by 15 minutes.
_SKEW_WARNING_S, _SKEW_PROBLEM_S = 2.0, 300.0


def queue(settings: Settings) -> Sequence[HealthFinding]:
    """The queue's database, the clock difference to it, and its workers."""
    if not database_file_exists(settings.database_url):
        seen = f"there is no queue at {settings.database_url.partition(':///')[2]} yet"
        return [skipped("queue.database", seen, "the first `rankwise run` or `submit` creates it")]
    snapshot = take_snapshot(settings.database_url)
    health = snapshot.health
    if health.problems:
        return [problem("queue.database", f"{health.url}: {'; '.join(health.problems)}", "see `rankwise db check`")]
    seen = f"{health.url}: revision {health.revision}, {health.jobs} jobs, answers in {snapshot.seconds * 1000:.0f} ms"
    return [ok("queue.database", seen), _clock(snapshot), *_workers(snapshot)]


def _clock(snapshot: QueueSnapshot) -> HealthFinding:
    # Half the round-trip time is the uncertainty of the difference.
    seen = f"this machine's clock is {snapshot.ahead:+.2f} s (±{snapshot.seconds / 2:.2f}) from the database's"
    skew = abs(snapshot.ahead) - snapshot.seconds / 2
    advice = "synchronize the clock (`timedatectl set-ntp true`): MLflow timestamps and S3 depend on it"
    if skew > _SKEW_PROBLEM_S:
        return problem("queue.clock", seen, advice)
    return warning("queue.clock", seen, advice) if skew > _SKEW_WARNING_S else ok("queue.clock", seen)


def _workers(snapshot: QueueSnapshot) -> list[HealthFinding]:
    silent = [worker for worker in snapshot.workers if worker.silent > _SILENT_S]
    active = len(snapshot.workers) - len(silent)
    findings = []
    if silent:
        names = ", ".join(f"{worker.name} ({worker.silent / 60:.0f} min)" for worker in silent)
        advice = "they crashed or hang: check their machines; other workers take over their jobs when the leases expire"
        findings.append(warning("queue.workers", f"silent: {names}", advice))
    if snapshot.waiting and not active:
        advice = "start one: `rankwise worker` (on every machine with a GPU)"
        findings.append(warning("queue.workers", f"{snapshot.waiting} jobs wait and no worker is running", advice))
    return findings or [ok("queue.workers", f"{active} workers, {snapshot.waiting} jobs wait")]


MLFLOW_S = 90.0
_START_SERVER = "start the server, or correct MLFLOW_TRACKING_URI; without it, the store in RANKWISE_HOME is used"


def mlflow(settings: Settings) -> Sequence[HealthFinding]:
    """The MLflow store or server: version, transport, access, and a write to its artifact store."""
    try:
        facts = run_probe("rankwise.tracking.store_probe", timeout=MLFLOW_S)
    except ProbeError as error:
        return [problem("mlflow.store", f"mlflow does not start: {error}", "try `python -c 'import mlflow'`")]
    if facts["kind"] == "none":
        return [skipped("mlflow.store", "no store in RANKWISE_HOME yet", "the first `rankwise run` creates it")]
    if facts["problem"]:
        return [problem("mlflow.store", f"{facts['uri']}: {facts['problem']}", _START_SERVER)]
    findings = [_store(facts)]
    if facts["moved"]:
        return [*findings, problem("mlflow.artifacts", facts["moved"], "rankwise home relocate")]
    if facts["server"] is not None:
        findings += [_transport(facts), _hosts(facts), _authentication(facts), _jobs(facts)]
    return [*findings, _artifacts(facts)]


def _store(facts: dict[str, Any]) -> HealthFinding:
    ours, theirs = facts["client"], (facts["server"] or {}).get("version")
    seen = f"{facts['uri']} answers in {facts['seconds'] * 1000:.0f} ms"
    if theirs is None:
        return ok("mlflow.store", f"{seen}, mlflow {ours}")
    seen = f"{seen}, server {theirs}, client {ours}"
    if theirs.split(".")[:1] != ours.split(".")[:1]:
        return problem("mlflow.store", seen, f"use one major version on both: pip install mlflow=={ours} on the server")
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        return warning("mlflow.store", seen, f"tested only with equal versions: install mlflow=={ours} on the server")
    return ok("mlflow.store", seen)


def _transport(facts: dict[str, Any]) -> HealthFinding:
    server = facts["server"]
    if server["https"]:
        return ok("mlflow.transport", "https")
    if server["loopback"]:
        return ok("mlflow.transport", "http, on this machine only")
    host = urlsplit(facts["uri"]).hostname or ""
    if not set(host) & {".", ":"}:
        return ok("mlflow.transport", f"http to {host}: a name without a domain, local to this network")
    if server["credentials"]:
        seen = "http to another host: the password is sent in plain text"
        return problem("mlflow.transport", seen, "put the server behind TLS and use https:// in MLFLOW_TRACKING_URI")
    return warning(
        "mlflow.transport",
        "http to another host: everything is sent in plain text",
        "put the server behind TLS (https)",
    )


def _hosts(facts: dict[str, Any]) -> HealthFinding:
    server = facts["server"]
    if server["foreign_host"] in {400, 403, 421}:
        return ok("mlflow.hosts", f"a foreign Host header is refused ({server['foreign_host']})")
    seen = f"a foreign Host header is accepted ({server['foreign_host']}): a web page in a browser can reach the server"
    advice = "start it with uvicorn and --allowed-hosts, listing its host names"
    if server["anonymous"] == 200:
        return problem("mlflow.hosts", f"{seen}, and it requires no password", advice)
    return warning("mlflow.hosts", seen, advice)


def _authentication(facts: dict[str, Any]) -> HealthFinding:
    server = facts["server"]
    if server["anonymous"] in {401, 403}:
        if server["known"] != 200:
            advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            return problem("mlflow.authentication", f"on; this user is refused ({server['known']})", advice)
        return ok("mlflow.authentication", "on; this user has access")
    if server["loopback"]:
        return ok("mlflow.authentication", "off; the server is on the loopback interface")
    advice = "start it with --app-name basic-auth, or put an authenticating proxy in front of it"
    return warning("mlflow.authentication", "off: anyone who can connect can change runs and move aliases", advice)


def _jobs(facts: dict[str, Any]) -> HealthFinding:
    server = facts["server"]
    pickle = "whether it loads pickles is not visible from here: set MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false"
    if server["jobs"] == "on":
        seen = "the server runs jobs for anyone who can connect"
        advice = f"rankwise does not need this: set MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false on the server; {pickle}"
        open_to_all = server["anonymous"] == 200 and not server["loopback"]
        return (problem if open_to_all else warning)("mlflow.jobs", seen, advice)
    if server["jobs"] == "unknown":
        return skipped("mlflow.jobs", "unknown whether the server runs jobs", pickle)
    return ok("mlflow.jobs", "the server runs no jobs")


def _artifacts(facts: dict[str, Any]) -> HealthFinding:
    result = facts["artifacts"]
    name = "mlflow.artifacts"
    if result is None:
        return skipped(name, "there is no experiment yet to test artifacts with")
    if result["step"]:
        seen = f"{result['location']}: {result['step']} failed: {result['problem']}"
        advice = "check the server's log, and the credentials and bucket of its artifact store"
        if result["step"] == "delete" and "403" in result["problem"]:
            return warning(
                name,
                seen,
                "only administrators can delete artifacts: run `rankwise gc` with an administrator's account",
            )
        if result["step"] == "delete":
            return warning(name, seen, f"`rankwise gc` cannot free space there; {advice}")
        return problem(name, seen, advice)
    if result["bytes"] is None:
        return ok(name, f"{result['location']} is writable")
    times = ", ".join(f"{step} {seconds * 1000:.0f} ms" for step, seconds in result["seconds"].items())
    return ok(name, f"{result['location']}: {result['bytes']:,} bytes written and read back ({times})")
