"""Stopping, crashing and resuming."""

import errno
import json
import re
import shutil
import threading

import pytest
import torch
from helpers.packs import Recorder, distance, make_arm, make_rows, read_weights
from safetensors.torch import save_file

from rankwise.exceptions import StorageError
from rankwise.training import checkpoint
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack

ROWS = make_rows(12)


class Crash(Exception):
    """Stands for kill -9: nothing of the engine catches it."""


class CrashAt(Recorder):
    """Crashes when an arm has made a step."""

    def __init__(self, spec_hash, step):
        super().__init__()
        self.at = (spec_hash, step)

    def on_step(self, spec_hash, record):
        super().on_step(spec_hash, record)
        if (spec_hash, record.step) == self.at:
            raise Crash


def arms():
    return [
        make_arm(
            seed=1,
            lora={"lora_dropout": 0.2},
            training={"max_steps": 7, "save_steps": 2, "lr_scheduler_type": "cosine"},
        ),
        make_arm(seed=2, lora={"r": 8}, training={"max_steps": 3, "gradient_accumulation_steps": 2, "eval_steps": 1}),
        make_arm(
            seed=3,
            lora={"target_modules": "all-linear"},
            training={"max_steps": 7, "save_steps": 2, "weight_decay": 0.1},
        ),
    ]


def tasks(specs):
    return [ArmTask(spec=spec, train=ROWS, evaluation=ROWS[:4]) for spec in specs]


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    return train_pack(base, tasks(arms()), directory=directory)


@pytest.mark.parametrize("step", [1, 3, 4, 6, 7])
def test_after_a_crash_at_any_step_the_adapters_are_byte_equal(base, undisturbed, tmp_path, step):
    with pytest.raises(Crash):
        train_pack(base, tasks(arms()), directory=tmp_path, observer=CrashAt(arms()[2].spec_hash, step))
    recorder = Recorder()
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path, observer=recorder)
    for arm in arms():
        mine, theirs = outcomes[arm.spec_hash], undisturbed[arm.spec_hash]
        assert files(mine.adapter) == files(theirs.adapter)
        assert (mine.best is None) == (theirs.best is None)
        if theirs.best is not None:
            assert files(mine.best) == files(theirs.best)
            assert (mine.best_step, mine.best_value) == (theirs.best_step, theirs.best_value)
    assert recorder.started[arms()[0].spec_hash] == (step - 1) // 2 * 2


def test_the_best_state_before_a_crash_stays_the_best(base, tmp_path):
    # Steps so large that rows it has not seen grow worse from the third step on.
    arm = make_arm(training={"max_steps": 5, "save_steps": 2, "eval_steps": 1, "learning_rate": 0.3})
    task = ArmTask(spec=arm, train=ROWS, evaluation=make_rows(20)[12:])
    undisturbed = train_pack(base, [task], directory=tmp_path / "undisturbed")[arm.spec_hash]
    with pytest.raises(Crash):
        train_pack(base, [task], directory=tmp_path / "crashed", observer=CrashAt(arm.spec_hash, 4))
    recorder = Recorder()
    crashed = train_pack(base, [task], directory=tmp_path / "crashed", observer=recorder)[arm.spec_hash]
    assert [step for step, _ in recorder.evaluations[arm.spec_hash]] == [3, 4, 5]
    assert (crashed.best_step, crashed.best_value) == (2, undisturbed.best_value)
    assert undisturbed.best_step == 2
    assert files(crashed.best) == files(undisturbed.best)


def test_generations_hold_all_living_arms_and_only_two_are_kept(base, tmp_path):
    kept = []

    class Look(Recorder):
        def on_checkpoint(self, step, directory):
            kept.append([path.name for path in sorted(directory.parent.glob("step-*"))])
            arm = directory / f"arm-{arms()[0].short}"
            assert {path.name for path in arm.iterdir()} == {"adapter", "optimizer.safetensors", "state.json"}
            assert json.loads((arm / "state.json").read_text())["step"] == step

    train_pack(base, tasks(arms()), directory=tmp_path, observer=Look())
    assert kept == [
        ["step-00000002"],
        ["step-00000002", "step-00000004"],
        ["step-00000004", "step-00000006"],
    ]
    assert not list(tmp_path.rglob("step-*"))
    assert not list(tmp_path.rglob(".tmp-*"))


def made(recorder, arm):
    """Steps that an arm has made."""
    return len(recorder.steps.get(arm.spec_hash, []))


def damage(path, how):
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()


@pytest.fixture(scope="module")
def crashed(base, tmp_path_factory):
    """A pack that crashed in step 5, with checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("crashed")
    with pytest.raises(Crash):
        train_pack(base, tasks(arms()), directory=directory, observer=CrashAt(arms()[0].spec_hash, 5))
    return directory


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("optimizer.safetensors", "flip"),
        ("optimizer.safetensors", "remove"),
        ("adapter/adapter_model.safetensors", "cut"),
        ("state.json", "flip"),
        ("../pack.json", "cut"),
        ("../manifest.json", "flip"),
        ("../manifest.json", "remove"),
    ],
)
def test_a_damaged_generation_is_passed_over_for_the_one_before(
    base, undisturbed, crashed, tmp_path, caplog, name, how
):
    shutil.copytree(crashed, tmp_path, dirs_exist_ok=True)
    (newest,) = tmp_path.rglob(f"step-00000004/arm-{arms()[0].short}")
    damage(newest / name, how)
    recorder = Recorder()
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path, observer=recorder)
    assert re.search("skipping .*step-00000004", caplog.text)
    assert recorder.started[arms()[0].spec_hash] == 2
    for arm in arms():
        assert files(outcomes[arm.spec_hash].adapter) == files(undisturbed[arm.spec_hash].adapter)


def test_a_stop_saves_and_the_next_call_goes_on_from_there(base, undisturbed, tmp_path):
    recorder = Recorder()
    outcomes = train_pack(
        base,
        tasks(arms()),
        directory=tmp_path,
        observer=recorder,
        should_stop=lambda: made(recorder, arms()[0]) >= 5,
    )
    first, second, third = (outcomes[arm.spec_hash] for arm in arms())
    assert (first.status, first.steps, first.adapter) == ("stopped", 5, None)
    assert first.reason == "stopped on request after step 5 of 7"
    assert (second.status, second.steps) == ("finished", 3)
    assert third.status == "stopped"
    again = Recorder()
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path, observer=again)
    assert again.started == {arms()[0].spec_hash: 5, arms()[2].spec_hash: 5}
    for arm in arms():
        assert files(outcomes[arm.spec_hash].adapter) == files(undisturbed[arm.spec_hash].adapter)
        assert outcomes[arm.spec_hash].seconds > 0


def test_a_stop_before_the_first_step_can_be_gone_on_from(base, undisturbed, tmp_path):
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path, should_stop=lambda: True)
    assert {outcome.steps for outcome in outcomes.values()} == {0}
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path)
    for arm in arms():
        assert files(outcomes[arm.spec_hash].adapter) == files(undisturbed[arm.spec_hash].adapter)


def test_one_arm_can_leave_while_the_others_go_on(base, undisturbed, tmp_path):
    recorder = Recorder()
    leaver, _, stayer = arms()

    def should_leave(spec_hash):
        return spec_hash == leaver.spec_hash and made(recorder, leaver) == 3

    outcomes = train_pack(base, tasks(arms()), directory=tmp_path, observer=recorder, should_leave=should_leave)
    assert (outcomes[leaver.spec_hash].status, outcomes[leaver.spec_hash].steps) == ("stopped", 3)
    assert outcomes[stayer.spec_hash].status == "finished"
    again = Recorder()
    alone = train_pack(base, tasks([leaver]), directory=tmp_path, observer=again)[leaver.spec_hash]
    assert again.started == {leaver.spec_hash: 3}
    assert distance(read_weights(alone.adapter), read_weights(undisturbed[leaver.spec_hash].adapter)) < 1e-4


def test_an_arm_that_left_joins_again_when_its_pack_is_resumed(base, undisturbed, tmp_path):
    leaver = arms()[0]

    class Leaves(CrashAt):
        def should_leave(self, spec_hash):
            return spec_hash == leaver.spec_hash and made(self, leaver) == 3

    observer = Leaves(arms()[2].spec_hash, 5)
    with pytest.raises(Crash):
        train_pack(base, tasks(arms()), directory=tmp_path, observer=observer, should_leave=observer.should_leave)
    recorder = Recorder()
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path, observer=recorder)
    assert recorder.started[leaver.spec_hash] == 3
    for arm in arms():
        assert outcomes[arm.spec_hash].status == "finished"
        mine, theirs = outcomes[arm.spec_hash].adapter, undisturbed[arm.spec_hash].adapter
        assert distance(read_weights(mine), read_weights(theirs)) < 1e-4


def test_an_arm_goes_on_in_another_pack(base, undisturbed, crashed, tmp_path):
    shutil.copytree(crashed, tmp_path, dirs_exist_ok=True)
    recorder = Recorder()
    other = [arms()[2], make_arm(seed=9, training={"max_steps": 2})]
    outcomes = train_pack(base, tasks(other), directory=tmp_path, observer=recorder)
    assert recorder.started == {other[0].spec_hash: 4, other[1].spec_hash: 0}
    mine, theirs = outcomes[other[0].spec_hash].adapter, undisturbed[other[0].spec_hash].adapter
    assert distance(read_weights(mine), read_weights(theirs)) < 1e-4


def test_a_pack_whose_results_are_there_is_not_trained_again(base, tmp_path):
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path)
    recorder = Recorder()
    assert train_pack(base, tasks(arms()), directory=tmp_path, observer=recorder) == outcomes
    assert not recorder.steps
    assert {outcome.spec_hash for outcome in recorder.ended} == set(outcomes)


def test_results_move_with_their_directory(base, tmp_path):
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = train_pack(base, tasks(arms()), directory=tmp_path / "there")
    for spec_hash, outcome in moved.items():
        assert outcome.adapter is not None
        assert outcome.adapter.is_relative_to(tmp_path / "there")
        assert outcome.steps == outcomes[spec_hash].steps


def rewrite(path, **changes):
    """Change a JSON file of a checkpoint, and its manifest."""
    from rankwise.modeling.fingerprint import write_manifest

    document = {key: value for key, value in json.loads(path.read_text()).items() if key not in changes}
    document |= {key: value for key, value in changes.items() if value is not None}
    path.write_text(json.dumps(document))
    (path.parent / "manifest.json").unlink()
    write_manifest(path.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "format version 99, not 1"),
        ({"engine": None}, "so its arms start again: version 1 of the engine began them, and this is version 2"),
        ({"engine": 3}, "so its arms start again: version 3 of the engine began them, and this is version 2"),
    ],
)
def test_a_checkpoint_of_another_release_is_not_used(base, tmp_path, caplog, changes, message):
    with pytest.raises(Crash):
        train_pack(base, tasks(arms()), directory=tmp_path, observer=CrashAt(arms()[0].spec_hash, 3))
    (pack,) = tmp_path.rglob("pack.json")
    rewrite(pack, **changes)
    recorder = Recorder()
    train_pack(base, tasks(arms()), directory=tmp_path, observer=recorder)
    assert message in caplog.text
    assert recorder.started[arms()[0].spec_hash] == 0


def test_an_arm_that_another_engine_saved_aside_starts_again_and_results_stay(base, undisturbed, tmp_path, caplog):
    leaver = arms()[0]
    outcomes = train_pack(base, tasks(arms()), directory=tmp_path, should_leave=lambda key: key == leaver.spec_hash)
    assert outcomes[leaver.spec_hash].status == "stopped"
    (state,) = tmp_path.rglob("aside/*/step-*/state.json")
    rewrite(state, engine=1)
    recorder = Recorder()
    train_pack(base, tasks([leaver]), directory=tmp_path, observer=recorder)
    assert recorder.started == {leaver.spec_hash: 0}
    assert "version 1 of the engine began them" in caplog.text
    again = Recorder()
    assert train_pack(base, tasks([leaver]), directory=tmp_path, observer=again)[leaver.spec_hash].status == "finished"
    assert not again.steps


def test_the_optimizers_state_is_stored_without_pickle(base, tmp_path):
    with pytest.raises(Crash):
        train_pack(base, tasks(arms()), directory=tmp_path, observer=CrashAt(arms()[0].spec_hash, 3))
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}
    from safetensors.torch import load_file

    (path,) = tmp_path.rglob(f"arm-{arms()[0].short}/optimizer.safetensors")
    state = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert state[f"{key}.exp_avg"].shape == (64, 4)
    assert state[f"{key}.exp_avg_sq"].dtype == torch.float32


def test_training_continues_while_a_checkpoint_is_written(base, undisturbed, tmp_path, monkeypatch):
    """What is written is the state at its step, whatever the arms have learned since."""
    two_steps_on = threading.Event()
    waited = []

    class Steps(Recorder):
        def on_step(self, spec_hash, record):
            super().on_step(spec_hash, record)
            if record.step == 4:
                two_steps_on.set()

    def late(*arguments):
        waited.append(two_steps_on.wait(60))
        return save_file(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", late)
    observer = Steps()
    arm = arms()[0]
    outcome = train_pack(base, tasks([arm]), directory=tmp_path / "late", observer=observer)[arm.spec_hash]
    assert all(waited)
    assert [step for step, _ in observer.checkpoints] == [2, 4, 6]
    monkeypatch.undo()
    two_steps_on.clear()
    monkeypatch.setattr(checkpoint, "save_file", late)
    with pytest.raises(Crash):
        train_pack(base, tasks([arm]), directory=tmp_path / "crash", observer=CrashLate(arm.spec_hash, two_steps_on))
    (pack,) = (tmp_path / "crash").rglob("pack.json")
    assert json.loads(pack.read_text())["pack_step"] == 2
    again = Recorder()
    resumed = train_pack(base, tasks([arm]), directory=tmp_path / "crash", observer=again)[arm.spec_hash]
    assert again.started[arm.spec_hash] == 2
    assert files(resumed.adapter) == files(outcome.adapter)


class CrashLate(Recorder):
    """Crashes in step 4, after it has let the writer of step 2 begin."""

    def __init__(self, spec_hash, event):
        super().__init__()
        self.spec_hash, self.event = spec_hash, event

    def on_step(self, spec_hash, record):
        if record.step == 4:
            self.event.set()
            raise Crash


def test_a_checkpoint_that_cannot_be_written_ends_the_pack(base, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="step-00000002"):
        train_pack(base, tasks(arms()[:1]), directory=tmp_path)
    assert not list(tmp_path.rglob("step-*"))
