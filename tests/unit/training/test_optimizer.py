"""The optimizer of a pack against torch's and bitsandbytes' own, one arm at a time."""

import math

import bitsandbytes as bnb
import pytest
import torch
from helpers.packs import load_tiny, make_arm
from helpers.pretend_gpu import GPU, PretendTensor, pretend_gpu, to_gpu

from rankwise.exceptions import ConfigError
from rankwise.modeling.lora.packed import delete_adapter
from rankwise.training.arm import ArmTask, TrainingArm, join_arms, part_arms
from rankwise.training.optimizer import state_bytes

SETTINGS = [
    {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta2": 0.95, "max_grad_norm": 0.5},
    {"learning_rate": 3e-3, "adam_beta1": 0.8, "max_grad_norm": 0.0},
    {"learning_rate": 5e-2, "adam_epsilon": 1e-3, "max_grad_norm": 3.0},
]
RANKS = (4, 4, 7)
STEPS = 4


class Pack:
    """Three arms of a tiny base, whose gradients are drawn."""

    def __init__(self, model, optim):
        self.model = model
        self.specs = [
            make_arm(seed=seed, lora={"r": rank}, training={"optim": optim, **settings})
            for seed, (settings, rank) in enumerate(zip(SETTINGS, RANKS, strict=True))
        ]
        self.arms = [TrainingArm(ArmTask(spec=spec, train=[0]), model) for spec in self.specs]
        try:
            self.optimizer = join_arms(model, self.arms, torch.float32)
        except BaseException:
            self.close()
            raise

    def close(self):
        for arm in self.arms:
            delete_adapter(self.model, arm.name)
        part_arms(self.model)

    def step(self, number, rate=1.0):
        """A step with gradients that depend on the arm and the number of the step."""
        living = [arm for arm in self.arms if arm.name in self.optimizer.stacks]
        for arm in living:
            stack = self.optimizer.stacks.of(arm.name)
            for name, gradient in stack.matrices(stack.gradients, arm.name):
                value = drawn(arm, name, gradient.shape, number)
                factor = 1.0
                if stack.folded and "lora_B" in name:
                    factor = 1.0 / arm.task.spec.lora.lora_alpha * arm.task.spec.lora.r
                gradient.copy_(PretendTensor(factor * value) if stack.device == GPU else factor * value)
        norms = self.optimizer.norms()
        rates = {arm.name: rate * arm.task.spec.training.learning_rate for arm in living}
        self.optimizer.update(norms, torch.isfinite(norms), rates, {arm.name: number for arm in living})
        return dict(zip(self.optimizer.stacks.adapters, norms.tolist(), strict=True))


def drawn(arm, name, shape, number):
    generator = torch.Generator().manual_seed(hash((arm.task.spec.seed, len(name), sum(map(ord, name)), number)))
    return torch.randn(shape, generator=generator)


def values(arm):
    return {name: parameter.detach().cpu().clone() for name, parameter in arm.parameters.items()}


def reference(arm, start, steps, make, rate=1.0):
    """Weights and norms of one arm by an optimizer over separate matrices."""
    training = arm.task.spec.training
    own = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = make(
        list(own.values()),
        lr=rate * training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )
    norms = []
    for number in range(1, steps + 1):
        for name, parameter in own.items():
            parameter.grad = drawn(arm, name, parameter.shape, number)
        limit = training.max_grad_norm or math.inf
        norms.append(float(torch.nn.utils.clip_grad_norm_(own.values(), limit)))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in own.items()}, norms


@pytest.fixture(params=["cpu", "gpu"])
def model(request, base, tmp_path):
    if request.param == "cpu":
        yield base.model
        return
    own = load_tiny(tmp_path, quantization={"load_in_4bit": False}).model
    with pretend_gpu():
        yield to_gpu(own)


@pytest.fixture
def pack(model):
    made = []

    def make(optim="adamw_torch_fused"):
        made.append(Pack(model, optim))
        return made[-1]

    yield make
    for each in made:
        each.close()


def assert_close(mine, theirs, tolerance=2e-6):
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance)


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, foreach=False, fused=False, **options)


def test_each_arm_gets_what_torchs_adamw_gives_it(pack):
    pack = pack()
    start = [values(arm) for arm in pack.arms]
    norms = [pack.step(number) for number in range(1, STEPS + 1)]
    for arm, before in zip(pack.arms, start, strict=True):
        expected, expected_norms = reference(arm, before, STEPS, adamw)
        assert_close(values(arm), expected)
        assert [each[arm.name] for each in norms] == pytest.approx(expected_norms, rel=1e-5)


def test_an_arm_whose_gradient_is_not_finite_keeps_its_weights_and_the_others_step(pack):
    pack = pack()
    pack.step(1)
    start = [values(arm) for arm in pack.arms]
    bad = pack.arms[1]
    stack = pack.optimizer.stacks.of(bad.name)
    own = stack.finish_gradients

    def poisoned():
        own()
        stack.gradients[stack.index(bad.name), 3] = torch.nan

    stack.finish_gradients = poisoned
    norms = pack.step(2)
    assert math.isnan(norms[bad.name])
    for arm, before in zip(pack.arms, start, strict=True):
        if arm is bad:
            assert_close(values(arm), before, 0)
        else:
            assert math.isfinite(norms[arm.name])
            assert pack.optimizer.is_finite(arm.name)
            assert any(not torch.equal(value, before[name]) for name, value in values(arm).items())


def test_a_rate_of_zero_changes_nothing(pack):
    pack = pack()
    start = [values(arm) for arm in pack.arms]
    pack.step(1, rate=0.0)
    for arm, before in zip(pack.arms, start, strict=True):
        assert_close(values(arm), before, 0)


@pytest.mark.parametrize("leaver", range(3))
def test_the_others_go_on_when_an_arm_leaves(pack, leaver):
    pack = pack()
    start = [values(arm) for arm in pack.arms]
    for number in range(1, STEPS + 1):
        pack.step(number)
        if number == 2:
            pack.optimizer.remove(pack.arms[leaver].name)
    for index, (arm, before) in enumerate(zip(pack.arms, start, strict=True)):
        if index != leaver:
            assert_close(values(arm), reference(arm, before, STEPS, adamw)[0])


def test_storage_is_as_small_as_the_arms_that_are_left_need(pack):
    pack = pack()
    sizes = [sum(stack.values.numel() for stack in pack.optimizer.stacks)]
    for arm in reversed(pack.arms[1:]):
        pack.optimizer.remove(arm.name)
        sizes.append(sum(stack.values.numel() for stack in pack.optimizer.stacks))
    own = [sum(parameter.numel() for parameter in arm.parameters.values()) for arm in pack.arms]
    assert sizes[1:] == [own[0] + own[1], own[0]]
    padded = 3 * own[2] if pack.optimizer.stacks.of(pack.arms[0].name).device == GPU else sum(own)
    assert sizes[0] == padded


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_a_stored_state_resumes_to_the_bit(base, optim, tmp_path):
    from safetensors.torch import load_file, save_file

    pack = Pack(base.model, optim)
    for number in (1, 2):
        pack.step(number)
    weights = [values(arm) for arm in pack.arms]
    for arm in pack.arms:
        moments = {key: value.contiguous() for key, value in pack.optimizer.snapshot()[arm.name].moments.items()}
        save_file(moments, tmp_path / f"{arm.name}.safetensors")
    for number in (3, 4):
        pack.step(number)
    expected = [values(arm) for arm in pack.arms]
    pack.close()
    again = Pack(base.model, optim)
    for arm, before in zip(again.arms, weights, strict=True):
        arm.load(before, "test")
        again.optimizer.load(arm.name, load_file(tmp_path / f"{arm.name}.safetensors"))
    for number in (3, 4):
        again.step(number)
    for arm, then in zip(again.arms, expected, strict=True):
        assert_close(values(arm), then, 0)
    again.close()


def test_moments_of_an_arm_do_not_depend_on_the_ranks_of_others(model):
    """So an arm resumes in another pack, padded to another rank."""
    pack = Pack(model, "adamw_torch_fused")
    pack.step(1)
    state = pack.optimizer.snapshot()[pack.arms[0].name].moments
    name = next(iter(pack.arms[0].parameters))
    assert state[f"{name}.exp_avg"].shape == pack.arms[0].parameters[name].shape
    pack.optimizer.remove(pack.arms[2].name)
    kept = pack.optimizer.snapshot()[pack.arms[0].name].moments
    assert all(torch.equal(state[key], kept[key]) for key in state)
    pack.close()


def test_8_bit_moments_give_what_bitsandbytes_gives_for_one_tensor(base):
    pack = Pack(base.model, "adamw_bnb_8bit")
    rows = [pack.optimizer.stacks.of(arm.name) for arm in pack.arms]
    start = [stack.values[stack.index(arm.name)].clone() for stack, arm in zip(rows, pack.arms, strict=True)]
    gradients = []
    for number in range(1, STEPS + 1):
        own = pack.optimizer.norms

        def keep(own=own):
            norms = own()
            gradients.append([s.gradients[s.index(a.name)].clone() for s, a in zip(rows, pack.arms, strict=True)])
            return norms

        pack.optimizer.norms = keep
        pack.step(number)
        pack.optimizer.norms = own
    for index, (arm, before) in enumerate(zip(pack.arms, start, strict=True)):
        training = arm.task.spec.training
        parameter = torch.nn.Parameter(before)
        optimizer = bnb.optim.AdamW(
            [parameter],
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
            optim_bits=8,
            min_8bit_size=1,
        )
        for each in gradients:
            parameter.grad = each[index].clone()
            torch.nn.utils.clip_grad_norm_([parameter], training.max_grad_norm or math.inf)
            optimizer.step()
        torch.testing.assert_close(
            rows[index].values[rows[index].index(arm.name)], parameter.detach(), rtol=1e-5, atol=1e-6
        )
    pack.close()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_the_estimate_of_states_is_what_they_take(base, optim):
    pack = Pack(base.model, optim)
    for arm in pack.arms:
        numbers = sum(parameter.numel() for parameter in arm.parameters.values())
        taken = 8 * numbers + sum(each.nbytes for each in pack.optimizer.snapshot()[arm.name].moments.values())
        assert state_bytes(numbers, arm.task.spec.training) == taken
    pack.close()


def test_eight_bit_states_take_a_bit_over_half_of_the_memory():
    numbers = 160 * 4096
    eight, full = (
        state_bytes(numbers, make_arm(training={"optim": o}).training) for o in ("adamw_bnb_8bit", "adamw_torch_fused")
    )
    assert eight / full == pytest.approx(0.627, abs=0.001)


def test_paged_states_need_a_gpu(base):
    with pytest.raises(ConfigError, match=r"paged_adamw_8bit needs a CUDA GPU, .* is on cpu; set it to adamw_bnb"):
        Pack(base.model, "paged_adamw_8bit")
