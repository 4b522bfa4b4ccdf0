"""Memory, disks and file systems of this machine, and its keys."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil

from rankwise.assets.keys import key_id, private_key, trusted_keys
from rankwise.jobs.file_system import NETWORK, file_system
from rankwise.settings import Settings
from rankwise.tasks.doctor.finding import Finding, ok, problem, skipped, warning

_GB = 10**9
# A base of 135 million parameters trains in 2 GB; below half of one not even the libraries fit.
_MEMORY = (0.5 * _GB, 2 * _GB)
# Adapters are small, checkpoints of a pack some hundred megabytes; a base with its quantized copy is gigabytes.
_HOME = (0.2 * _GB, 2 * _GB)
_CACHE = (0.5 * _GB, 10 * _GB)


def memory(settings: Settings) -> Sequence[Finding]:
    """Main memory that is free now."""
    now = psutil.virtual_memory()
    seen = f"{_size(now.available)} of {_size(now.total)} free"
    advice = "end other programs, or take a smaller base, fewer arms at once (--max-arms) or shorter rows"
    return [_judge("memory", now.available, _MEMORY, seen, advice)]


def disks(settings: Settings) -> Sequence[Finding]:
    """Room in the home and in the cache, and whether this user can write there."""
    return [
        _room("disk.home", settings.home, _HOME, "rankwise gc", "RANKWISE_HOME"),
        _room("disk.cache", settings.cache, _CACHE, "rankwise bases prune", "RANKWISE_CACHE"),
    ]


def file_systems(settings: Settings) -> Sequence[Finding]:
    """Where SQLite files lie: on a network file system they are damaged."""
    databases = {"queue": settings.database_url, "MLflow store": settings.tracking_uri}
    paths = {name: _sqlite_path(url) for name, url in databases.items()}
    local = {name: path for name, path in paths.items() if path is not None}
    if not local:
        return [skipped("disk.sqlite", "no database is a SQLite file")]
    kinds = {name: file_system(path) for name, path in local.items()}
    bad = [f"the {name} is on {kind} ({mount})" for name, (kind, mount) in kinds.items() if kind.lower() in NETWORK]
    if bad:
        return [
            problem(
                "disk.sqlite",
                "; ".join(bad) + ", a network file system, where SQLite loses data",
                "set RANKWISE_HOME to a local directory, or take PostgreSQL and an MLflow server",
            )
        ]
    return [ok("disk.sqlite", "; ".join(f"{name} on {kind}" for name, (kind, _) in kinds.items()))]


def keys(settings: Settings) -> Sequence[Finding]:
    """The keys that sign adapters, and those that are trusted."""
    if settings.signing_key is None and not settings.trusted_keys:
        return [skipped("signing", "no keys: adapters are neither signed nor are signatures asked for")]
    seen = []
    # The errors of these say what is wrong with a key and what to do.
    if settings.signing_key is not None:
        key = private_key(settings.signing_key)
        seen.append(f"adapters are signed with {settings.signing_key} ({key_id(key.public_key())})")
    if settings.trusted_keys:
        names = sorted(key.name for key in trusted_keys(settings.trusted_keys).values())
        seen.append(f"adapters must be signed by {' or '.join(names)}")
    return [ok("signing", "; ".join(seen))]


def _sqlite_path(url: str) -> Path | None:
    prefix, _, path = url.partition(":///")
    return Path(path) if prefix.startswith("sqlite") and path not in {"", ":memory:"} else None


def _room(name: str, path: Path, limits: tuple[float, float], command: str, variable: str) -> Finding:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        return problem(name, f"{there} is a file, and must be a directory", f"name another place with {variable}")
    if not os.access(there, os.W_OK | os.X_OK):
        advice = f"make it writable, or name another place with {variable}"
        return problem(name, f"{there} cannot be written by this user", advice)
    usage = shutil.disk_usage(there)
    seen = f"{_size(usage.free)} of {_size(usage.total)} free at {path} ({file_system(there)[0]})"
    return _judge(name, usage.free, limits, seen, f"`{command}` frees some; {variable} names another place")


def _judge(name: str, free: float, limits: tuple[float, float], seen: str, advice: str) -> Finding:
    if free < limits[0]:
        return problem(name, seen, advice)
    return warning(name, seen, advice) if free < limits[1] else ok(name, seen)


def _size(count: float) -> str:
    return f"{count / _GB:,.1f} GB"
