"""The model hub and a Ray cluster: there or not."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse

from rankwise.settings import Settings
from rankwise.tasks.doctor.finding import Finding, ok, skipped, warning

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
