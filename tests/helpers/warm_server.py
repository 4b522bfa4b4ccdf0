"""A process that has imported the libraries and forks one process for each command.

Importing torch, transformers, peft, bitsandbytes and mlflow takes many seconds, in every command that a test runs. This
server does it once, at the first request; what it forks then runs the command as a process of its own: own arguments,
environment, working directory, files and signals. Nothing of rankwise is imported before the fork.

A request is one JSON message with the file descriptors of the process to be; the answer is its pid, and its exit status
when it has ended, as `subprocess` gives it.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
import warnings

LIBRARIES = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "mlflow.pyfunc",
    "mlflow.models",
    "matplotlib.figure",
    "sqlalchemy.orm",
    "alembic.command",
)
_PR_SET_PDEATHSIG = 1
_MOST_DESCRIPTORS = 32


def main(path):
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    wake_up, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken)
    # Ctrl-C at the terminal of a test run reaches the whole group; whoever started this server ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    clients = {}
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        selector.register(wake_up, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is server:
                    client, _ = server.accept()
                    pid = serve(client)
                    if pid is None:
                        client.close()
                        continue
                    clients[pid] = client
                    selector.register(client, selectors.EVENT_READ, pid)
                elif key.data is None:
                    os.read(wake_up, 4096)
                    report(clients, selector)
                elif key.data in clients:
                    # Whoever stood for the process was killed, so the process is.
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)


def report(clients, selector):
    while clients:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        client = clients.pop(pid)
        if client in selector.get_map():
            selector.unregister(client)
        with contextlib.suppress(OSError):  # Whoever asked may have gone.
            client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        client.close()


def serve(client):
    """Start what is asked for and return its pid; None where whoever asked was killed before it had said what."""
    try:
        message, descriptors, _, _ = socket.recv_fds(client, 1 << 20, _MOST_DESCRIPTORS)
    except OSError:
        return None
    if not message:
        return None
    request = json.loads(message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            importlib.import_module(name)
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            become(request, descriptors)
            code = execute(request["arguments"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for descriptor in descriptors:
        os.close(descriptor)
    # One that was killed in the meantime has closed its end: the selector sees that, and ends the process.
    with contextlib.suppress(OSError):
        client.sendall(f"{pid}\n".encode())
    return pid


def become(request, descriptors):
    """Take over what a new process would have got."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid() if request["session"] else os.setpgid(0, 0)
    # Out of the way of the numbers that they are to get.
    high = [(os.dup2(each, 500 + at, inheritable=False), each) for at, each in enumerate(descriptors)]
    for descriptor in os.listdir("/proc/self/fd"):
        if int(descriptor) < 500:
            with contextlib.suppress(OSError):  # The one that listed the directory is closed already.
                os.close(int(descriptor))
    for (number, _), target in zip(high, request["descriptors"], strict=True):
        os.dup2(number, target)
        os.close(number)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = request["executable"]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def execute(arguments):
    """Run `[-P] -m MODULE ...` or `[-P] -c CODE ...`, as Python does."""
    safe = arguments[:1] == ["-P"]
    option, what, *rest = arguments[safe:]
    if option not in ("-m", "-c"):
        raise ValueError(f"a warm process runs [-P] -m MODULE or -c CODE, got {arguments}")
    sys.argv = [what if option == "-m" else "-c", *rest]
    sys.path[:0] = [*([] if safe else [os.getcwd()]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
