from types import SimpleNamespace

import pytest

from rankwise.cli.main import cli
from rankwise.cli.run import workers_on_other_gpus
from rankwise.worker import local_placer
from rankwise.worker.heartbeat import Stop
from rankwise.worker.loop import LoopOptions


@pytest.fixture
def placed(monkeypatch):
    """Stands in for the placer; what it was given."""
    given = []

    class Placer:
        def __init__(self, command, places, **named):
            given.append((command, places, named))

        def run(self):
            return 130

    monkeypatch.setattr(local_placer, "LocalPlacer", Placer)
    monkeypatch.setattr(local_placer.shutil, "which", lambda name: None)
    return given


def invoke(*arguments):
    return cli.main(["worker", *arguments], standalone_mode=False)


def test_each_gpu_gets_a_worker_of_its_own(placed):
    assert invoke("--gpus", "0,1", "--drain", "--max-arms", "4", "--grace", "5") == 130
    ((command, places, named),) = placed
    assert places == ("0", "1")
    assert command[2:] == ["rankwise", "worker", "--drain", "--max-arms=4", "--lease=60.0", "--grace=5.0"]
    assert named["drain"]
    assert named["grace"] > 5


def test_a_worker_that_was_asked_to_stop_has_done_what_it_should(placed):
    assert invoke("--gpus", "0,1") == 0


def test_the_gpus_of_the_machine_are_taken_without_being_named(placed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    invoke("--drain")
    assert placed[0][1] == ("2", "3")


def test_a_worker_beside_a_run_is_told_which_sweep_is_not_its_own(monkeypatch):
    given = []
    monkeypatch.setattr("rankwise.cli.worker._work", lambda *values: given.extend(values))
    monkeypatch.setattr(local_placer.shutil, "which", lambda name: None)
    invoke("--experiment", "e", "--watched", "run-1")
    (plan,) = [value for value in given if isinstance(value, LoopOptions)]
    assert (plan.experiment, plan.watched, plan.drain) == ("e", "run-1", False)


def test_a_run_names_its_sweep_to_the_workers_beside_it(monkeypatch):
    commands = []

    class Placer:
        def __init__(self, command, places, **named):
            commands.append(command)

        def run(self):
            return 0

    monkeypatch.setattr("rankwise.cli.run.LocalPlacer", Placer)
    loop = SimpleNamespace(await_workers=lambda count, timeout: True)
    bars = SimpleNamespace(say=lambda text: None)
    with workers_on_other_gpus(loop, bars, Stop(), ["1"], "e", "run-1", 4, 5.0):
        pass
    assert commands[0][2:] == [
        "rankwise", "worker", "--experiment", "e", "--watched", "run-1", "--grace=5.0", "--max-arms=4"
    ]  # fmt: skip
