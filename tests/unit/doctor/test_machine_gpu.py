from __future__ import annotations

import torch

from rankwise.doctor import compute_probe, machine
from rankwise.doctor.finding import HealthState, ProbeError
from rankwise.settings import Settings

SETTINGS = Settings.load({})
FACTS = {
    "torch": "2.13.0",
    "built_for": "CPUs",
    "devices": "",
    "device": "cpu",
    "dtype": "float32: the CPU has neither",
    "fast_bfloat16": [],
    "kernels": {"cpu": {"version": "0.50", "library": "L", "seconds": 0.1, "difference": 0.0, "error": ""}},
}


def _nvidia_smi(tmp_path, monkeypatch, text, code=0):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'X'\n{text}\nX\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_every_gpu_is_shown_with_driver_and_capability(tmp_path, monkeypatch):
    _nvidia_smi(tmp_path, monkeypatch, "NVIDIA H100, 580.1, 9.0, 81559, 81000\nTesla P4, 580.1, 6.1, 7680, 7600")
    found = machine.driver(SETTINGS)
    assert found[0].state is HealthState.OK
    assert found[0].seen == "0: NVIDIA H100, driver 580.1, compute capability 9.0, 81000 of 81559 MiB free"
    assert found[1].state is HealthState.WARNING
    assert "below 7.5" in found[1].advice


def test_a_gpu_whose_memory_others_hold_is_a_warning(tmp_path, monkeypatch):
    _nvidia_smi(tmp_path, monkeypatch, "NVIDIA H100, 580.1, 9.0, 81559, 500")
    (found,) = machine.driver(SETTINGS)
    assert found.state is HealthState.WARNING


def test_a_driver_that_does_not_fit_is_a_problem(tmp_path, monkeypatch):
    _nvidia_smi(tmp_path, monkeypatch, "Failed to initialize NVML: Driver/library version mismatch", code=18)
    (found,) = machine.driver(SETTINGS)
    assert found.state is HealthState.PROBLEM
    assert "version mismatch" in found.seen


def _compute(monkeypatch, facts):
    monkeypatch.setattr(machine, "run_probe", lambda module, timeout: facts)
    return {each.name: each for each in machine.compute(SETTINGS)}


def test_a_driver_without_a_gpu_in_torch_is_a_problem(tmp_path, monkeypatch):
    assert _compute(monkeypatch, FACTS)["compute.torch"].state is HealthState.OK
    _nvidia_smi(tmp_path, monkeypatch, "")
    assert _compute(monkeypatch, FACTS)["compute.torch"].state is HealthState.PROBLEM


def test_what_fast_bfloat16_on_a_cpu_changes_is_said(monkeypatch):
    found = _compute(monkeypatch, {**FACTS, "fast_bfloat16": ["amx_bf16"], "dtype": "bfloat16: AMX"})["compute.dtype"]
    assert "on CPUs without it, auto is float32" in found.seen
    assert "set bnb_4bit_compute_dtype" in found.seen


def test_kernels_that_fail_or_compute_wrongly_are_problems(monkeypatch):
    for change in ({"error": "RuntimeError: no kernel"}, {"difference": 0.5}):
        kernels = {"cuda:0": {**FACTS["kernels"]["cpu"], **change}}
        found = _compute(monkeypatch, {**FACTS, "kernels": kernels})["compute.bitsandbytes.cuda:0"]
        assert found.state is HealthState.PROBLEM


def test_libraries_that_crash_are_a_problem(monkeypatch):
    def run_probe(module, timeout):
        raise ProbeError("signal 11: no output on stderr")

    monkeypatch.setattr(machine, "run_probe", run_probe)
    (found,) = machine.compute(SETTINGS)
    assert found.state is HealthState.PROBLEM
    assert "signal 11" in found.seen


def test_the_kernels_of_this_machine_compute_what_nf4_is(monkeypatch):
    found = compute_probe.kernels(torch.device("cpu"))
    assert found["error"] == ""
    assert found["difference"] < 1e-3
    right = compute_probe.bnb.functional.dequantize_4bit
    monkeypatch.setattr(compute_probe.bnb.functional, "dequantize_4bit", lambda *each: right(*each).roll(1, 0))
    assert compute_probe.kernels(torch.device("cpu"))["difference"] > 0.1
