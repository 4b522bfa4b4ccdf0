"""MLflow: reachable, of which version, how safe, and whether its artifact store keeps what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from rankwise.settings import Settings
from rankwise.tasks.doctor.finding import Finding, ok, problem, skipped, warning
from rankwise.tasks.doctor.program import ProgramFailed, ask

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
