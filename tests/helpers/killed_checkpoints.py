"""Kill a pack after each thing it does to the disk while it writes a checkpoint, then let it go on.

    python -m helpers.killed_checkpoints DIRECTORY

Every file opened for writing, every weights file written, every fsync, rename, new directory and removal counts. The
children are forked from one process that has loaded the base. DIRECTORY/reference has the undisturbed pack,
DIRECTORY/at-N the one killed after the Nth event; a line of JSON on stdout tells of each: the event, the step that the
pack went on from, and how many steps were done again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from helpers.packs import Recorder, load_tiny, make_arm, make_rows
from rankwise.training import checkpoint
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack

SAVE_STEPS, STEPS = 2, 5
# The checkpoint that is cut off is the second one.
CUT_OFF_AT = 4
_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile"}


def make_tasks():
    """Two arms; one is evaluated, so that it has a best state."""
    rows = make_rows(20)
    training = {"max_steps": STEPS, "save_steps": SAVE_STEPS}
    arms = [
        make_arm(seed=1, training={**training, "eval_steps": 2}, lora={"lora_dropout": 0.2}),
        make_arm(seed=2, training=training, lora={"r": 8}),
    ]
    return [ArmTask(spec=arm, train=rows, evaluation=rows[:4]) for arm in arms]


class Killer(Recorder):
    """Counts what is done to the disk from one step on, and kills its own process after the event of a number."""

    def __init__(self, directory, at, report):
        super().__init__()
        self.directory, self.at, self.report = str(directory), at, report
        self.count, self.armed, self.last = 0, False, None
        sys.addaudithook(self.audit)
        for module, name in ((os, "fsync"), (checkpoint, "save_file")):
            setattr(module, name, self.counted(getattr(module, name), name))

    def on_step(self, spec_hash, record):
        self.armed = self.armed or record.step == CUT_OFF_AT

    def on_checkpoint(self, step, directory):
        if step == CUT_OFF_AT:
            self.event("checkpoint published")
            self.armed = False
            if self.at is None:
                os.write(self.report, json.dumps(self.count).encode())

    def counted(self, function, name):
        def call(*arguments, **more):
            result = function(*arguments, **more)
            self.event(name)
            return result

        return call

    def audit(self, event, arguments):
        if event not in _EVENTS or not self.armed or self.directory not in str(arguments[0]):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.event(f"before {event} {Path(str(arguments[0])).name}")

    def event(self, name):
        if not self.armed:
            return
        self.count += 1
        if self.count == self.at:
            os.write(self.report, json.dumps(name).encode())
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(base, directory, make_observer):
    """Train in a forked process; what it reported, whether it lived."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        observer = make_observer(writing)
        train_pack(base, make_tasks(), directory=directory, observer=observer)
        if isinstance(observer, Resumed):
            os.write(writing, json.dumps([observer.started, len(observer.steps)]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if said else None, os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


class Resumed(Recorder):
    """Notes where it began."""


def main(directory: Path) -> None:
    """Run the reference, and the pack killed after each event."""
    torch.set_num_threads(1)
    base = load_tiny(directory / "base")
    events, lived = in_child(
        base, directory / "reference", lambda report: Killer(directory / "reference", None, report)
    )
    assert lived, "the reference died"
    for number in range(1, events + 1):
        place = directory / f"at-{number}"
        name, lived = in_child(base, place, lambda report, place=place, number=number: Killer(place, number, report))
        assert not lived, f"event {number} of {events} did not come"
        (started, _), lived = in_child(base, place, lambda report: Resumed())
        assert lived
        print(json.dumps({"number": number, "event": name, "started": sorted(started.values())}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
