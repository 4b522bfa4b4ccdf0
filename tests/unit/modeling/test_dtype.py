import pytest
import torch

from rankwise.modeling.base import default_device, resolve_dtype

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch):
    monkeypatch.delenv("RANKWISE_COMPUTE_DTYPE")


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16"])
def test_a_cpu_with_fast_bfloat16_computes_in_it_and_says_why(monkeypatch, flag):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True, "avx2": True})
    resolved = resolve_dtype(CPU)
    assert resolved.dtype is torch.bfloat16
    assert resolved.reason.startswith("bfloat16: the CPU has A")


def test_a_cpu_without_it_computes_in_float32_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx2": True})
    resolved = resolve_dtype(CPU)
    assert (resolved.dtype, resolved.name) == (torch.float32, "float32")
    assert "neither AVX512-BF16 nor AMX" in resolved.reason


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, "bfloat16: CUDA capability 9.0"),
        ((8, 0), torch.bfloat16, "bfloat16: CUDA capability 8.0"),
        ((7, 5), torch.float32, "float32: CUDA capability 7.5 has no bfloat16; float16 would need loss scaling"),
    ],
)
def test_a_gpu_is_told_by_its_capability(monkeypatch, capability, dtype, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    resolved = resolve_dtype(GPU)
    assert (resolved.dtype, resolved.reason) == (dtype, reason)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_what_is_asked_for_is_taken(name):
    resolved = resolve_dtype(CPU, name)
    assert (resolved.name, resolved.reason) == (name, f"{name}: as requested")


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_machine_can_be_held_to_one_dtype(monkeypatch, device):
    monkeypatch.setenv("RANKWISE_COMPUTE_DTYPE", "float16")
    resolved = resolve_dtype(device)
    assert (resolved.dtype, resolved.reason) == (torch.float16, "float16: set by RANKWISE_COMPUTE_DTYPE")
    assert resolve_dtype(device, "float32").name == "float32"


def test_without_a_gpu_the_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == CPU
