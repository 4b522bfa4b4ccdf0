"""The server of warm processes outlives whoever asks it and is killed."""

import json
import os
import socket
from pathlib import Path

import pytest
from helpers import warm


def asked(*, with_request):
    """What is left of a process that was killed while it asked."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(os.environ["WARM_SERVER"])
        if with_request:
            request = {
                "arguments": ["-c", "import time; time.sleep(60)"], "directory": "/", "environment": {},
                "executable": warm.python(), "session": False, "descriptors": [1],
            }  # fmt: skip
            with open(os.devnull, "w") as nothing:
                socket.send_fds(line, [json.dumps(request).encode()], [nothing.fileno()])


@pytest.mark.parametrize("with_request", [False, True])
def test_who_is_killed_while_it_asks_leaves_the_server_alive(with_request):
    asked(with_request=with_request)
    done = warm.run(["-c", "print('well')"], cwd=Path("/"), env={}, timeout=60)
    assert (done.returncode, done.stdout) == (0, "well\n")
