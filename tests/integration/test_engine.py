"""The engine against trusted references, and packs against arms alone, over tens of steps on a tiny NF4 base."""

from __future__ import annotations

import itertools
import random
from itertools import islice

import pytest
import torch
from helpers.packs import Recorder, distance, load_tiny, make_arm, make_rows, read_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from rankwise.data.batches import Sampler, collate
from rankwise.modeling.lora.packed import adapter_parameters, create_adapter, delete_adapter
from rankwise.training import step
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack
from rankwise.training.optimizer import PackOptimizer
from rankwise.training.streams import spread

ROWS = make_rows(40, shortest=6, longest=20)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 30


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return load_tiny(tmp_path_factory.mktemp("engine"))


def reference_arm(scheduler="cosine", rslora=False, length=None):
    return make_arm(
        seed=11,
        lora={"r": 8, "lora_alpha": 12, "target_modules": ALL, "use_rslora": rslora},
        training={
            **{"max_steps": None, **(length or {"max_steps": 12})},
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "lr_scheduler_type": scheduler,
            "warmup_steps": 3,
            "weight_decay": 0.1,
            "max_grad_norm": 0.7,
        },
    )


def peft_model(base, tmp_path, arm):
    """A model of peft alone over a base of its own, with the arm's start values."""
    create_adapter(base.model, arm)
    start = {key: value.detach().clone() for key, value in adapter_parameters(base.model, arm.adapter_name).items()}
    delete_adapter(base.model, arm.adapter_name)
    plain = load_tiny(tmp_path).model
    config = LoraConfig(
        r=arm.lora.r,
        lora_alpha=arm.lora.lora_alpha,
        target_modules=ALL if arm.lora.target_modules == "all-linear" else list(arm.lora.target_modules),
        use_rslora=arm.lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(plain, config)
    with torch.no_grad():
        for name, value in start.items():
            model.get_parameter(name.replace(".weight", ".default.weight")).copy_(value)
    return model


def peft_weights(model):
    return {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def batches(arm):
    grouped = arm.training.train_sampling_strategy == "group_by_length"
    lengths = tuple(len(row.input_ids) for row in ROWS) if grouped else None
    sampler = Sampler(len(ROWS), arm.training.per_device_train_batch_size, arm.seed, lengths)
    for micro_step in range(arm.training.max_steps * arm.training.gradient_accumulation_steps):
        batch = collate([ROWS[index] for index in sampler.indices(micro_step)], pad_token_id=3)
        yield batch, batch.input_ids.masked_fill(~batch.supervised, -100)


@pytest.mark.parametrize(("scheduler", "rslora"), [("cosine", False), ("linear", True)])
def test_the_engine_agrees_with_a_plain_peft_loop(base, tmp_path, scheduler, rslora):
    arm = reference_arm(scheduler, rslora)
    recorder = Recorder()
    outcomes = train_pack(base, [ArmTask(spec=arm, train=ROWS)], directory=tmp_path / "mine", observer=recorder)

    training = arm.training
    model = peft_model(base, tmp_path, arm).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = get_scheduler(scheduler, optimizer, num_warmup_steps=3, num_training_steps=training.max_steps)
    stream = batches(arm)
    losses, norms = [], []
    for _ in range(training.max_steps):
        window = [next(stream) for _ in range(training.gradient_accumulation_steps)]
        count = sum(batch.supervised_tokens for batch, _ in window)
        total = 0.0
        for batch, labels in window:
            output = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=labels,
                num_items_in_batch=torch.tensor(count),
            )
            output.loss.backward()
            total += output.loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)

    assert recorder.losses(arm.spec_hash) == pytest.approx(losses, rel=1e-5)
    assert [record.grad_norm for record in recorder.steps[arm.spec_hash]] == pytest.approx(norms, rel=1e-4)
    assert distance(read_weights(outcomes[arm.spec_hash].adapter), peft_weights(model)) < 1e-4


@pytest.mark.parametrize("streams", [None, 1], ids=["as it chooses", "one stream"])
def test_gradients_of_eight_unequal_arms_are_those_of_plain_peft(base, tmp_path, monkeypatch, streams):
    """Losses and gradients of a pack's first step, against one arm after the other by peft and padded rows."""
    arms = [each for each in different_arms() if not each.lora.lora_dropout]
    arms += [undropped(each) for each in different_arms() if each.lora.lora_dropout]
    if streams:
        monkeypatch.setattr(step, "attends_by_rows", lambda model, device: False)
        monkeypatch.setattr(step, "choose", lambda lengths, cost: [spread(each, streams) for each in lengths])
    packed, own = {}, PackOptimizer.norms

    def keep(optimizer):
        norms = own(optimizer)
        for stack in optimizer.stacks:
            for member in stack.members:
                matrices = stack.matrices(stack.gradients, member.adapter)
                packed[member.adapter] = {name: value.clone() for name, value in matrices}
        return norms

    monkeypatch.setattr(PackOptimizer, "norms", keep)
    one_step = [replaced(arm, max_steps=1) for arm in arms]
    recorder = Recorder()
    tasks = [ArmTask(spec=arm, train=ROWS) for arm in one_step]
    train_pack(base, tasks, directory=tmp_path / "pack", observer=recorder)
    for index, arm in enumerate(one_step):
        model = peft_model(base, tmp_path / str(index), arm).train()
        stream = list(islice(batches(arm), arm.training.gradient_accumulation_steps))
        count = sum(batch.supervised_tokens for batch, _ in stream)
        total = 0.0
        for batch, labels in stream:
            ids, mask = batch.input_ids, batch.attention_mask
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(count)).loss
            loss.backward()
            total += loss.item()
        assert recorder.losses(arm.spec_hash) == [pytest.approx(total, rel=1e-5)]
        theirs = {
            name.replace(".default", ""): parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        assert distance(packed[arm.adapter_name], theirs) < 1e-5


def replaced(arm, **training):
    return arm.model_copy(update={"training": arm.training.model_copy(update=training)})


def undropped(arm):
    return arm.model_copy(update={"lora": arm.lora.model_copy(update={"lora_dropout": 0.0})})


class Losses(TrainerCallback):
    """Keeps what the Trainer logs."""

    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class Epochs(torch.utils.data.Sampler):
    """The engine's order of one epoch after another."""

    def __init__(self, rows, arm):
        self._sampler = Sampler(rows, arm.training.per_device_train_batch_size, arm.seed)
        self._next = itertools.count()

    def __len__(self):
        return self._sampler.count

    def __iter__(self):
        return iter(self._sampler.epoch(next(self._next)))


class InOrder(Trainer):
    """Takes the rows in the order of the engine; batches, steps and epochs are the Trainer's own."""

    order = None

    def _get_train_sampler(self, *args):
        return self.order


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        (40, {"max_steps": 12}),
        (37, {"num_train_epochs": 1.6}),  # 13 batches: the last step of an epoch has one of them, with a single row
    ],
)
def test_the_engine_agrees_with_the_trainer_of_transformers(base, tmp_path, rows, length):
    arm = reference_arm(length=length)
    recorder = Recorder()
    data = ROWS[:rows]
    outcomes = train_pack(base, [ArmTask(spec=arm, train=data)], directory=tmp_path / "mine", observer=recorder)
    training = arm.training

    def gather(examples):
        batch = collate(examples, pad_token_id=3)
        labels = batch.input_ids.masked_fill(~batch.supervised, -100)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}

    model = peft_model(base, tmp_path, arm)
    seen = Losses()
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            use_cpu=True,
            **length,
            per_device_train_batch_size=training.per_device_train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.lr_scheduler_type,
            warmup_steps=training.warmup_steps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        data_collator=gather,
        callbacks=[seen],
    )
    trainer.order = Epochs(len(data), arm)
    trainer.train()
    assert len(seen.losses) == len(recorder.losses(arm.spec_hash)) == arm.optimizer_steps(len(data)) == 12
    # The Trainer logs rounded numbers in some releases: hence the absolute part.
    assert recorder.losses(arm.spec_hash) == pytest.approx(seen.losses, rel=1e-5, abs=6e-5)
    assert distance(read_weights(outcomes[arm.spec_hash].adapter), peft_weights(model)) < 1e-4


def different_arms():
    """Eight arms that differ in everything that arms of one pack may differ in; two leave early."""
    return [
        make_arm(seed=1, training={"max_steps": STEPS}),
        make_arm(
            seed=2,
            lora={"r": 16, "lora_alpha": 8, "lora_dropout": 0.2},
            training={"max_steps": STEPS, "learning_rate": 3e-3},
        ),
        make_arm(
            seed=3,
            lora={"r": 2, "use_rslora": True, "target_modules": ALL},
            training={"max_steps": STEPS, "learning_rate": 1e-3, "per_device_train_batch_size": 4},
        ),
        make_arm(
            seed=4,
            lora={"lora_dropout": 0.5, "target_modules": ["down_proj"]},
            training={"max_steps": STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        ),
        make_arm(
            seed=5,
            lora={"r": 6, "target_modules": ["o_proj", "up_proj"]},
            training={"lr_scheduler_type": "cosine", "warmup_steps": 5, "max_steps": STEPS},
        ),
        make_arm(
            seed=6,
            training={
                "lr_scheduler_type": "linear",
                "weight_decay": 0.3,
                "max_grad_norm": 0.05,
                "max_steps": STEPS // 2,
            },
        ),
        make_arm(
            seed=7,
            lora={"r": 8, "lora_dropout": 0.05},
            training={
                "train_sampling_strategy": "group_by_length",
                "per_device_train_batch_size": 5,
                "max_grad_norm": 0.0,
                "adam_beta2": 0.9,
                "learning_rate": 1e-3,
                "max_steps": STEPS // 3,
            },
        ),
        make_arm(
            seed=8,
            lora={"lora_dropout": 0.1, "target_modules": "all-linear"},
            training={
                "gradient_accumulation_steps": 2,
                "lr_scheduler_type": "constant_with_warmup",
                "warmup_steps": 0.1,
                "learning_rate": 2e-3,
                "max_steps": STEPS,
            },
        ),
    ]


def checkpointed(arm):
    return arm.model_copy(update={"training": arm.training.model_copy(update={"gradient_checkpointing": True})})


def train(base, arms, directory):
    recorder = Recorder()
    tasks = [ArmTask(spec=arm, train=ROWS) for arm in arms]
    outcomes = train_pack(base, tasks, directory=directory, observer=recorder)
    return {arm.seed: (recorder.losses(arm.spec_hash), read_weights(outcomes[arm.spec_hash].adapter)) for arm in arms}


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    results = {}
    for arm in different_arms():
        results |= train(base, [arm], tmp_path_factory.mktemp("alone"))
    return results


@pytest.mark.parametrize(("order", "checkpointing"), [(0, False), (1, True)])
def test_eight_arms_that_differ_in_everything_get_in_a_pack_what_they_get_alone(
    base, alone, tmp_path, order, checkpointing
):
    arms = different_arms()
    random.Random(order).shuffle(arms)
    if checkpointing:
        arms = [checkpointed(arm) for arm in arms]
    packed = train(base, arms, tmp_path)
    largest = {"relative difference of a loss": 0.0, "relative Frobenius norm": 0.0, "single element": 0.0}
    for seed, (losses, weights) in alone.items():
        mine = packed[seed]
        found = (
            max(abs(one - other) / other for one, other in zip(mine[0], losses, strict=True)),
            distance(mine[1], weights),
            max(float((mine[1][key] - weights[key]).abs().max()) for key in weights),
        )
        largest = {key: max(value, new) for (key, value), new in zip(largest.items(), found, strict=True)}
    print("; ".join(f"largest {key} {value:.2e}" for key, value in largest.items()))
    assert largest["relative difference of a loss"] < 1e-5
    assert largest["relative Frobenius norm"] < 1e-4


def arm_settings():
    """Settings of one arm; a larger epsilon than usual keeps Adam from dividing rounding errors by themselves."""
    return st.fixed_dictionaries(
        {
            "seed": st.integers(0, 3),
            "lora": st.fixed_dictionaries(
                {
                    "r": st.sampled_from([1, 2, 5, 8]),
                    "lora_dropout": st.sampled_from([0.0, 0.1, 0.6]),
                    "use_rslora": st.booleans(),
                    "target_modules": st.sampled_from([["q_proj"], ["v_proj", "down_proj"], ALL, "all-linear"]),
                }
            ),
            "training": st.fixed_dictionaries(
                {
                    "max_steps": st.integers(1, 4),
                    "per_device_train_batch_size": st.integers(1, 4),
                    "gradient_accumulation_steps": st.integers(1, 3),
                    "learning_rate": st.sampled_from([1e-3, 1e-2]),
                    "lr_scheduler_type": st.sampled_from(["constant", "linear", "cosine"]),
                    "warmup_steps": st.integers(0, 2),
                    "weight_decay": st.sampled_from([0.0, 0.1]),
                    "max_grad_norm": st.sampled_from([0.0, 0.5]),
                    "train_sampling_strategy": st.sampled_from(["random", "group_by_length"]),
                    "adam_epsilon": st.just(1e-5),
                }
            ),
        }
    )


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(drawn=st.lists(arm_settings(), min_size=2, max_size=4))
def test_any_pack_gives_each_arm_what_it_gets_alone(base, tmp_path_factory, drawn):
    arms = {arm.spec_hash: arm for arm in (make_arm(**each) for each in drawn)}.values()
    tasks = {arm.spec_hash: ArmTask(spec=arm, train=ROWS) for arm in arms}
    recorder = Recorder()
    outcomes = train_pack(base, list(tasks.values()), directory=tmp_path_factory.mktemp("packed"), observer=recorder)
    for spec_hash, task in tasks.items():
        single = Recorder()
        own = train_pack(base, [task], directory=tmp_path_factory.mktemp("alone"), observer=single)[spec_hash]
        assert recorder.losses(spec_hash) == pytest.approx(single.losses(spec_hash), rel=1e-5)
        assert distance(read_weights(outcomes[spec_hash].adapter), read_weights(own.adapter)) < 1e-4
