"""The program of a worker's child: `python -m rankwise.tasks.child`, started by `rankwise.worker.child`.

It takes commands from its standard input, and ends with it; the kernel ends it when its parent dies. Only the parent
decides about signals: SIGTERM, which some supervisors send to all processes at once, is left to it.
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

from rankwise.settings import Settings, set_process_defaults
from rankwise.worker.protocol import Message, Writer, read_messages

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the parent says `quit`, or is gone."""
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

    stop = threading.Event()
    commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
    # Light: the parent's words are heard while the libraries are imported.
    from rankwise.tasks.session import Authority

    authority = Authority()

    def listen() -> None:
        for message in read_messages(sys.stdin.buffer):
            match message["do"]:
                case "beat":
                    authority.update(message["until"], message["lost"], message["cancelled"])
                case "stop":
                    stop.set()
                case _:
                    commands.put(message)
        os._exit(1)

    threading.Thread(target=listen, name="parent", daemon=True).start()
    code = 0
    try:
        from rankwise.tasks.commands import COMMANDS
        from rankwise.tasks.session import Session
        from rankwise.worker.relay import RemoteLog, RemoteReporter

        logging.getLogger().addHandler(RemoteLog(events.send, level=Settings.load().log_level))
        logging.getLogger("rankwise").setLevel(logging.INFO)
        voice = RemoteReporter(events.send, width=arguments.width, terminal=arguments.terminal)
        session = Session(settings=Settings.load(), voice=voice, emit=events.send, stop=stop, authority=authority)
        session.serve(commands.get, COMMANDS)
    except BaseException:
        traceback.print_exc()
        code = 1
    logging.shutdown()
    sys.stderr.flush()
    # Not through the interpreter's teardown: threads of libraries have been seen to hang there, and the one that
    # listens holds a lock on the standard input, at which Python would abort.
    os._exit(code)


if __name__ == "__main__":
    main()
