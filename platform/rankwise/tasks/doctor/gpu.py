"""The GPUs, as the driver knows them, and what torch and bitsandbytes can do here."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from rankwise.settings import Settings
from rankwise.tasks.doctor.finding import Finding, ok, problem, skipped, warning
from rankwise.tasks.doctor.program import ProgramFailed, ask

COMPUTE_S = 90.0
_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "memory.free")
# bitsandbytes' 4-bit kernels need Turing or newer for all of their dtypes; torch's wheels end earlier than that.
_OLDEST = 7.5


def driver(settings: Settings) -> Sequence[Finding]:
    """What `nvidia-smi` says: name, driver, compute capability and memory of each GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [skipped("gpu.driver", "no nvidia-smi: no NVIDIA GPU, or no driver; the CPU computes")]
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15.0, check=False)
    except subprocess.TimeoutExpired:
        return [problem("gpu.driver", "nvidia-smi does not answer", "restart the machine, or see its kernel log")]
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        return [problem("gpu.driver", f"nvidia-smi: {said.splitlines()[0] if said else done.returncode}", _REINSTALL)]
    return [_described(index, line) for index, line in enumerate(done.stdout.strip().splitlines())]


_REINSTALL = "install the NVIDIA driver that fits the kernel; in a container give it the GPU (--gpus all)"


def _described(index: int, line: str) -> Finding:
    name, version, capability, total, free = [part.strip() for part in line.split(",")]
    seen = f"{index}: {name}, driver {version}, compute capability {capability}, {free} of {total} MiB free"
    try:
        if float(capability) < _OLDEST:
            return warning("gpu.driver", seen, f"GPUs below {_OLDEST} are slow or refused by bitsandbytes: use the CPU")
        if float(free) < 0.2 * float(total):
            return warning("gpu.driver", seen, "another program holds its memory: `nvidia-smi` names it")
    except ValueError:  # A divided GPU (MIG) answers [N/A].
        pass
    return ok("gpu.driver", seen)


def compute(settings: Settings) -> Sequence[Finding]:
    """Devices that torch sees, the dtype that `auto` becomes, and bitsandbytes' kernels, tried on each device."""
    try:
        facts = ask("rankwise.tasks.doctor.compute_program", timeout=COMPUTE_S)
    except ProgramFailed as error:
        advice = "try `python -c 'import torch, bitsandbytes'`: the installation is broken, or the machine overloaded"
        return [problem("compute", f"torch and bitsandbytes do not start: {error}", advice)]
    return [_torch(facts), _dtype(facts), *(_kernels(device, each) for device, each in facts["kernels"].items())]


def _torch(facts: dict[str, Any]) -> Finding:
    seen = f"torch {facts['torch']}, built for {facts['built_for']}; {facts['devices'] or 'no GPU'}"
    if shutil.which("nvidia-smi") and not facts["devices"]:
        advice = "install the torch wheel for this driver's CUDA (pytorch.org), and see CUDA_VISIBLE_DEVICES"
        return problem("compute.torch", f"{seen}, although there is a driver", advice)
    return ok("compute.torch", seen)


def _dtype(facts: dict[str, Any]) -> Finding:
    seen = f"compute_dtype auto is {facts['dtype']}"
    if facts["device"] == "cpu" and facts["fast_bfloat16"]:
        # Not an error, and yet what differs most between two machines that should give the same numbers.
        seen += (
            f" ({', '.join(facts['fast_bfloat16'])}); on CPUs without it, it is float32: for the same numbers on both, "
            "name bnb_4bit_compute_dtype in the definition"
        )
    return ok("compute.dtype", seen)


def _kernels(device: str, facts: dict[str, Any]) -> Finding:
    name = f"compute.bitsandbytes.{device}"
    if facts["error"]:
        advice = "reinstall bitsandbytes for this torch and CUDA: `python -m bitsandbytes` tells more"
        return problem(name, f"bitsandbytes {facts['version']} cannot quantize to NF4 here: {facts['error']}", advice)
    seen = f"bitsandbytes {facts['version']} ({facts['library']}): NF4 there and back in {facts['seconds']:.2f} s"
    if facts["difference"] > 1e-2:
        advice = "its kernels compute wrongly on this device: take another version, and do not train"
        return problem(name, f"{seen}, but off by {facts['difference']:.3g} from its definition", advice)
    return ok(name, seen)
