"""Part `halving`: successive halving against the full grid: its time, and whether it finds the same winner.

The winner is looked for in ten sweeps, each with a seed of its own, over a small base that the benchmark has
pretrained; there the engine trains the full grids, since all ways compute the same. The time is measured on the base of
the other parts: the halving to its end, and P2's step, which times the steps of the full grid is what P2 takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.meter import spread
from benchmarks.subjects import Workload, make_workload, pretrained
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.halving import Competitor, Standing, decide, rungs
from rankwise.experiment.schema import EarlyStoppingSpec
from rankwise.modeling.base import LoadedBase
from rankwise.training.pack import train_pack
from rankwise.training.values import ArmTask

_RANKS = (2, 4, 8, 16)
_LEARNING_RATES = {"smollm2": (3e-4, 1e-3, 3e-3, 1e-2), "8b": (3e-5, 1e-4, 3e-4, 1e-3)}
_SMALL_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
_SMALL_BATCH = 4
ETA = 4
# An eighth, not a sixteenth: after fewer steps the smaller learning rates are ahead, whatever comes of them.
_FIRST_RUNG = 8


def measure(bench: Bench, micro_batch: int, save: Callable[[dict[str, Any]], None]) -> None:
    """The winners over the small base, then the time over the real one."""
    winners: list[dict[str, Any]] = []
    result: dict[str, Any] = {"complete": False, "arms": 16, "steps": bench.options.halving_steps, "winners": winners}
    subject = pretrained(bench.scratch)
    small: LoadedBase | None = None
    for seed in range(bench.options.halving_seeds):
        bench.check_time(15.0)
        workload = _workload(bench, subject, f"small-{seed}", _SMALL_BATCH, _SMALL_RATES, seed)
        small = small or workload.load()
        winners.append(_winner(workload, small, bench.scratch / f"small-{seed}"))
        bench.say(_sentence(f"halving, seed {seed}", winners[-1]))
        save(result)
    if bench.options.subject not in _LEARNING_RATES:
        save({**result, "complete": True})
        return
    bench.check_time(150.0)
    rates = _LEARNING_RATES[bench.options.subject]
    workload = _workload(bench, bench.subject, "halving", micro_batch, rates, 0)
    if bench.options.full:
        result["real"] = _winner(workload, bench.base, bench.scratch / "halving-full")
        bench.say(_sentence("halving on the real base", result["real"]))
    began = time.perf_counter()
    _, _, steps = halved(workload, bench.base, bench.scratch / "halving-timed")
    result |= {"halved_seconds": time.perf_counter() - began, "halved_steps": steps}
    if bench.options.trl:
        result["p2_step"] = _p2_step(bench, micro_batch)
        result["share"] = result["halved_seconds"] / (result["p2_step"] * 16 * bench.options.halving_steps)
        bench.say(f"halving: {result['halved_seconds']:.1f} s, {result['share']:.1%} of the full grid with P2")
    save({**result, "complete": True})


def halved(workload: Workload, base: LoadedBase, directory: Path) -> tuple[ArmSpec, Mapping[str, float], int]:
    """Train the arms with successive halving.

    Returns:
        The arm that was trained to its end with the smallest loss, the losses of all that were, and the steps made.
    """
    arms = {arm.spec_hash: arm for arm in workload.arms}
    total = workload.arms[0].training.optimizer_steps(len(workload.rows))
    stopping = EarlyStoppingSpec(min_steps=max(1, total // _FIRST_RUNG), eta=ETA)
    living, made, before = list(arms), 0, 0
    for number, step in enumerate(rungs(stopping, total)):
        outcomes = _train(workload, base, [arms[each] for each in living], directory, stop_at=step)
        made, before = made + len(living) * (step - before), step
        here = [
            Competitor(spec_hash=each, configuration=each, standing=Standing.PAUSED, rung=number, value=outcomes[each])
            for each in living
        ]
        decision = decide(stopping, here)
        assert decision is not None
        living = list(decision.promote)
    losses = _train(workload, base, [arms[each] for each in living], directory)
    made += len(living) * (total - before)
    best = min(losses, key=lambda spec_hash: losses[spec_hash])
    return arms[best], losses, made


def _winner(workload: Workload, base: LoadedBase, directory: Path) -> dict[str, Any]:
    """Halving against the full grid of the same arms."""
    began = time.perf_counter()
    found, _, steps = halved(workload, base, directory / "halved")
    middle = time.perf_counter()
    full = _train(workload, base, workload.arms, directory / "full")
    ended = time.perf_counter()
    best = min(full, key=lambda spec_hash: full[spec_hash])
    return {
        "same": found.spec_hash == best,
        # Both out of the full grid, where each arm was trained in the same pack.
        "loss": full[found.spec_hash],
        "best": full[best],
        "median": spread(list(full.values()))["median"],
        "steps": steps,
        "full_steps": len(full) * workload.arms[0].training.optimizer_steps(len(workload.rows)),
        "seconds": middle - began,
        "full_seconds": ended - middle,
    }


def _train(
    workload: Workload, base: LoadedBase, arms: Sequence[ArmSpec], directory: Path, stop_at: int | None = None
) -> dict[str, float]:
    """Train to a rung or to the end; the evaluation loss of each arm there."""
    tasks = [ArmTask(spec=arm, train=workload.rows, evaluation=workload.evaluation, stop_at=stop_at) for arm in arms]
    outcomes = train_pack(base, tasks, directory=directory)
    return {spec_hash: outcome.metrics["eval.loss"] for spec_hash, outcome in outcomes.items()}


def _workload(bench: Bench, subject: Any, name: str, micro_batch: int, rates: Sequence[float], seed: int) -> Workload:
    steps = bench.options.halving_steps
    points = [{"lora.r": rank, "training.learning_rate": rate, "seed": seed} for rank in _RANKS for rate in rates]
    return make_workload(
        subject, bench.scratch / name, bench.settings, device=bench.options.device, micro_batch=micro_batch,
        steps=steps, points=points, evaluation_rows=64 if subject is not bench.subject else 16, eval_steps=steps,
    )  # fmt: skip


def _p2_step(bench: Bench, micro_batch: int) -> float:
    """Seconds of one step of P2, as in the throughput part."""
    from benchmarks.peft_loop import start_values
    from benchmarks.trl_arms import describe, train_over_loaded_base

    workload = bench.workload(micro_batch, steps=bench.options.steps)
    arm = workload.arms[1]
    described = describe(workload, bench.base, arm, start_values(bench.base, arm), workload.definition.parent / "trl")
    block = train_over_loaded_base(arm, described, bench.reference, checkpointing=True)
    return spread(block.wall)["median"]


def _sentence(what: str, winner: Mapping[str, Any]) -> str:
    found = "the same winner" if winner["same"] else f"loss {winner['loss']:.4f}, the best has {winner['best']:.4f}"
    return f"{what}: {winner['steps']} of {winner['full_steps']} steps: {found}"
