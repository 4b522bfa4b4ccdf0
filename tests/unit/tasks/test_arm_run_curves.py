from helpers.arms import small_experiment

from rankwise.experiment.arm import ArmSpec
from rankwise.tasks.arm_run import Curves
from rankwise.training.arm import StepRecord


class Recorder:
    """Stands for a run: what it is told is what the test looks at."""

    def __init__(self):
        self.points = []

    def metrics(self, values, step):
        self.points.append((step, dict(values)))


def record(step, **changes):
    values = {
        "loss": 2.0,
        "learning_rate": 1e-3,
        "grad_norm": 1.5,
        "tokens": 50,
        "supervised_tokens": 9,
        "seconds": 0.5,
    }
    return StepRecord(step=step, **{**values, **changes})


def watched(logging_steps):
    arm = ArmSpec.of(small_experiment(training={"max_steps": 10, "logging_steps": logging_steps}))
    run, moved, notes = Recorder(), [], []
    return run, moved, notes, Curves({arm.spec_hash: (run, arm)}, moved.append, notes.append), arm.spec_hash


def test_every_point_has_the_four_curves():
    run, _, notes, curves, arm = watched(1)
    curves.on_step(arm, record(1))
    assert run.points == [
        (1, {"train.loss": 2.0, "train.learning_rate": 1e-3, "train.grad_norm": 1.5, "train.tokens_per_second": 100.0})
    ]
    assert notes == ["loss 2.000"]


def test_logging_steps_thins_the_curves_and_keeps_the_first_step():
    run, _, _, curves, arm = watched(3)
    for step in range(1, 8):
        curves.on_step(arm, record(step))
    assert [step for step, _ in run.points] == [1, 3, 6]


def test_the_bar_moves_on_by_the_furthest_arm_and_never_back():
    _, moved, _, curves, arm = watched(1)
    for step in (1, 2, 2, 1, 4):
        curves.on_step(arm, record(step))
    assert moved == [1, 1, 2]


def test_evaluations_during_training_are_points_too():
    run, _, _, curves, arm = watched(1)
    curves.on_evaluation(arm, 5, {"eval.loss": 1.25})
    assert run.points == [(5, {"eval.loss": 1.25})]
