"""Memory, disks and file systems of this machine, and its keys.

- Python and the libraries, against what this release was tested with.
- The GPUs, as the driver knows them, and what torch and bitsandbytes can do here.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.version import Version

from rankwise.doctor.finding import Finding, ProgramFailed, ask, ok, problem, skipped, warning
from rankwise.files import format_size
from rankwise.flavor.signing import key_id, private_key, trusted_keys
from rankwise.jobs.database import NETWORK, file_system
from rankwise.settings import Settings

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
    return format_size(count, ",.1f", unit="GB")


INSTALL = "pip install --constraint constraints.txt 'rankwise' (constraints.txt of the release)"


def tested() -> dict[str, dict[str, str]]:
    """What this release was tested with: `python` (oldest and newest) and `libraries` (the version of each)."""
    text = resources.files("rankwise.doctor").joinpath("tested.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = json.loads(text)
    return found


def python(settings: Settings) -> Sequence[Finding]:
    """The interpreter."""
    here = platform.python_version()
    seen = f"{here} on {platform.system()} {platform.machine()}"
    oldest, newest = tested()["python"]["oldest"], tested()["python"]["newest"]
    if platform.system() != "Linux":
        return [problem("python", seen, "rankwise runs on Linux only: on Windows use WSL 2, on a Mac a container")]
    if Version(here) < Version(oldest):
        return [problem("python", seen, f"install Python {oldest} or newer and make the environment anew")]
    if Version(here).release[:2] > Version(newest).release:
        return [warning("python", f"{seen}; tested up to {newest}", f"take Python {newest} when something is odd")]
    return [ok("python", seen)]


def libraries(settings: Settings) -> Sequence[Finding]:
    """What rankwise needs: there, within its ranges, and how far from the tested set."""
    needed = [Requirement(text) for text in metadata.requires("rankwise") or []]
    ranges = {need.name.lower(): need.specifier for need in needed if need.marker is None}
    missing, outside, other, same = [], [], [], 0
    for name, version in tested()["libraries"].items():
        try:
            found = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        allowed = ranges.get(name.lower())
        if allowed is not None and not allowed.contains(found, prereleases=True):
            outside.append(f"{name} {found}, needed is {allowed}")
        elif found.release[:2] != Version(version).release[:2]:
            other.append(f"{name} {found}, tested was {version}")
        else:
            same += 1
    findings = []
    if missing or outside:
        wrong = [*(f"{name} is not installed" for name in missing), *outside]
        findings.append(problem("libraries", "; ".join(wrong), INSTALL))
    if other:
        advice = f"they are within the ranges; for the tested set: {INSTALL}"
        findings.append(warning("libraries", "; ".join(other), advice))
    return findings or [ok("libraries", f"{same} libraries as they were tested together")]


COMPUTE_S = 90.0
_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "memory.free")
# bitsandbytes' 4-bit kernels need Turing or newer for all of their dtypes; torch's wheels end earlier than that.
_OLDEST = 7.5


def driver(settings: Settings) -> Sequence[Finding]:
    """What `nvidia-smi` says: name, driver, compute capability and memory of each GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [skipped("gpu.driver", "no nvidia-smi: no NVIDIA GPU, or no driver; the CPU computes")]
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15.0, check=False)
    except subprocess.TimeoutExpired:
        return [problem("gpu.driver", "nvidia-smi does not answer", "restart the machine, or see its kernel log")]
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        return [problem("gpu.driver", f"nvidia-smi: {said.splitlines()[0] if said else done.returncode}", _REINSTALL)]
    return [_described(index, line) for index, line in enumerate(done.stdout.strip().splitlines())]


_REINSTALL = "install the NVIDIA driver that fits the kernel; in a container give it the GPU (--gpus all)"


def _described(index: int, line: str) -> Finding:
    name, version, capability, total, free = [part.strip() for part in line.split(",")]
    seen = f"{index}: {name}, driver {version}, compute capability {capability}, {free} of {total} MiB free"
    try:
        if float(capability) < _OLDEST:
            return warning("gpu.driver", seen, f"GPUs below {_OLDEST} are slow or refused by bitsandbytes: use the CPU")
        if float(free) < 0.2 * float(total):
            return warning("gpu.driver", seen, "another program holds its memory: `nvidia-smi` names it")
    except ValueError:  # A divided GPU (MIG) answers [N/A].
        pass
    return ok("gpu.driver", seen)


def compute(settings: Settings) -> Sequence[Finding]:
    """Devices that torch sees, the dtype that `auto` becomes, and bitsandbytes' kernels, tried on each device."""
    try:
        facts = ask("rankwise.doctor.compute_program", timeout=COMPUTE_S)
    except ProgramFailed as error:
        advice = "try `python -c 'import torch, bitsandbytes'`: the installation is broken, or the machine overloaded"
        return [problem("compute", f"torch and bitsandbytes do not start: {error}", advice)]
    return [_torch(facts), _dtype(facts), *(_kernels(device, each) for device, each in facts["kernels"].items())]


def _torch(facts: dict[str, Any]) -> Finding:
    seen = f"torch {facts['torch']}, built for {facts['built_for']}; {facts['devices'] or 'no GPU'}"
    if shutil.which("nvidia-smi") and not facts["devices"]:
        advice = "install the torch wheel for this driver's CUDA (pytorch.org), and see CUDA_VISIBLE_DEVICES"
        return problem("compute.torch", f"{seen}, although there is a driver", advice)
    return ok("compute.torch", seen)


def _dtype(facts: dict[str, Any]) -> Finding:
    seen = f"compute_dtype auto is {facts['dtype']}"
    if facts["device"] == "cpu" and facts["fast_bfloat16"]:
        # Not an error, and yet what differs most between two machines that should give the same numbers.
        seen += (
            f" ({', '.join(facts['fast_bfloat16'])}); on CPUs without it, it is float32: for the same numbers on both, "
            "name bnb_4bit_compute_dtype in the definition"
        )
    return ok("compute.dtype", seen)


def _kernels(device: str, facts: dict[str, Any]) -> Finding:
    name = f"compute.bitsandbytes.{device}"
    if facts["error"]:
        advice = "reinstall bitsandbytes for this torch and CUDA: `python -m bitsandbytes` tells more"
        return problem(name, f"bitsandbytes {facts['version']} cannot quantize to NF4 here: {facts['error']}", advice)
    seen = f"bitsandbytes {facts['version']} ({facts['library']}): NF4 there and back in {facts['seconds']:.2f} s"
    if facts["difference"] > 1e-2:
        advice = "its kernels compute wrongly on this device: take another version, and do not train"
        return problem(name, f"{seen}, but off by {facts['difference']:.3g} from its definition", advice)
    return ok(name, seen)
