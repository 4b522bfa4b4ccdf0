"""Main program of a worker's child process: `python -m rankwise.tasks.child`, started by `rankwise.worker.child`.

Reads commands from standard input and exits when it closes. The kernel kills it when its parent dies. It ignores
SIGTERM and SIGHUP, which some supervisors send to every process: the parent decides when to stop.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import traceback

from rankwise.settings import Settings, close_new_files, set_process_defaults
from rankwise.worker.protocol import Message, Writer, read_messages

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run commands until the parent sends `quit` or is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--stacks", required=True)
    parser.add_argument("--width", type=int, default=120)
    parser.add_argument("--terminal", action="store_true")
    arguments = parser.parse_args()
    faulthandler.enable()
    stacks = open(arguments.stacks, "w")  # noqa: SIM115 - open for as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    os.set_inheritable(arguments.events, False)
    events = Writer(os.fdopen(arguments.events, "wb"))
    events.send({"event": "hello", "pid": os.getpid()})
    set_process_defaults()
    close_new_files()

    stop = threading.Event()
    commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
    # A light import: commands are read while the heavy libraries are being imported.
    from rankwise.tasks.session import Claims

    claims = Claims()

    def read_commands() -> None:
        for message in read_messages(sys.stdin.buffer):
            match message["do"]:
                case "beat":
                    claims.update(message["until"], message["lost"], message["cancelled"])
                case "stop":
                    stop.set()
                case _:
                    commands.put(message)
        os._exit(1)

    threading.Thread(target=read_commands, name="parent", daemon=True).start()
    exit_code = 0
    try:
        from rankwise.tasks.commands import COMMANDS
        from rankwise.tasks.session import Session
        from rankwise.worker.relay import RemoteLog, RemoteReporter

        logging.getLogger().addHandler(RemoteLog(events.send, level=Settings.load().log_level))
        logging.getLogger("rankwise").setLevel(logging.INFO)
        reporter = RemoteReporter(events.send, width=arguments.width, terminal=arguments.terminal)
        session = Session(settings=Settings.load(), reporter=reporter, emit=events.send, stop=stop, claims=claims)
        session.serve(commands.get, COMMANDS)
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    logging.shutdown()
    sys.stderr.flush()
    # Skip interpreter shutdown: threads of libraries can hang there, and Python aborts because the reading thread
    # holds the lock of standard input.
    os._exit(exit_code)


if __name__ == "__main__":
    main()
