"""Provenance of a run: code, libraries and machine. Environment variables are left out, secrets are redacted."""

from __future__ import annotations

import getpass
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from rankwise import __version__
from rankwise.redact import redact

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "mlflow",
    "numpy",
)
_LONGEST_DIFF = 1_000_000  # characters
_GIT_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class GitState:
    """The git repository that contains a directory.

    `problem` says why there is no `commit`; `branch` is None on a detached head; `remote` is the URL of `origin`.
    `diff` is redacted and cut to a million characters, `untracked` to 1,000 names.
    """

    commit: str | None = None
    branch: str | None = None
    remote: str | None = None
    dirty: bool = False
    diff: str = ""
    untracked: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Facts about one process on one machine. They belong to an attempt: tags and an artifact, never params.

    Packages that are not installed are missing from `libraries`. `gpus` has name, memory and driver of each NVIDIA GPU.
    """

    git: GitState
    rankwise: str
    libraries: Mapping[str, str]
    python: str
    system: str
    host: str
    user: str
    cpu: str
    cpu_count: int
    memory_bytes: int
    gpus: tuple[str, ...]
    source: str

    def tags(self) -> dict[str, str]:
        """Return the facts as tags of a run, under MLflow's own names where there are any."""
        tags = {
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": self.source,
            "mlflow.source.git.commit": self.git.commit,
            "mlflow.source.git.branch": self.git.branch,
            "mlflow.source.git.repoURL": self.git.remote,
            "mlflow.source.git.dirty": None if self.git.commit is None else str(self.git.dirty).lower(),
            "mlflow.user": self.user,
            "rankwise.version": self.rankwise,
            "rankwise.host": self.host,
            "rankwise.cpu": self.cpu,
            "rankwise.gpus": "; ".join(self.gpus) or None,
        }
        return {key: value for key, value in tags.items() if value}

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for a JSON artifact, without the diff, which is a file of its own."""
        facts = asdict(self)
        facts["git"].pop("diff")
        return facts


def collect(directory: Path | None = None) -> Provenance:
    """Collect the provenance of this process, with the git state of `directory` (default: the working directory)."""
    return Provenance(
        git=git_state(directory or Path.cwd()),
        rankwise=__version__,
        libraries=_versions(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        host=socket.gethostname(),
        user=user_name(),
        cpu=_cpu(),
        cpu_count=psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpus=gpus(),
        source=Path(sys.argv[0]).name or "python",
    )


def git_state(directory: Path) -> GitState:
    """Return the state of the repository that contains `directory`; errors are in `problem`."""
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        branch = _git(directory, "rev-parse", "--abbrev-ref", "HEAD")
        remotes = _git(directory, "config", "--get-regexp", r"^remote\.origin\.url$", allowed=(0, 1))
        diff = redact(_git(directory, "diff", "HEAD", "--no-color", "--no-ext-diff"))
        untracked = _git(directory, "ls-files", "--others", "--exclude-standard").splitlines()
    except FileNotFoundError:
        return GitState(problem="git is not installed")
    except subprocess.CalledProcessError as error:
        return GitState(problem=redact(error.stderr.strip().partition("\n")[0]) or f"git ended with {error.returncode}")
    except subprocess.TimeoutExpired:
        return GitState(problem=f"git took longer than {_GIT_SECONDS:g} seconds")
    if len(diff) > _LONGEST_DIFF:
        diff = f"{diff[:_LONGEST_DIFF]}\n... cut: {len(diff)} characters in all\n"
    return GitState(
        commit=commit,
        branch=None if branch == "HEAD" else branch,
        remote=redact(remotes.partition(" ")[2]) or None,
        dirty=bool(diff or untracked),
        diff=diff,
        untracked=tuple(untracked[:1000]),
    )


def _git(directory: Path, *arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
    command = ["git", "-C", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_GIT_SECONDS, check=False)
    if done.returncode not in allowed:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    # Not the start: the first character of a diff line matters.
    return done.stdout.rstrip("\n")


def _versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def user_name() -> str:
    """Return the login name of this process; `unknown` if the system has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # In a container, a user id may have no name.
        return "unknown"


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpus() -> tuple[str, ...]:
    """Return name, memory and driver of each NVIDIA GPU, as reported by `nvidia-smi`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    fields = "--query-gpu=name,memory.total,driver_version"
    try:
        done = subprocess.run(
            [program, fields, "--format=csv,noheader"], capture_output=True, text=True, timeout=10.0, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return (f"nvidia-smi failed: {error}",)
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
