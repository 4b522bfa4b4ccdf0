"""Commands in processes that need not import the libraries first; see `warm_server`.

`start` is called once by the process that leads a test run; the others find the server through the environment. What
starts a Python of its own through `sys.executable` inside a warm process gets a warm one too: a small program that asks
the server, stands for the process, and passes signals on; when it is killed the server kills the process.
"""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PATH = "WARM_SERVER"
_PROGRAM = "warm-python"
# huggingface_hub and torch read these while they are imported.
READ_AT_IMPORT = ("HF_", "OMP_NUM_THREADS", "PYTHON")


def start() -> Callable[[], None]:
    """Start the server; it imports the libraries when it is first asked. Returns what ends it."""
    directory = Path(tempfile.mkdtemp(prefix="warm-"))
    os.environ[_PATH] = str(directory / "socket")
    program = directory / _PROGRAM
    program.write_text(
        f"#!{sys.executable} -SE\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import warm\nsys.exit(warm.stand_for(sys.argv[1:]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("warm_server.py")), os.environ[_PATH]])
    while not Path(os.environ[_PATH]).exists():
        if server.poll() is not None:
            raise RuntimeError(f"the warm server ended with {server.returncode}")

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(directory)

    return end


def python() -> str:
    """What to start in place of `sys.executable`, with `-m MODULE` or `-c CODE`, for a process that is warm."""
    return str(Path(os.environ[_PATH]).with_name(_PROGRAM))


def server() -> dict[str, str]:
    """What the environment of a warm process must have, where that is made from nothing."""
    return {_PATH: os.environ[_PATH]}


def _ask(
    arguments: Sequence[str], directory: str, environment: Mapping[str, str], descriptors: Mapping[int, int]
) -> tuple[int, socket.socket]:
    """Start a process; `descriptors` has its own numbers and what they are here. Returns its pid and the line to it."""
    path = os.environ[_PATH]
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)
    request = {
        "arguments": list(arguments),
        "directory": directory,
        "environment": {**environment, _PATH: path},
        "executable": python(),
        "session": os.getsid(0) == os.getpid(),
        "descriptors": list(descriptors),
    }
    socket.send_fds(line, [json.dumps(request).encode()], list(descriptors.values()))
    pid = b""
    while not pid.endswith(b"\n"):
        byte = line.recv(1)
        if not byte:
            raise RuntimeError("the warm server does not answer")
        pid += byte
    return int(pid), line


def _wait(line: socket.socket) -> int:
    with line, line.makefile() as answer:
        return int(answer.readline())


def run(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with captured output, of `python -m ...` or `python -c ...`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        pid, line = _ask(arguments, str(cwd), env, {0: nothing.fileno(), 1: out.fileno(), 2: err.fileno()})
        line.settimeout(timeout)
        try:
            code = _wait(line)
        except TimeoutError:
            os.kill(pid, 9)
            err.seek(0)
            raise subprocess.TimeoutExpired(list(arguments), timeout, stderr=err.read().encode()) from None
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, out.read(), err.read())


def stand_for(arguments: Sequence[str]) -> int:
    """Be the process that runs `python ARGUMENTS`, as far as whoever started this one can tell."""
    import signal

    own = [int(name) for name in os.listdir("/proc/self/fd")]
    passed = [each for each in own if each < 3 or (_is_open(each) and os.get_inheritable(each))]
    pid, line = _ask(arguments, os.getcwd(), os.environ, {each: each for each in passed})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    for each in passed:
        if each != 2:
            os.close(each)
    code = _wait(line)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
