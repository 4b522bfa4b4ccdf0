"""Checks of this machine: Python and libraries, memory, disks, file systems, GPUs, torch and bitsandbytes, keys."""

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

from rankwise.doctor.finding import HealthFinding, ProbeError, ok, problem, run_probe, skipped, warning
from rankwise.files import format_size
from rankwise.flavor.signing import key_id, private_key, trusted_keys
from rankwise.jobs.database import NETWORK_FILE_SYSTEMS, file_system
from rankwise.settings import Settings

_GB = 10**9
# Below the first limit it is a problem, below the second a warning.
_MEMORY = (0.5 * _GB, 2 * _GB)
_HOME = (0.2 * _GB, 2 * _GB)
_CACHE = (0.5 * _GB, 10 * _GB)


def memory(settings: Settings) -> Sequence[HealthFinding]:
    """Available main memory."""
    now = psutil.virtual_memory()
    seen = f"{_size(now.available)} of {_size(now.total)} free"
    advice = "end other programs, or use a smaller base, fewer arms at once (--max-arms) or shorter rows"
    return [_judge("memory", now.available, _MEMORY, seen, advice)]


def disks(settings: Settings) -> Sequence[HealthFinding]:
    """Free space in the home and the cache, and whether this user can write there."""
    return [
        _room("disk.home", settings.home, _HOME, "rankwise gc", "RANKWISE_HOME"),
        _room("disk.cache", settings.cache, _CACHE, "rankwise bases prune", "RANKWISE_CACHE"),
    ]


def file_systems(settings: Settings) -> Sequence[HealthFinding]:
    """File systems of SQLite files: a network file system can corrupt them."""
    databases = {"queue": settings.database_url, "MLflow store": settings.tracking_uri}
    paths = {name: _sqlite_path(url) for name, url in databases.items()}
    local = {name: path for name, path in paths.items() if path is not None}
    if not local:
        return [skipped("disk.sqlite", "no database is a SQLite file")]
    kinds = {name: file_system(path) for name, path in local.items()}
    bad = [
        f"the {name} is on {kind} ({mount})"
        for name, (kind, mount) in kinds.items()
        if kind.lower() in NETWORK_FILE_SYSTEMS
    ]
    if bad:
        return [
            problem(
                "disk.sqlite",
                "; ".join(bad) + ", a network file system, where SQLite loses data",
                "set RANKWISE_HOME to a local directory, or use PostgreSQL and an MLflow server",
            )
        ]
    return [ok("disk.sqlite", "; ".join(f"{name} on {kind}" for name, (kind, _) in kinds.items()))]


def keys(settings: Settings) -> Sequence[HealthFinding]:
    """The signing key and the trusted keys."""
    if settings.signing_key is None and not settings.trusted_keys:
        return [skipped("signing", "no keys: adapters are not signed, and signatures are not required")]
    seen = []
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


def _room(name: str, path: Path, limits: tuple[float, float], command: str, variable: str) -> HealthFinding:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        return problem(name, f"{existing} is a file, not a directory", f"set {variable} to another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        advice = f"make it writable, or set {variable} to another directory"
        return problem(name, f"{existing} is not writable for this user", advice)
    usage = shutil.disk_usage(existing)
    seen = f"{_size(usage.free)} of {_size(usage.total)} free at {path} ({file_system(existing)[0]})"
    return _judge(name, usage.free, limits, seen, f"`{command}` frees space; {variable} selects another directory")


def _judge(name: str, free: float, limits: tuple[float, float], seen: str, advice: str) -> HealthFinding:
    if free < limits[0]:
        return problem(name, seen, advice)
    return warning(name, seen, advice) if free < limits[1] else ok(name, seen)


def _size(count: float) -> str:
    return format_size(count, ",.1f", unit="GB")


INSTALL = "pip install --constraint constraints.txt 'rankwise' (constraints.txt of the release)"


def tested() -> dict[str, dict[str, str]]:
    """What this release was tested with: `python` (`oldest`, `newest`) and `libraries` (name to version)."""
    text = resources.files("rankwise.doctor").joinpath("tested.json").read_text(encoding="utf-8")
    versions: dict[str, dict[str, str]] = json.loads(text)
    return versions


def python(settings: Settings) -> Sequence[HealthFinding]:
    """The operating system and the version of Python."""
    version = platform.python_version()
    seen = f"{version} on {platform.system()} {platform.machine()}"
    oldest, newest = tested()["python"]["oldest"], tested()["python"]["newest"]
    if platform.system() != "Linux":
        return [problem("python", seen, "rankwise needs Linux: on Windows use WSL 2, on a Mac a container")]
    if Version(version) < Version(oldest):
        return [problem("python", seen, f"install Python {oldest} or newer and recreate the environment")]
    if Version(version).release[:2] > Version(newest).release:
        return [warning("python", f"{seen}; tested up to {newest}", f"if something fails, try Python {newest}")]
    return [ok("python", seen)]


def libraries(settings: Settings) -> Sequence[HealthFinding]:
    """Required libraries: installed, within their version ranges, and equal to the tested versions."""
    requirements = [Requirement(text) for text in metadata.requires("rankwise") or []]
    ranges = {needed.name.lower(): needed.specifier for needed in requirements if needed.marker is None}
    missing, outside, other, same = [], [], [], 0
    for name, version in tested()["libraries"].items():
        try:
            installed = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        allowed = ranges.get(name.lower())
        if allowed is not None and not allowed.contains(installed, prereleases=True):
            outside.append(f"{name} {installed} (required: {allowed})")
        elif installed.release[:2] != Version(version).release[:2]:
            other.append(f"{name} {installed} (tested: {version})")
        else:
            same += 1
    findings = []
    if missing or outside:
        wrong = [*(f"{name} is not installed" for name in missing), *outside]
        findings.append(problem("libraries", "; ".join(wrong), INSTALL))
    if other:
        advice = f"these versions are allowed but untested; for the tested set: {INSTALL}"
        findings.append(warning("libraries", "; ".join(other), advice))
    return findings or [ok("libraries", f"{same} libraries match the tested versions")]


COMPUTE_S = 90.0
_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "memory.free")
_OLDEST = 7.5  # Turing: bitsandbytes' 4-bit kernels need it for all their dtypes


def driver(settings: Settings) -> Sequence[HealthFinding]:
    """NVIDIA GPUs, one finding each: name, driver, compute capability and memory, from `nvidia-smi`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [skipped("gpu.driver", "no nvidia-smi: no NVIDIA GPU or no driver; using the CPU")]
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15.0, check=False)
    except subprocess.TimeoutExpired:
        return [problem("gpu.driver", "nvidia-smi does not answer", "restart the machine, or check its kernel log")]
    output = (done.stdout + done.stderr).strip()
    if done.returncode:
        return [
            problem("gpu.driver", f"nvidia-smi: {output.splitlines()[0] if output else done.returncode}", _REINSTALL)
        ]
    return [_gpu(index, line) for index, line in enumerate(done.stdout.strip().splitlines())]


_REINSTALL = "install the NVIDIA driver that fits the kernel; in a container give it the GPU (--gpus all)"


def _gpu(index: int, line: str) -> HealthFinding:
    name, version, capability, total, free = [part.strip() for part in line.split(",")]
    seen = f"{index}: {name}, driver {version}, compute capability {capability}, {free} of {total} MiB free"
    try:
        if float(capability) < _OLDEST:
            return warning("gpu.driver", seen, f"GPUs below {_OLDEST} are slow or refused by bitsandbytes: use the CPU")
        if float(free) < 0.2 * float(total):
            return warning("gpu.driver", seen, "another program uses its memory: see `nvidia-smi`")
    except ValueError:  # A MIG device reports [N/A].
        pass
    return ok("gpu.driver", seen)


def compute(settings: Settings) -> Sequence[HealthFinding]:
    """Devices that torch sees, the dtype that `auto` selects, and a test of bitsandbytes' kernels on each device."""
    try:
        facts = run_probe("rankwise.doctor.compute_probe", timeout=COMPUTE_S)
    except ProbeError as error:
        advice = "try `python -c 'import torch, bitsandbytes'`: the installation is broken or the machine is overloaded"
        return [problem("compute", f"torch and bitsandbytes do not start: {error}", advice)]
    return [_torch(facts), _dtype(facts), *(_kernels(device, result) for device, result in facts["kernels"].items())]


def _torch(facts: dict[str, Any]) -> HealthFinding:
    seen = f"torch {facts['torch']}, built for {facts['built_for']}; {facts['devices'] or 'no GPU'}"
    if shutil.which("nvidia-smi") and not facts["devices"]:
        advice = "install the torch wheel for this driver's CUDA (pytorch.org), and check CUDA_VISIBLE_DEVICES"
        return problem("compute.torch", f"{seen}, although a driver is installed", advice)
    return ok("compute.torch", seen)


def _dtype(facts: dict[str, Any]) -> HealthFinding:
    seen = f"compute_dtype auto is {facts['dtype']}"
    if facts["device"] == "cpu" and facts["fast_bfloat16"]:
        seen += (
            f" ({', '.join(facts['fast_bfloat16'])}); on CPUs without it, auto is float32: for equal results on both, "
            "set bnb_4bit_compute_dtype in the experiment"
        )
    return ok("compute.dtype", seen)


def _kernels(device: str, facts: dict[str, Any]) -> HealthFinding:
    name = f"compute.bitsandbytes.{device}"
    if facts["error"]:
        advice = "reinstall bitsandbytes for this torch and CUDA: `python -m bitsandbytes` shows details"
        return problem(name, f"bitsandbytes {facts['version']} cannot quantize to NF4 here: {facts['error']}", advice)
    seen = f"bitsandbytes {facts['version']} ({facts['library']}): NF4 round trip in {facts['seconds']:.2f} s"
    if facts["difference"] > 1e-2:
        advice = "its kernels give wrong results on this device: install another version, and do not train"
        return problem(name, f"{seen}, but it deviates by {facts['difference']:.3g} from the definition of NF4", advice)
    return ok(name, seen)
