"""The Dockerfile's steps, as they are written, without a container engine.

Each stage is a directory laid over this machine's own root (overlayfs, in a mount namespace of its own) in place of the
base image; RUN, COPY, ENV, ARG, WORKDIR and USER do there what they say, at the paths that they name, and nothing of it
is left on the machine. A container of the image is a process in that root: as the image's user, without capabilities,
over a root that cannot be written.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable).resolve()
KNOWN = {"FROM", "ARG", "ENV", "WORKDIR", "RUN", "COPY", "USER", "LABEL", "VOLUME", "CMD"}


@dataclass
class Stage:
    """One stage: its name, its steps as lines of a shell script, and the environment and user at its end."""

    name: str
    script: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    user: str = "0:0"


def instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and rest of each instruction."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "\n\\")
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.startswith("\\"):
            keyword, rest = found[-1]
            found[-1] = (keyword, f"{rest.rstrip()} {line[1:].strip()}")
        elif line.strip():
            keyword, _, rest = line.partition(" ")
            assert keyword in KNOWN, line
            found.append((keyword, rest.strip()))
    return found


def context(target: Path) -> Path:
    """What `.dockerignore` leaves for the builder: the last pattern that fits a file decides."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        path, kept = Path(name), True
        for pattern in patterns:
            wanted = pattern.removeprefix("!").removeprefix("**/")
            names = {str(part) for part in (path, *path.parents)} | ({*path.parts} if "**/" in pattern else set())
            if any(fnmatch(each, wanted) for each in names):
                kept = pattern.startswith("!")
        if kept and (ROOT / name).is_file():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / path)
    return target


@dataclass
class Image:
    """The Dockerfile, built below a directory.

    Attributes:
        work: Overlays and the context; on a real file system.
        arguments: `--build-arg`.
    """

    work: Path
    arguments: Mapping[str, str]

    def __post_init__(self) -> None:
        self.context = context(self.work / "context")
        self.stages = self._stages()

    @property
    def final(self) -> Stage:
        return self.stages[-1]

    def build(self) -> subprocess.CompletedProcess[str]:
        """Run all steps of all stages, in their order."""
        lines = ["set -eu"]
        for stage in self.stages:
            lines += [self._mount(stage), *stage.script]
        return self._in_namespace("\n".join(lines))

    def run(self, command: str, *, mounts: Mapping[str, Path] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a shell command as compose.yaml runs a container: as the image's user, closed, the root read-only.

        Args:
            command: For `sh -c`.
            mounts: Directories of this machine by path in the container, which may be written.
        """
        stage = self.final
        user, group = stage.user.split(":")
        root = self._root(stage)
        lines = ["set -eu", self._mount(stage), f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp"]
        for target, source in (mounts or {}).items():
            source.chmod(0o777)
            lines.append(f"mkdir -p {root}{target} && mount --bind {source} {root}{target}")
        lines.append(f"mount -o remount,ro {root}")
        closed = "--no-new-privs --bounding-set=-all --inh-caps=-all --clear-groups"
        lines.append(
            f"exec chroot {root} setpriv --reuid={user} --regid={group} {closed} "
            f"env -i {_pairs(stage.environment)} HOME=/tmp sh -c {shlex.quote(f'cd {stage.directory} && {command}')}"
        )
        return self._in_namespace("\n".join(lines))

    def _stages(self) -> list[Stage]:
        stages: list[Stage] = []
        given: dict[str, str] = {}
        for keyword, rest in instructions((ROOT / "platform" / "Dockerfile").read_text()):
            if keyword == "FROM":
                base, _, name = rest.partition(" AS ")
                assert base == "${PYTHON_IMAGE}", "the stages begin with the base image"
                # What Python's image has.
                search = f"{PYTHON.parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
                stages.append(Stage(name, environment={"PATH": search}))
                given = {}
                continue
            if not stages:
                assert keyword == "ARG"
                continue
            stage = stages[-1]
            if keyword == "ARG":
                name, _, default = rest.partition("=")
                given[name] = self.arguments.get(name, default)
            elif keyword == "ENV":
                stage.environment |= dict(part.split("=", 1) for part in shlex.split(rest))
            elif keyword == "WORKDIR":
                stage.directory = rest
                stage.script.append(f"mkdir -p {self._root(stage)}{rest}")
            elif keyword == "USER":
                stage.user = rest
            elif keyword == "COPY":
                stage.script.append(self._copy(stage, rest))
            elif keyword == "RUN":
                command = re.sub(r"--mount=\S+\s+", "", rest)
                # The workplace's own way to packages is pip's configuration.
                pip = {
                    name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))
                }
                environment = {"HOME": "/root", **pip, **given, **stage.environment}
                stage.script.append(
                    f"chroot {self._root(stage)} env -i {_pairs(environment)} "
                    f"sh -euc {shlex.quote(f'cd {stage.directory} && {command}')}"
                )
        return stages

    def _copy(self, stage: Stage, rest: str) -> str:
        words = rest.split()
        source = str(self.context)
        if words[0].startswith("--from="):
            name = words.pop(0).removeprefix("--from=")
            source = self._root(next(each for each in self.stages_so_far(stage) if each.name == name))
        *names, target = words
        place = target if target.startswith("/") else f"{stage.directory.rstrip('/')}/{target}"
        into = f"{self._root(stage)}{place}"
        lines = []
        for name in names:
            path = f"{source}/{name.lstrip('/')}"
            lines.append(
                f"if [ -d {path} ]; then mkdir -p {into} && cp -a {path}/. {into}/; else cp -a {path} {into}; fi"
            )
        return "\n".join(lines)

    def stages_so_far(self, stage: Stage) -> list[Stage]:
        """The stage's predecessors, by their names alone."""
        names = re.findall(r"^FROM \S+ AS (\S+)", (ROOT / "platform" / "Dockerfile").read_text(), re.MULTILINE)
        return [Stage(name) for name in names[: names.index(stage.name)]]

    def _root(self, stage: Stage) -> str:
        return str(self.work / stage.name / "root")

    def _mount(self, stage: Stage) -> str:
        place = self.work / stage.name
        for name in ("root", "upper", "work"):
            (place / name).mkdir(parents=True, exist_ok=True)
        root = place / "root"
        return "\n".join([
            f"mount -t overlay overlay -o lowerdir=/,upperdir={place}/upper,workdir={place}/work {root}",
            f"mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev",
            # Everybody may run the Python of the base image, under its usual name.
            f"ln -sfn {PYTHON.name} {root}{PYTHON.parent}/python",
            f"chmod o+x {' '.join(f'{root}{parent}' for parent in PYTHON.parents)}",
            # No process of the build sees this checkout.
            f"mount -t tmpfs tmpfs {root}{ROOT}",
        ])  # fmt: skip

    def _in_namespace(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", script],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def _pairs(environment: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
