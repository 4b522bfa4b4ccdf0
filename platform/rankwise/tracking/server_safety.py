"""How an MLflow server is guarded, as anybody who reaches it can see. Nothing is changed there."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlparse

import requests
from mlflow.environment_variables import (
    MLFLOW_TRACKING_INSECURE_TLS,
    MLFLOW_TRACKING_SERVER_CERT_PATH,
    MLFLOW_TRACKING_TOKEN,
)
from mlflow.utils.credentials import read_mlflow_creds

_ANSWER_S = 10.0
_SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"
_FOREIGN = "rankwise-doctor.invalid"  # RFC 2606: a name that nobody can have.


def look(uri: str) -> dict[str, Any]:
    """What the server says to requests of several kinds.

    Args:
        uri: `http://...` or `https://...`.

    Returns:
        `version` (or None), `https`, `loopback`, `credentials` (whether this user has some); HTTP status of a search
        with a `foreign_host` header, of an `anonymous` one and of a `known` user's; `jobs`: `on`, `off` or `unknown`.

    Raises:
        requests.RequestException: It does not answer, or its certificate is not trusted.
    """
    parsed = urlparse(uri)
    base = uri.rstrip("/")
    if parsed.username is not None:
        base = base.replace(f"{parsed.netloc}", parsed.netloc.rpartition("@")[2], 1)
    local = is_loopback(parsed.hostname or "")
    with requests.Session() as session:
        # Neither a proxy for this machine, nor a password out of ~/.netrc in a request that is to have none.
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
    """Whether a name or address can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(user: str | None, password: str | None) -> dict[str, str]:
    found = read_mlflow_creds()
    if found.username or user:
        auth = requests.auth.HTTPBasicAuth(found.username or user or "", found.password or password or "")
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
    """Asks for a job without its parameters: refused before anything is stored, by words that tell whether jobs run."""
    answer = session.post(
        f"{base}/ajax-api/3.0/jobs/",
        json={"job_name": "optimize_prompts", "params": {}},
        headers=secret,
        timeout=_ANSWER_S,
    )
    if "not enabled" in answer.text or answer.status_code in {404, 405}:
        return "off"
    return "on" if answer.status_code in {400, 500} else "unknown"
