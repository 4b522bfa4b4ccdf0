"""A disk that fills up while a checkpoint is written: told with place and room, and the older one stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from helpers.fault_table import record
from helpers.packs import Recorder, load_tiny, make_arm, make_rows

from rankwise.exceptions import StorageError
from rankwise.files import tree_size
from rankwise.training.arm import ArmTask
from rankwise.training.checkpoint import Checkpoints
from rankwise.training.loop import train_pack


@contextmanager
def small_disk(place, size):
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, for a small tmpfs")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


class Sizes(Recorder):
    """Notes how large each checkpoint is."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def on_checkpoint(self, step, directory):
        super().on_checkpoint(step, directory)
        self.bytes.append(tree_size(directory))


@pytest.mark.faults
def test_a_full_disk_at_a_checkpoint_is_told_and_the_older_checkpoint_goes_on(tmp_path):
    base = load_tiny(tmp_path)
    arm = make_arm(training={"max_steps": 6, "save_steps": 2}, lora={"r": 64, "target_modules": "all-linear"})
    tasks = [ArmTask(spec=arm, train=make_rows(8), evaluation=None)]
    sizes = Sizes()
    train_pack(base, tasks, directory=tmp_path / "reference", observer=sizes)
    with small_disk(tmp_path / "disk", int(1.5 * sizes.bytes[0])) as place:
        meet_the_end(base, arm, tasks, place, tmp_path / "larger", sizes.bytes[0])


def meet_the_end(base, arm, tasks, small_disk, elsewhere, size):
    with pytest.raises(StorageError) as caught:
        train_pack(base, tasks, directory=small_disk, observer=Recorder())
    message = str(caught.value)
    assert str(small_disk) in message
    assert f"bytes of {shutil.disk_usage(small_disk).total:,} are free at {small_disk}" in message
    assert "No space left on device; free some space" in message
    newest = Checkpoints(small_disk, [arm.spec_hash], base).newest()
    assert newest is not None
    assert not list(small_disk.rglob(".tmp-*"))
    shutil.copytree(small_disk, elsewhere)
    steps = Recorder()
    (outcome,) = train_pack(base, tasks, directory=elsewhere, observer=steps).values()
    assert outcome.status == "finished"
    assert steps.started[arm.spec_hash] == newest.pack_step
    room = message[message.rindex("(") + 1 :].partition(" at ")[0]
    record(
        "disk full at a checkpoint (tmpfs)",
        "message with path and bytes; the older checkpoint intact",
        f"checkpoints of {size:,} bytes; went on from step {newest.pack_step}; told: {room}",
    )
