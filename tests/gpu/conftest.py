"""Checks on a CUDA GPU. RANKWISE_GPU_CHECKS_ON=cpu runs those on a CPU that have a meaning there."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def device():
    import torch

    wanted = os.environ.get("RANKWISE_GPU_CHECKS_ON", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return wanted


@pytest.fixture(scope="session")
def gpu(device):
    """For checks that have no meaning without one."""
    if device != "cuda":
        pytest.skip("means nothing without a CUDA GPU")
    return device


@pytest.fixture(scope="session")
def load(tmp_path_factory, device):
    """Loads a tiny base, computing in a dtype; each call gives a copy of its own."""
    from helpers.bases import resolved, settings_in
    from helpers.packs import make_arm
    from helpers.tiny import make_base

    from rankwise.modeling.base import load_base

    root = tmp_path_factory.mktemp("gpu")
    path = make_base(root / "base", hidden_size=128, layers=4)

    def load(dtype="float32", **quantization):
        arm = make_arm(quantization={"bnb_4bit_compute_dtype": dtype, **quantization})
        return load_base(resolved(path), arm.quantization, settings_in(root), device=device)

    return load
