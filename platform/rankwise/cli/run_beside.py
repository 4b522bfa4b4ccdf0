"""Workers for the other GPUs of this machine, while `rankwise run` works on the first one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rankwise.cli.progress import Bars
from rankwise.settings import child_environment
from rankwise.worker.local_placer import LocalPlacer
from rankwise.worker.loop import WorkerLoop
from rankwise.worker.stopping import Stop

_STARTING_S = 30.0
_GIVING_BACK_S = 30.0


@contextmanager
def workers_beside(
    loop: WorkerLoop,
    bars: Bars,
    stop: Stop,
    gpus: Sequence[str],
    experiment: str,
    watched: str,
    max_arms: int | None,
    grace: float,
) -> Iterator[None]:
    """Run a worker on each of these GPUs, for jobs of one experiment, until the block ends.

    The block begins when they are there, so that the first claim leaves them their part.

    Args:
        loop: This process's worker.
        bars: Shows what they say.
        stop: The wish to stop, which is passed on.
        gpus: As `CUDA_VISIBLE_DEVICES` takes them; none for no workers.
        experiment: Whose jobs they do.
        watched: The run of the sweep that this process finishes itself.
        max_arms: The most arms trained together.
        grace: Seconds for a checkpoint after a wish to stop.
    """
    if not gpus:
        yield
        return
    end = Stop()
    command = [sys.executable, "-m", "rankwise", "worker", "--experiment", experiment, "--watched", watched]
    placer = LocalPlacer(
        [*command, f"--grace={grace}", *([] if max_arms is None else [f"--max-arms={max_arms}"])],
        gpus,
        environment=child_environment({"PYTHONSAFEPATH": "1"}),
        stop=end,
        say=bars.say,
        grace=grace + _GIVING_BACK_S,
    )
    thread = threading.Thread(target=placer.run, name="workers-beside")
    thread.start()
    stop.followers.append(end)
    try:
        if stop.asked:
            end.ask()
        elif not loop.await_workers(1 + len(gpus), _STARTING_S):
            bars.warn(f"not all workers of the GPUs {', '.join(gpus)} are there after {_STARTING_S:.0f} s")
        yield
    finally:
        stop.followers.remove(end)
        if not end.asked:
            end.ask()
        thread.join()
