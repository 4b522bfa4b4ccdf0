"""The model hub and a Ray cluster: there or not.

- The queue's database: reachable, of this release's revision, whole; its clock; and its workers.
- MLflow: reachable, of which version, how safe, and whether its artifact store keeps what it is given.
"""

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

from rankwise.doctor.finding import Finding, ProgramFailed, ask, ok, problem, skipped, warning
from rankwise.jobs.queries import Glance, glance, is_there
from rankwise.settings import Settings

_ANSWER_S = 5.0
# Ray writes the address of this machine's cluster there.
_CURRENT = Path("/tmp/ray/ray_current_cluster")
_LOOPBACK = ("127.", "localhost", "[::1]", "::1")


def hub(settings: Settings) -> Sequence[Finding]:
    """Whether the hub answers, where it may be asked."""
    if settings.offline:
        return [skipped("hub", "offline (HF_HUB_OFFLINE): only bases and data sets that are here are used")]
    began = time.monotonic()
    try:
        request = urllib.request.Request(settings.hub, method="HEAD")
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        advice = "HF_HUB_OFFLINE=1 saves the waiting; bases come from RANKWISE_BASES, directories or pypi: sources then"
        return [warning("hub", f"{settings.hub} does not answer: {reason}", advice)]
    seen = f"{settings.hub} answers ({status}) in {(time.monotonic() - began) * 1000:.0f} ms"
    return [ok("hub", seen) if status < 500 else warning("hub", seen, "the hub has trouble: try again later")]


def ray(settings: Settings) -> Sequence[Finding]:
    """Whether Ray is installed, a cluster answers, and asks for a token."""
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        return [skipped("ray", "not installed: it is only needed for workers on a cluster (extra `ray`)")]
    address = settings.ray_address or _current()
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
        advice = "start it with RAY_AUTH_MODE=token and a token (`ray get-auth-token --generate`), and set both here"
        return [warning("ray", f"{seen}; RAY_AUTH_MODE is not token: who reaches it runs any program on it", advice)]
    return [ok("ray", seen)]


def _current() -> str | None:
    try:
        return _CURRENT.read_text().strip() or None
    except OSError:
        return None


# A worker announces itself more often than this.
_SILENT_S = 120.0
# MLflow's points carry the worker's time; S3 refuses requests that are a quarter of an hour off.
_SKEW_S, _WRONG_S = 2.0, 300.0


def queue(settings: Settings) -> Sequence[Finding]:
    """All about the queue."""
    if not is_there(settings.database_url):
        seen = f"there is no queue at {settings.database_url.partition(':///')[2]} yet"
        return [skipped("queue.database", seen, "the first `rankwise run` or `submit` makes it")]
    look = glance(settings.database_url)
    health = look.health
    if health.problems:
        return [problem("queue.database", f"{health.url}: {'; '.join(health.problems)}", "see `rankwise db check`")]
    seen = f"{health.url}: revision {health.revision}, {health.jobs} jobs, answers in {look.seconds * 1000:.0f} ms"
    return [ok("queue.database", seen), _clock(look), *_workers(look)]


def _clock(look: Glance) -> Finding:
    # The database's answer is as old as half of the time that it took.
    seen = f"this machine's clock is {look.ahead:+.2f} s (±{look.seconds / 2:.2f}) from the database's"
    off = abs(look.ahead) - look.seconds / 2
    advice = "set the clock by NTP (`timedatectl set-ntp true`); MLflow's points and S3 go by it"
    if off > _WRONG_S:
        return problem("queue.clock", seen, advice)
    return warning("queue.clock", seen, advice) if off > _SKEW_S else ok("queue.clock", seen)


def _workers(look: Glance) -> list[Finding]:
    silent = [worker for worker in look.workers if worker.silent > _SILENT_S]
    there = len(look.workers) - len(silent)
    findings = []
    if silent:
        names = ", ".join(f"{worker.name} ({worker.silent / 60:.0f} min)" for worker in silent)
        advice = "they ended without a word, or hang: see their machines; their jobs go to others when the lease ends"
        findings.append(warning("queue.workers", f"silent: {names}", advice))
    if look.waiting and not there:
        advice = "start one: `rankwise worker` (on every machine with a GPU)"
        findings.append(warning("queue.workers", f"{look.waiting} jobs wait and no worker is there", advice))
    return findings or [ok("queue.workers", f"{there} workers, {look.waiting} jobs wait")]


MLFLOW_S = 90.0
_SERVER = "start the server, or correct MLFLOW_TRACKING_URI; unset, it is the store in RANKWISE_HOME"


def mlflow(settings: Settings) -> Sequence[Finding]:
    """All about MLflow."""
    try:
        facts = ask("rankwise.tracking.examined", timeout=MLFLOW_S)
    except ProgramFailed as error:
        return [problem("mlflow.store", f"mlflow does not start: {error}", "try `python -c 'import mlflow'`")]
    if facts["kind"] == "none":
        return [skipped("mlflow.store", "there is no store in RANKWISE_HOME yet", "the first `rankwise run` makes it")]
    if facts["problem"]:
        return [problem("mlflow.store", f"{facts['uri']}: {facts['problem']}", _SERVER)]
    findings = [_store(facts)]
    if facts["server"] is not None:
        findings += [_transport(facts), _hosts(facts), _authentication(facts), _jobs(facts)]
    return [*findings, _artifacts(facts)]


def _store(facts: dict[str, Any]) -> Finding:
    ours, theirs = facts["client"], (facts["server"] or {}).get("version")
    seen = f"{facts['uri']} answers in {facts['seconds'] * 1000:.0f} ms"
    if theirs is None:
        return ok("mlflow.store", f"{seen}, mlflow {ours}")
    seen = f"{seen}, server {theirs}, client {ours}"
    if theirs.split(".")[:1] != ours.split(".")[:1]:
        return problem(
            "mlflow.store", seen, f"bring both to one major version: pip install mlflow=={ours} on the server"
        )
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        return warning("mlflow.store", seen, f"what was tested is one version on both sides: mlflow=={ours}")
    return ok("mlflow.store", seen)


def _transport(facts: dict[str, Any]) -> Finding:
    server = facts["server"]
    if server["https"]:
        return ok("mlflow.transport", "https")
    if server["loopback"]:
        return ok("mlflow.transport", "http, on this machine only")
    host = urlsplit(facts["uri"]).hostname or ""
    if not set(host) & {".", ":"}:
        # A service of compose.yaml, or of a Kubernetes namespace.
        return ok("mlflow.transport", f"http to {host}: a name without a domain, known in this network only")
    if server["credentials"]:
        seen = "http to another host: the password travels in clear"
        return problem("mlflow.transport", seen, "put the server behind TLS and say https:// in MLFLOW_TRACKING_URI")
    return warning(
        "mlflow.transport", "http to another host: all travels in clear", "put the server behind TLS (https)"
    )


def _hosts(facts: dict[str, Any]) -> Finding:
    server = facts["server"]
    if server["foreign_host"] in {400, 403, 421}:
        return ok("mlflow.hosts", f"a foreign Host header is refused ({server['foreign_host']})")
    seen = f"a foreign Host header is answered ({server['foreign_host']}): a page in a browser can reach the server"
    advice = "start it with --allowed-hosts and the names by which it is called, and with uvicorn"
    if server["anonymous"] == 200:
        return problem("mlflow.hosts", f"{seen}, and it asks for no password", advice)
    return warning("mlflow.hosts", seen, advice)


def _authentication(facts: dict[str, Any]) -> Finding:
    server = facts["server"]
    if server["anonymous"] in {401, 403}:
        if server["known"] != 200:
            advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            return problem("mlflow.authentication", f"on; this user is refused ({server['known']})", advice)
        return ok("mlflow.authentication", "on; this user is let in")
    if server["loopback"]:
        return ok("mlflow.authentication", "off; the server is asked on loopback")
    advice = "start it with --app-name basic-auth, or put an authenticating proxy before it"
    return warning("mlflow.authentication", "off: who reaches the server can change runs and move aliases", advice)


def _jobs(facts: dict[str, Any]) -> Finding:
    server = facts["server"]
    pickle = "whether it loads pickles cannot be seen from here: MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false"
    if server["jobs"] == "on":
        seen = "the server runs jobs for those who reach it"
        advice = f"rankwise needs none of it: MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false on the server; {pickle}"
        open_to_all = server["anonymous"] == 200 and not server["loopback"]
        return (problem if open_to_all else warning)("mlflow.jobs", seen, advice)
    if server["jobs"] == "unknown":
        return skipped("mlflow.jobs", "whether it runs jobs cannot be told", pickle)
    return ok("mlflow.jobs", "the server runs no jobs")


def _artifacts(facts: dict[str, Any]) -> Finding:
    found = facts["artifacts"]
    name = "mlflow.artifacts"
    if found is None:
        return skipped(name, "there is no experiment yet whose artifacts could be tried")
    if found["step"]:
        seen = f"{found['location']}: {found['step']} failed: {found['problem']}"
        advice = "see the server's log and the credentials and bucket of its artifact store"
        if found["step"] == "delete" and "403" in found["problem"]:
            return warning(
                name, seen, "MLflow lets administrators delete artifacts: run `rankwise gc` with the account of one"
            )
        if found["step"] == "delete":
            return warning(name, seen, f"`rankwise gc` cannot free space there; {advice}")
        return problem(name, seen, advice)
    times = ", ".join(f"{step} {seconds * 1000:.0f} ms" for step, seconds in found["seconds"].items())
    return ok(name, f"{found['location']}: {found['bytes']:,} bytes there and back ({times})")
