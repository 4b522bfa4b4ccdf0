"""One arm and many: what an arm gets in a pack is what it gets alone."""

import math
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bitsandbytes.autograd import _functions
from helpers.packs import ROWS, Recorder, distance, load_tiny, make_arm, make_rows, planned, read_weights, train

from rankwise.data.batches import Sampler
from rankwise.data.tokens import Encoded
from rankwise.exceptions import ConfigError
from rankwise.modeling.adapter import read_adapter
from rankwise.training import step
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def different_arms():
    """Eight arms that differ in everything that arms of one pack may differ in."""
    return [
        make_arm(seed=1),
        make_arm(seed=2, lora={"r": 16, "lora_alpha": 8, "lora_dropout": 0.2}, training={"learning_rate": 3e-3}),
        make_arm(seed=3, lora={"r": 2, "use_rslora": True, "target_modules": EVERYTHING}, training={"max_steps": 2}),
        make_arm(
            seed=4,
            lora={"lora_dropout": 0.5, "target_modules": ["down_proj"]},
            training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        ),
        make_arm(seed=5, training={"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 5}),
        make_arm(seed=6, training={"lr_scheduler_type": "linear", "weight_decay": 0.3, "max_grad_norm": 0.05}),
        make_arm(
            seed=7,
            training={
                "per_device_train_batch_size": 5,
                "max_grad_norm": 0.0,
                "adam_beta2": 0.9,
                "train_sampling_strategy": "group_by_length",
            },
        ),
        make_arm(
            seed=8,
            lora={"lora_dropout": 0.1, "target_modules": "all-linear"},
            training={"gradient_accumulation_steps": 2, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1},
        ),
    ]


def assert_same(first, second, arm, *, losses=1e-5, weights=1e-4):
    """Outcomes and records of one arm from two trainings agree within the design's tolerance."""
    (outcomes, recorder), (others, other) = first, second
    assert recorder.losses(arm.spec_hash) == pytest.approx(other.losses(arm.spec_hash), rel=losses)
    mine, theirs = outcomes[arm.spec_hash], others[arm.spec_hash]
    assert mine.steps == theirs.steps
    assert distance(read_weights(mine.adapter), read_weights(theirs.adapter)) < weights


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory):
    return train(base, different_arms(), tmp_path_factory.mktemp("packed"))


@pytest.mark.parametrize("index", range(8))
def test_an_arm_in_a_pack_gets_what_it_gets_alone(base, packed, tmp_path, index):
    arm = different_arms()[index]
    assert_same(packed, train(base, [arm], tmp_path), arm)


@pytest.fixture(scope="module")
def eight_bit(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("eight-bit"), quantization={"load_in_4bit": False, "load_in_8bit": True})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_arms_over_an_8_bit_base_get_in_a_pack_what_they_get_alone(eight_bit, tmp_path, checkpointing):
    quantization = {"load_in_4bit": False, "load_in_8bit": True}
    arms = [
        make_arm(
            seed=seed,
            quantization=quantization,
            lora={"target_modules": "all-linear", "lora_dropout": 0.1},
            training={"gradient_checkpointing": checkpointing, "per_device_train_batch_size": seed},
        )
        for seed in (1, 2)
    ]
    together = train(eight_bit, arms, tmp_path / "together")
    for arm in arms:
        assert_same(together, train(eight_bit, [arm], tmp_path / "alone"), arm)


def test_products_of_an_8_bit_base_are_those_of_training_and_not_rounded_to_8_bit(eight_bit, tmp_path, monkeypatch):
    """bitsandbytes rounds the inputs too in evaluation mode, into which a new adapter must not put its layer."""
    used = set()
    for name in ("MatMul8bitFp", "MatMul8bitLt"):
        own = getattr(_functions, name).forward
        monkeypatch.setattr(
            getattr(_functions, name), "forward", staticmethod(lambda *a, n=name, f=own: used.add(n) or f(*a))
        )
    arm = make_arm(quantization={"load_in_4bit": False, "load_in_8bit": True}, lora={"target_modules": "all-linear"})
    train(eight_bit, [arm], tmp_path)
    assert used == {"MatMul8bitFp"}


def test_the_wait_for_the_device_counts_for_all_arms(base, tmp_path, monkeypatch):
    """On a GPU passes return at once, and the time that they take is where their numbers are read."""
    own = torch.Tensor.tolist

    def late(tensor):
        if tensor.dim() == 2 and len(tensor) == 2:
            time.sleep(0.5)
        return own(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", late)
    arms = [
        make_arm(seed=seed, training={"max_steps": 2, "per_device_train_batch_size": 1 + seed % 2}) for seed in (1, 2)
    ]
    _, recorder = train(base, arms, tmp_path, rows=make_rows(12, shortest=9, longest=9))
    (_, large), (_, small) = (recorder.steps[arm.spec_hash] for arm in arms)
    assert large.seconds + small.seconds > 0.5
    assert large.seconds == pytest.approx(2 * small.seconds, rel=0.3)


def test_the_order_of_arms_and_gradient_checkpointing_change_nothing(base, packed, tmp_path):
    arms = [
        arm.model_copy(update={"training": arm.training.model_copy(update={"gradient_checkpointing": True})})
        for arm in reversed(different_arms())
    ]
    outcomes, recorder = train(base, arms, tmp_path)
    for arm, original in zip(arms, reversed(different_arms()), strict=True):
        assert recorder.losses(arm.spec_hash) == pytest.approx(packed[1].losses(original.spec_hash), rel=1e-5)
        mine, theirs = outcomes[arm.spec_hash].adapter, packed[0][original.spec_hash].adapter
        assert distance(read_weights(mine), read_weights(theirs)) < 1e-4


def run_out_of_memory(how):
    if how == "cuda":
        raise torch.OutOfMemoryError("injected")
    torch.empty(1 << 50)


@pytest.mark.parametrize("how", ["cuda", "cpu"])
def test_the_pack_in_parts_after_running_out_of_memory_gives_the_same(base, packed, tmp_path, monkeypatch, caplog, how):
    """In the second step, after a whole pass, and again in the next try; a CPU's allocator has errors of its own."""
    from rankwise.training.step import Stepper

    own = Stepper._pass
    passes = []

    def short_of_memory(self, each, weights):
        losses = own(self, each, weights)
        passes.append(len(each.shares))
        if len(passes) > 3 and len(each.shares) > 2:
            run_out_of_memory(how)
        return losses

    monkeypatch.setattr(Stepper, "_pass", short_of_memory)
    result = train(base, different_arms(), tmp_path)
    assert "8 arms are trained in 4 parts" in caplog.text
    assert passes[3:9] == [8, 4, 2, 2, 2, 2]
    for arm in different_arms():
        assert_same(packed, result, arm)
        # No step is made or told twice.
        records = result[1].steps[arm.spec_hash]
        assert [record.step for record in records] == list(range(1, result[0][arm.spec_hash].steps + 1))


def test_the_split_is_kept_with_the_checkpoints(base, tmp_path, monkeypatch):
    """What a resumed pack gets is byte-equal only in the passes that it had, whatever memory is free now."""
    from rankwise.training.step import Stepper

    seen = []
    own = Stepper._pass
    monkeypatch.setattr(Stepper, "_pass", lambda self, each, w: (seen.append(len(each.shares)), own(self, each, w))[1])
    arms = [make_arm(seed=seed, training={"max_steps": 4, "save_steps": 2}) for seed in range(4)]
    recorder = Recorder()
    tasks = [ArmTask(spec=arm, train=ROWS) for arm in arms]

    def stop_at(step):
        return lambda: len(recorder.steps.get(arms[0].spec_hash, ())) == step

    with planned(parts=2):
        train_pack(base, tasks, directory=tmp_path, observer=recorder, should_stop=stop_at(1))
    train_pack(base, tasks, directory=tmp_path, observer=recorder)
    assert set(seen) == {2}
    seen.clear()
    train_pack(base, tasks, directory=tmp_path / "other")
    assert set(seen) == {4}
    seen.clear()
    with planned(max_tokens=1):
        train_pack(base, tasks, directory=tmp_path / "short")
    assert set(seen) == {1}


def test_out_of_memory_with_one_arm_says_what_to_change(base, tmp_path, monkeypatch):
    from rankwise.exceptions import JobError
    from rankwise.training.step import Stepper

    def no_memory(self, each, weights):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(Stepper, "_pass", no_memory)
    with pytest.raises(JobError, match=r"one arm at a time on cpu: lower training.per_device_train_batch_size"):
        train(base, [make_arm()], tmp_path)


def test_records_say_what_a_step_was(base, tmp_path):
    arm = make_arm(training={"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear", "max_steps": 4})
    outcomes, recorder = train(base, [arm], tmp_path)
    records = recorder.steps[arm.spec_hash]
    assert [record.step for record in records] == [1, 2, 3, 4]
    assert [record.learning_rate for record in records] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert all(record.grad_norm > 0 and record.seconds > 0 for record in records)
    assert sum(record.tokens for record in records) == pytest.approx(
        16 / 12 * sum(len(row.input_ids) for row in ROWS), rel=0.3
    )
    assert all(4 <= record.supervised_tokens <= 16 for record in records)
    outcome = outcomes[arm.spec_hash]
    assert (outcome.status, outcome.steps, outcome.reason) == ("finished", 4, None)
    assert outcome.seconds == pytest.approx(sum(record.seconds for record in records))
    assert outcome.metrics["train.loss"] == records[-1].loss
    assert outcome.metrics["train.tokens_per_second"] > 0
    assert outcome.peak_memory_bytes > 10 << 20
    assert recorder.ended == [outcome]
    assert recorder.started == {arm.spec_hash: 0}


def test_the_result_is_a_peft_directory_that_names_its_base(base, tmp_path):
    arm = make_arm(lora={"lora_dropout": 0.1, "use_rslora": True})
    outcomes, _ = train(base, [arm], tmp_path)
    stored = read_adapter(outcomes[arm.spec_hash].adapter)
    config, tensors = stored.config, stored.tensors
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.1, True)
    assert config.base_model_name_or_path == base.source
    assert config.revision == base.revision
    assert sorted(config.target_modules) == ["q_proj", "v_proj"]
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_arms_leave_when_their_steps_are_done(base, tmp_path):
    arms = [make_arm(seed=seed, training={"max_steps": steps}) for seed, steps in ((1, 1), (2, 4), (3, 2))]
    outcomes, recorder = train(base, arms, tmp_path)
    assert [outcomes[arm.spec_hash].steps for arm in arms] == [1, 4, 2]
    assert [outcome.spec_hash for outcome in recorder.ended] == [arms[index].spec_hash for index in (0, 2, 1)]


def test_epochs_become_steps(base, tmp_path):
    arm = make_arm(training={"max_steps": None, "num_train_epochs": 1.5, "per_device_train_batch_size": 4})
    outcomes, _ = train(base, [arm], tmp_path)
    assert outcomes[arm.spec_hash].steps == math.ceil(1.5 * 12 / 4)


def poisoned_rows(arm, step):
    """Rows whose step `step` (from 1) holds a token that the poisoned embedding makes infinite; and that row's id."""
    index = Sampler(len(ROWS), arm.training.per_device_train_batch_size, arm.seed).indices(step - 1)[0]
    bad = ROWS[index]
    tokens = bad.input_ids.copy()
    tokens[0] = 310
    return [
        Encoded(id=row.id, input_ids=tokens, supervised=row.supervised) if row is bad else row for row in ROWS
    ], bad.id


@pytest.fixture
def poison(base):
    """Token 310 has an infinite embedding."""
    embedding = base.model.get_input_embeddings().weight
    kept = embedding[310].clone()
    embedding.data[310] = torch.inf
    yield
    embedding.data[310] = kept


@pytest.mark.usefixtures("poison")
def test_an_arm_driven_to_nan_stops_within_the_step_and_changes_no_bit_of_the_others(base, tmp_path):
    bad = make_arm(seed=1, lora={"lora_dropout": 0.1}, training={"max_steps": 6, "save_steps": 2})
    good = [
        make_arm(seed=2, lora={"r": 8, "lora_dropout": 0.2}, training={"max_steps": 6}),
        make_arm(seed=3, lora={"target_modules": "all-linear"}, training={"max_steps": 6}),
    ]
    rows, poisoned_id = poisoned_rows(bad, 4)
    recorder = Recorder()
    tasks = [ArmTask(spec=good[0], train=ROWS), ArmTask(spec=bad, train=rows), ArmTask(spec=good[1], train=ROWS)]
    outcomes = train_pack(base, tasks, directory=tmp_path / "nan", observer=recorder)
    # The reference: the same pack with healthy rows of the same shape, in which the arm ends with that step.
    short = bad.model_copy(update={"training": bad.training.model_copy(update={"max_steps": 4})})
    tasks[1] = ArmTask(spec=short, train=ROWS)
    dropped = Recorder()
    references = train_pack(base, tasks, directory=tmp_path / "dropped", observer=dropped)

    outcome = outcomes[bad.spec_hash]
    assert (outcome.status, outcome.steps) == ("nonfinite", 3)
    assert outcome.reason == f"nonfinite_loss: nan at step 4, rows {poisoned_id}"
    assert outcome.example_ids == (poisoned_id,)
    assert recorder.losses(bad.spec_hash) == dropped.losses(short.spec_hash)[:3]
    for arm in good:
        assert recorder.losses(arm.spec_hash) == dropped.losses(arm.spec_hash)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            mine, theirs = outcomes[arm.spec_hash].adapter, references[arm.spec_hash].adapter
            assert (mine / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.usefixtures("poison")
def test_a_non_finite_arm_keeps_its_last_good_checkpoint(base, tmp_path):
    arm = make_arm(seed=1, training={"max_steps": 6, "save_steps": 2})
    rows, _ = poisoned_rows(arm, 4)
    outcomes, _ = train(base, [arm], tmp_path / "a", rows)
    two = arm.model_copy(update={"training": arm.training.model_copy(update={"max_steps": 2})})
    reference, _ = train(base, [two], tmp_path / "b", ROWS)
    kept = read_weights(outcomes[arm.spec_hash].adapter)
    assert distance(kept, read_weights(reference[two.spec_hash].adapter)) == 0


@pytest.mark.usefixtures("poison")
def test_without_a_checkpoint_there_is_no_adapter_of_a_non_finite_arm(base, tmp_path):
    arm = make_arm(seed=1, training={"max_steps": 6})
    rows, _ = poisoned_rows(arm, 2)
    outcomes, _ = train(base, [arm], tmp_path, rows)
    assert outcomes[arm.spec_hash].adapter is None
    assert outcomes[arm.spec_hash].steps == 1


def test_a_gradient_that_is_not_finite_is_told_with_all_rows_of_the_step():
    losses = [(ROWS[:2], torch.tensor([0, 0, 1]), torch.ones(3)), (ROWS[2:3], torch.tensor([0]), torch.ones(1))]
    window = [ROWS[:2], ROWS[2:3]]
    work = step._ArmStep(arm=SimpleNamespace(step=4), micro_batches=window, supervised=4, streams=[], losses=losses)
    found = step._nonfinite(work, loss=1.0, grad_norm=math.inf)
    assert (found.quantity, found.step, found.number) == ("gradient", 5, math.inf)
    assert found.example_ids == tuple(row.id for row in ROWS[:3])


@pytest.mark.parametrize(
    ("training", "stop_at"),
    [({"max_steps": 1}, None), ({"max_steps": 3}, 1), ({"max_steps": 3, "save_steps": 1}, None)],
    ids=["at the end", "at a pause", "at a checkpoint"],
)
def test_weights_that_overflow_in_an_update_are_kept_nowhere(base, tmp_path, training, stop_at):
    arm = make_arm(training={"learning_rate": 3e38, "weight_decay": 1.0, **training})
    task = ArmTask(spec=arm, train=ROWS, evaluation=ROWS[:5], stop_at=stop_at)
    outcome = train_pack(base, [task], directory=tmp_path)[arm.spec_hash]
    assert (outcome.status, outcome.adapter, outcome.best) == ("nonfinite", None, None)
    assert outcome.reason.startswith("nonfinite_weights: nan at step 1, rows ")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_evaluation_during_training_finds_the_best_state(base, tmp_path):
    arm = make_arm(training={"max_steps": 6, "eval_steps": 2, "learning_rate": 0.05})
    outcomes, recorder = train(base, [arm], tmp_path)
    evaluations = recorder.evaluations[arm.spec_hash]
    assert [step for step, _ in evaluations] == [2, 4, 6]
    assert set(evaluations[0][1]) == {"eval.loss", "eval.perplexity", "eval.token_accuracy"}
    outcome = outcomes[arm.spec_hash]
    step, metrics = min(evaluations, key=lambda each: each[1]["eval.loss"])
    assert (outcome.best_step, outcome.best_value) == (step, metrics["eval.loss"])
    assert outcome.metrics["eval.loss"] == evaluations[-1][1]["eval.loss"]
    assert read_weights(outcome.best).keys() == read_weights(outcome.adapter).keys()
    # The best state is what a training of that many steps ends with.
    short = arm.model_copy(update={"training": arm.training.model_copy(update={"max_steps": step, "eval_steps": None})})
    reference, _ = train(base, [short], tmp_path / "short")
    assert distance(read_weights(outcome.best), read_weights(reference[short.spec_hash].adapter)) == 0


def test_patience_stops_an_arm_and_leaves_the_others(base, tmp_path):
    # No improvement exceeds the threshold, so that the second evaluation without one is the third evaluation.
    patient = {"eval_steps": 1, "early_stopping_patience": 2, "early_stopping_threshold": 100.0}
    stopping = make_arm(training={"max_steps": 6, **patient})
    going_on = make_arm(seed=2, training={"max_steps": 6, "eval_steps": 1, "early_stopping_patience": 6})
    outcomes, recorder = train(base, [stopping, going_on], tmp_path)
    outcome = outcomes[stopping.spec_hash]
    assert (outcome.status, outcome.steps) == ("finished", 3)
    assert outcome.reason == "stopped early after step 3 of 6: eval.loss did not improve in 2 evaluations"
    assert [step for step, _ in recorder.evaluations[stopping.spec_hash]] == [1, 2, 3]
    other = outcomes[going_on.spec_hash]
    assert (other.status, other.steps, other.reason) == ("finished", 6, None)
    # The result is the state after the third step, as of a training of three steps.
    short = make_arm(training={"max_steps": 3})
    reference, _ = train(base, [short], tmp_path / "short")
    assert distance(read_weights(outcome.adapter), read_weights(reference[short.spec_hash].adapter)) < 1e-5


def test_patience_survives_a_pause(base, tmp_path):
    patient = {"eval_steps": 1, "early_stopping_patience": 2, "early_stopping_threshold": 100.0}
    arm = make_arm(training={"max_steps": 6, **patient})
    task = ArmTask(spec=arm, train=ROWS, evaluation=ROWS)
    paused = train_pack(base, [replace(task, stop_at=2)], directory=tmp_path)[arm.spec_hash]
    assert (paused.status, paused.steps) == ("paused", 2)
    outcome = train_pack(base, [task], directory=tmp_path)[arm.spec_hash]
    assert (outcome.status, outcome.steps) == ("finished", 3)


def test_a_greater_metric_can_be_the_better_one(base, tmp_path):
    arm = make_arm(training={"max_steps": 4, "eval_steps": 1}, evaluation={"primary_metric": "eval.token_accuracy"})
    outcomes, recorder = train(base, [arm], tmp_path)
    best = max(metrics["eval.token_accuracy"] for _, metrics in recorder.evaluations[arm.spec_hash])
    assert outcomes[arm.spec_hash].best_value == best


def test_an_adapter_can_be_continued(base, tmp_path):
    first = make_arm(training={"max_steps": 2})
    outcomes, _ = train(base, [first], tmp_path / "first")
    start = outcomes[first.spec_hash].adapter
    second = make_arm(training={"max_steps": 1, "learning_rate": 1e-12}, init_from="models:/x/1")
    task = ArmTask(spec=second, train=ROWS, init_adapter=start)
    continued = train_pack(base, [task], directory=tmp_path / "second")[second.spec_hash]
    assert distance(read_weights(start), read_weights(continued.adapter)) < 1e-6


@pytest.mark.parametrize("lora", [{"lora_alpha": 64}, {"lora_alpha": 3, "use_rslora": True}])
def test_an_adapter_with_another_scaling_is_continued_as_what_it_computes(base, tmp_path, lora):
    first = make_arm(training={"max_steps": 4})
    outcomes, _ = train(base, [first], tmp_path / "first")
    start = outcomes[first.spec_hash].adapter

    def first_loss(lora):
        arm = make_arm(lora=lora, training={"max_steps": 1, "per_device_train_batch_size": 12}, init_from="models:/x/1")
        recorder = Recorder()
        task = ArmTask(spec=arm, train=ROWS, init_adapter=start)
        train_pack(base, [task], directory=tmp_path / "second", observer=recorder)
        return recorder.losses(arm.spec_hash)[0]

    assert first_loss(lora) == pytest.approx(first_loss({}), rel=1e-6)


def test_an_adapter_of_another_rank_cannot_be_continued(base, tmp_path):
    first = make_arm(training={"max_steps": 1})
    outcomes, _ = train(base, [first], tmp_path / "first")
    task = ArmTask(
        spec=make_arm(lora={"r": 8}, init_from="models:/x/1"),
        train=ROWS,
        init_adapter=outcomes[first.spec_hash].adapter,
    )
    with pytest.raises(ConfigError, match=r"8 matrices differ, the first is .*lora_A.weight: the arm has \(8, 64\)"):
        train_pack(base, [task], directory=tmp_path / "second")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: [], "at least one arm"),
        (lambda tasks: [tasks[0], tasks[0]], "two arms of the pack are equal"),
        (
            lambda tasks: [tasks[0], replace(tasks[1], evaluation=None)],
            "eval_steps is set, but there are no evaluation",
        ),
        (
            lambda tasks: [replace(tasks[0], spec=make_arm(quantization={"load_in_4bit": False})), tasks[1]],
            "do not share base, quantization",
        ),
        (
            lambda tasks: [
                replace(
                    tasks[0],
                    spec=make_arm(
                        training={"eval_steps": 1},
                        evaluation={"primary_metric": "eval.exact_match", "metrics": ["exact_match"]},
                    ).model_copy(update={"checkpoint": "best"}),
                )
            ],
            "best checkpoint by eval.exact_match needs generation",
        ),
        (lambda tasks: [replace(tasks[0], train=[])], "has no training rows"),
    ],
)
def test_packs_that_cannot_be_trained_are_refused(base, tmp_path, change, message):
    tasks = [
        ArmTask(spec=make_arm(seed=1), train=ROWS, evaluation=ROWS),
        ArmTask(spec=make_arm(seed=2, training={"eval_steps": 1}), train=ROWS, evaluation=ROWS),
    ]
    with pytest.raises(ConfigError, match=message):
        train_pack(base, change(tasks), directory=tmp_path)


def test_an_error_in_the_observer_leaves_the_base_clean(base, tmp_path):
    class Broken(Recorder):
        def on_step(self, spec_hash, record):
            raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"):
        train_pack(base, [ArmTask(spec=make_arm(), train=ROWS)], directory=tmp_path, observer=Broken())


def test_rows_with_wide_differences_in_length_train_like_alone(base, tmp_path):
    short = make_rows(6, seed=1, shortest=3, longest=4)
    long = make_rows(6, seed=2, shortest=30, longest=40)
    # Rows of three tokens leave gradients at rounding level, which Adam divides by themselves: hence the epsilon.
    arms = [make_arm(seed=seed, lora={"lora_dropout": 0.3}, training={"adam_epsilon": 1e-4}) for seed in (1, 2)]
    tasks = [ArmTask(spec=arms[0], train=short), ArmTask(spec=arms[1], train=long)]
    packed = Recorder()
    outcomes = train_pack(base, tasks, directory=tmp_path / "packed", observer=packed)
    for arm, task in zip(arms, tasks, strict=True):
        alone = Recorder()
        reference = train_pack(base, [task], directory=tmp_path / arm.short, observer=alone)
        assert_same((outcomes, packed), (reference, alone), arm)


def test_a_window_without_supervised_tokens_changes_nothing(base, tmp_path):
    rows = [
        Encoded(id=row.id, input_ids=row.input_ids, supervised=np.zeros_like(row.supervised)) for row in make_rows(4)
    ]
    arm = make_arm(training={"max_steps": 2})
    outcomes, recorder = train(base, [arm], tmp_path, rows)
    assert recorder.losses(arm.spec_hash) == [0.0, 0.0]
    assert not any(
        value.any() for key, value in read_weights(outcomes[arm.spec_hash].adapter).items() if "lora_B" in key
    )
