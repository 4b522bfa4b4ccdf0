"""Arms that pause at a step, for a decision over a sweep, and go on later in any pack."""

import pytest
from helpers.packs import Recorder, distance, make_arm, make_rows, read_weights

from rankwise.exceptions import ConfigError
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack

ROWS = make_rows(12)
STEPS = 6


class Crash(Exception):
    """Stands for kill -9: nothing of the engine catches it."""


def arms():
    """Three arms with a schedule over all steps, dropout, accumulation; the second is evaluated on its way."""
    common = {"max_steps": STEPS, "save_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 1}
    return [
        make_arm(seed=1, lora={"lora_dropout": 0.2}, training=common),
        make_arm(seed=2, lora={"r": 8}, training={**common, "gradient_accumulation_steps": 2, "eval_steps": 3}),
        make_arm(seed=3, lora={"target_modules": "all-linear"}, training={**common, "weight_decay": 0.1}),
    ]


def tasks(specs, stops=(None, None, None)):
    return [
        ArmTask(spec=spec, train=ROWS, evaluation=ROWS[:4], stop_at=stop)
        for spec, stop in zip(specs, stops, strict=False)
    ]


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    recorder = Recorder()
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path_factory.mktemp("undisturbed"), observer=recorder)
    return outcomes, recorder


def assert_bytes(outcomes, undisturbed):
    for arm in arms():
        mine, theirs = outcomes[arm.spec_hash], undisturbed[0][arm.spec_hash]
        assert (mine.status, mine.steps) == ("finished", STEPS)
        assert files(mine.adapter) == files(theirs.adapter)


def test_a_whole_pack_pauses_and_goes_on_as_if_it_had_not(base, undisturbed, tmp_path):
    first, second = Recorder(), Recorder()
    paused = train_pack(base, tasks(arms(), (3, 3, 3)), directory=tmp_path, observer=first)
    for arm in arms():
        outcome = paused[arm.spec_hash]
        assert (outcome.status, outcome.steps, outcome.adapter) == ("paused", 3, None)
        assert outcome.reason == "paused after step 3 of 6"
        ((step, metrics),) = first.evaluations[arm.spec_hash]
        assert step == 3
        assert metrics["eval.loss"] == outcome.metrics["eval.loss"] == outcome.best_value
        assert outcome.best.is_dir()
    assert {outcome.spec_hash for outcome in first.ended} == set(paused)
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path, observer=second)
    assert second.started == dict.fromkeys((arm.spec_hash for arm in arms()), 3)
    assert_bytes(outcomes, undisturbed)
    for arm in arms():
        both = first.steps[arm.spec_hash] + second.steps[arm.spec_hash]
        expected = undisturbed[1].steps[arm.spec_hash]
        assert [(each.step, each.loss, each.learning_rate) for each in both] == [
            (each.step, each.loss, each.learning_rate) for each in expected
        ]


def test_an_arm_that_pauses_changes_no_bit_of_the_others(base, tmp_path):
    leaver = arms()[1]
    recorder = Recorder()

    def should_leave(spec_hash):
        return spec_hash == leaver.spec_hash and len(recorder.steps.get(spec_hash, ())) == 4

    left = train_pack(base, tasks(arms()), directory=tmp_path / "a", observer=recorder, should_leave=should_leave)
    paused = train_pack(base, tasks(arms(), (None, 4, None)), directory=tmp_path / "b")
    assert paused[leaver.spec_hash].status == "paused"
    for arm in (arms()[0], arms()[2]):
        assert files(paused[arm.spec_hash].adapter) == files(left[arm.spec_hash].adapter)


@pytest.mark.parametrize("stops", [(3, 3, 3), (4, 3, 4)])
def test_a_crash_right_after_a_pause_changes_nothing(base, tmp_path, stops):
    """The last arm that pauses is put aside, and nobody is told of it."""

    class CrashAtPause(Recorder):
        def on_end(self, outcome):
            super().on_end(outcome)
            if len(self.ended) == 3:
                raise Crash

    expected = train_pack(base, tasks(arms(), stops), directory=tmp_path / "a")
    with pytest.raises(Crash):
        train_pack(base, tasks(arms(), stops), directory=tmp_path / "b", observer=CrashAtPause())
    again = train_pack(base, tasks(arms(), stops), directory=tmp_path / "b")
    assert {outcome.status for outcome in again.values()} == {"paused"}
    for arm in arms():
        assert again[arm.spec_hash].metrics["eval.loss"] == expected[arm.spec_hash].metrics["eval.loss"]
    ends = [train_pack(base, tasks(arms()), directory=tmp_path / place) for place in "ab"]
    for arm in arms():
        assert files(ends[0][arm.spec_hash].adapter) == files(ends[1][arm.spec_hash].adapter)


def test_a_pause_outlives_a_crash_of_the_others(base, tmp_path):
    """The newest checkpoint is younger than the pause: the paused arm is not trained again."""

    class CrashLater(Recorder):
        def on_step(self, spec_hash, record):
            if record.step == 5:
                raise Crash

    with pytest.raises(Crash):
        train_pack(base, tasks(arms(), (None, 3, None)), directory=tmp_path, observer=CrashLater())
    recorder = Recorder()
    outcomes = train_pack(base, tasks(arms(), (None, 3, None)), directory=tmp_path, observer=recorder)
    assert arms()[1].spec_hash not in recorder.steps
    assert arms()[1].spec_hash not in recorder.evaluations
    assert [outcomes[arm.spec_hash].status for arm in arms()] == ["finished", "paused", "finished"]
    assert outcomes[arms()[1].spec_hash].metrics["eval.loss"] > 0


def test_a_paused_arm_goes_on_in_another_pack_beside_arms_that_pause_again(base, undisturbed, tmp_path):
    train_pack(base, tasks(arms(), (2, 2, 2)), directory=tmp_path)
    recorder = Recorder()
    first, _, third = arms()
    other = make_arm(seed=9, training={"max_steps": 2})
    given = [*tasks([first, third], (4, 4)), ArmTask(spec=other, train=ROWS)]
    outcomes = train_pack(base, given, directory=tmp_path, observer=recorder)
    assert recorder.started == {first.spec_hash: 2, third.spec_hash: 2, other.spec_hash: 0}
    assert [outcomes[arm.spec_hash].status for arm in (first, third, other)] == ["paused", "paused", "finished"]
    last = train_pack(base, tasks([third]), directory=tmp_path)[third.spec_hash]
    assert distance(read_weights(last.adapter), read_weights(undisturbed[0][third.spec_hash].adapter)) < 1e-4
    assert last.seconds > outcomes[third.spec_hash].seconds


def test_an_arm_that_is_past_its_pause_is_evaluated_where_it_is(base, tmp_path):
    arm = arms()[0]
    recorder = Recorder()
    stopped = train_pack(
        base,
        tasks([arm]),
        directory=tmp_path,
        observer=recorder,
        should_stop=lambda: len(recorder.steps.get(arm.spec_hash, ())) == 3,
    )
    assert stopped[arm.spec_hash].status == "stopped"
    again = Recorder()
    outcome = train_pack(base, tasks([arm], (2,)), directory=tmp_path, observer=again)[arm.spec_hash]
    assert (outcome.status, outcome.steps) == ("paused", 3)
    assert again.steps == {}
    assert [step for step, _ in again.evaluations[arm.spec_hash]] == [3]


def test_a_pause_at_the_end_is_an_end(base, tmp_path):
    arm = make_arm(training={"max_steps": 2})
    outcome = train_pack(base, tasks([arm], (2,)), directory=tmp_path)[arm.spec_hash]
    assert (outcome.status, outcome.steps) == ("finished", 2)


def test_pauses_that_cannot_be_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="stop_at must be at least 1 or None, got 0"):
        ArmTask(spec=arms()[0], train=ROWS, stop_at=0)
    task = ArmTask(spec=arms()[0], train=ROWS, stop_at=2)
    with pytest.raises(ConfigError, match="stop_at is 2, but there are no evaluation rows"):
        train_pack(base, [task], directory=tmp_path)
