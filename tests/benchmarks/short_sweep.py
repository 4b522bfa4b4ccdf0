"""Part `sweep`: a short sweep from the command to the last registered adapter, against a TRL process for each arm.

The base has been fetched, and quantized once, and the MLflow database exists before either begins. P1 quantizes the
base in each process, as its documentation has it; it saves its adapters and tracks nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.local_store import prepared_home

from benchmarks.bench import Bench
from benchmarks.engine import way_of
from benchmarks.gate import Gate
from benchmarks.meter import Use, measure_command
from benchmarks.peft_loop import start_values
from benchmarks.subjects import Workload, label
from rankwise.experiment.arm import ArmSpec
from rankwise.settings import child_environment

_TESTS = Path(__file__).parents[1]


class CommandFailed(Exception):
    """A measured command ended with an error; the message has the end of what it printed."""


def measure(bench: Bench, micro_batch: int, save: Callable[[dict[str, Any]], None]) -> None:
    """P1's arms, with the sweep in the middle of them."""
    options = bench.options
    workload = bench.workload(micro_batch, steps=options.sweep_steps)
    gate = bench.gate()
    arms = workload.arms[: options.sweep_arms]
    # Neither the smallest nor the largest ranks only: arms come in the order 2, 16, 4, 8.
    sampled = arms if options.full else arms[1 : 1 + options.sampled_arms]
    singles: list[dict[str, Any]] = []
    result: dict[str, Any] = {"complete": False, "arms": len(arms), "steps": options.sweep_steps, "p1": singles}
    half = (len(sampled) + 1) // 2
    if options.trl:
        for arm in sampled[:half]:
            singles.append(_process(bench, workload, arm, gate))
            save(result)
    result["sweep"] = _sweep(bench, workload, arms, gate, micro_batch)
    save(result)
    if options.trl:
        for arm in sampled[half:]:
            singles.append(_process(bench, workload, arm, gate))
            save(result)
    save({**result, "gate": gate.verdicts(), "tolerance": gate.tolerance, "rounding": gate.rounding, "complete": True})


def _process(bench: Bench, workload: Workload, arm: ArmSpec, gate: Gate) -> dict[str, Any]:
    """P1: one arm."""
    from benchmarks.trl_arms import P1, describe

    bench.check_time(120.0)
    path = describe(workload, bench.base, arm, start_values(bench.base, arm), workload.definition.parent / "trl")
    log = bench.out / "logs" / f"p1-{path.stem}.log"
    command = [sys.executable, "-m", "benchmarks.trl_loop", str(path)]
    use = _run(command, _environment(bench, {"PYTHONPATH": str(_TESTS)}), log, workload)
    found = json.loads((path.with_suffix("") / "result.json").read_text(encoding="utf-8"))
    gate.add(P1, {label(arm): found["losses"]})
    peak = found["peak_bytes"] if bench.options.device == "cuda" else use.peak_bytes
    bench.say(f"P1, {label(arm)}: {use.wall:.1f} s, {use.cpu:.1f} s CPU, {peak / 1e9:.2f} GB")
    return {"arm": label(arm), "wall": use.wall, "cpu": use.cpu, "peak_bytes": peak}


def _sweep(bench: Bench, workload: Workload, arms: tuple[ArmSpec, ...], gate: Gate, micro_batch: int) -> dict[str, Any]:
    """The command line, to its end; what counts is when the last adapter was registered."""
    bench.check_time(60.0)
    home = bench.scratch / f"home-{micro_batch}-{time.monotonic_ns()}"
    store = prepared_home(home)
    log = bench.out / "logs" / f"sweep-{micro_batch}.log"
    command = [sys.executable, "-m", "rankwise", "run", str(workload.definition), "--max-arms", str(len(arms))]
    environment = _environment(bench, {"RANKWISE_HOME": str(home), "RANKWISE_CACHE": str(bench.settings.cache)})
    use = _run([*command, "--json"], environment, log, workload)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store.tracking_uri)
    versions = client.search_model_versions("name = 'benchmark'")
    assert len(versions) == len(arms), f"{len(versions)} of {len(arms)} adapters are registered; see {log}"
    registered = max(version.creation_timestamp for version in versions) / 1000 - use.started
    names = {(str(arm.lora.r), str(arm.seed)): label(arm) for arm in arms}
    peak = use.peak_bytes
    for version in versions:
        run = client.get_run(version.run_id)
        history = client.get_metric_history(version.run_id, "train.loss")
        losses = [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
        gate.add(way_of(len(arms)), {names[run.data.params["lora.r"], run.data.params["seed"]]: losses})
        if bench.options.device == "cuda":
            peak = int(run.data.metrics["train.peak_memory_bytes"])
    bench.say(
        f"rankwise run, {len(arms)} arms: {registered:.1f} s to the last registered adapter, {use.wall:.1f} s and "
        f"{use.cpu:.1f} s CPU to the end of the comparison, {peak / 1e9:.2f} GB"
    )
    return {"registered": registered, "wall": use.wall, "cpu": use.cpu, "peak_bytes": peak}


def _run(command: list[str], environment: dict[str, str], log: Path, workload: Workload) -> Use:
    use = measure_command(command, environment, log, cwd=workload.definition.parent)
    if use.code != 0:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise CommandFailed(f"{' '.join(command)}: exit code {use.code}; the end of {log}:\n{end}")
    return use


def _environment(bench: Bench, changes: dict[str, str]) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    if bench.options.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    if bench.options.threads is not None:
        own["OMP_NUM_THREADS"] = str(bench.options.threads)
    environment = child_environment({**own, **changes})
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RANKWISE_DATABASE_URL"):
        environment.pop(name, None)
    return environment
