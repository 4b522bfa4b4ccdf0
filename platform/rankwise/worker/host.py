"""Where a worker's process is: the processes of one place see each other, and can tell that one of them is dead."""

from __future__ import annotations

import os
import socket

from rankwise.jobs.job import Worker

_OF_THE_MACHINE = 0xEFFFFFFC
"""The kernel's number of the machine's own namespace of processes; those of containers count from `_OF_CONTAINERS`."""
_OF_CONTAINERS = 0xF0000000


def host() -> str:
    """The name of this machine; in a container with the number of its namespace of processes, as `NAME/361`.

    Containers may share a name (those in the network of their machine do), and do not see each other's processes.
    """
    name = socket.gethostname()
    try:
        number = int(os.readlink("/proc/self/ns/pid").partition("[")[2].rstrip("]"))
    except (OSError, ValueError):
        return name
    return name if number == _OF_THE_MACHINE else f"{name}/{number - _OF_CONTAINERS}"


def worker_name(pid: int) -> str:
    """What the queue calls the worker of a process."""
    return f"{host()}:{pid}"


def this_worker() -> Worker:
    """This process as a worker."""
    return Worker(name=worker_name(os.getpid()), host=host(), pid=os.getpid())
