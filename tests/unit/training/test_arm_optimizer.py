"""AdamW in fp32 and in 8 bit: states, checkpoints, and against bitsandbytes and torch by themselves."""

import bitsandbytes as bnb
import pytest
import torch
from helpers.packs import make_arm
from torch import nn

from rankwise.exceptions import ConfigError
from rankwise.training.arm import load_state, make_optimizer, state_bytes, state_tensors

SHAPES = {"a": (8, 1024), "b": (64, 4), "c": (16, 512)}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def training(optim):
    return make_arm(training={"optim": optim, "learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta2": 0.95}).training


def run(optimizer, own, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in own.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def assert_equal(first, second):
    for name in SHAPES:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("optim", "reference"),
    [
        ("adamw_torch_fused", lambda given, **options: torch.optim.AdamW(given, fused=True, **options)),
        ("adamw_bnb_8bit", lambda given, **options: bnb.optim.AdamW8bit(given, **options)),
    ],
)
def test_states_that_are_made_before_the_first_step_change_nothing(optim, reference):
    mine, theirs = parameters(), parameters()
    run(make_optimizer(list(mine.values()), training(optim)), mine, 3)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    run(reference(list(theirs.values()), **options), theirs, 3)
    assert_equal(mine, theirs)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_a_stored_state_goes_on_to_the_bit(optim, tmp_path):
    from safetensors.torch import load_file, save_file

    own = parameters()
    optimizer = make_optimizer(list(own.values()), training(optim))
    run(optimizer, own, 2)
    save_file(state_tensors(optimizer, own), tmp_path / "state.safetensors")
    copy = {name: nn.Parameter(value.detach().clone()) for name, value in own.items()}
    second = make_optimizer(list(copy.values()), training(optim))
    load_state(second, copy, load_file(tmp_path / "state.safetensors"))
    run(optimizer, own, 2, first=2)
    run(second, copy, 2, first=2)
    assert_equal(own, copy)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_the_estimate_of_states_is_what_they_take(optim):
    own = parameters()
    optimizer = make_optimizer(list(own.values()), training(optim))
    taken = sum(8 * parameter.numel() for parameter in own.values())
    for state in optimizer.state.values():
        tensors = (value for key, value in state.items() if isinstance(value, torch.Tensor) and "qmap" not in key)
        taken += sum(value.numel() * value.element_size() for value in tensors if value.numel() > 1)
    assert state_bytes([parameter.numel() for parameter in own.values()], training(optim)) == taken


def test_eight_bit_states_take_a_bit_over_half_of_the_memory():
    matrices = [16 * 4096] * 10
    half = state_bytes(matrices, training("adamw_bnb_8bit")) / state_bytes(matrices, training("adamw_torch_fused"))
    assert half == pytest.approx(0.627, abs=0.001)


def test_paged_states_need_a_gpu():
    with pytest.raises(ConfigError, match=r"paged_adamw_8bit needs a CUDA GPU, .* is on cpu; set it to adamw_bnb"):
        make_optimizer(list(parameters().values()), training("paged_adamw_8bit"))
