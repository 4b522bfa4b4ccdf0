"""Part `halving`: successive halving against the full grid: its time, and whether it finds the same winner.

The winner is looked for in ten sweeps over a small base that the benchmark has pretrained (`pretrained` says what it
is and why), each with seeds and rows of its own, and in one sweep over the base of the other parts. There the halving
is timed too, from the first step to the last evaluation, and set against P2's step times the steps of the full grid
(P2 is not charged for evaluations).

The full grid is the halving's own arms trained to their ends: an arm that paused at a rung goes on with what it would
have done anyway, in whichever pack.

How the sweeps are set up, and why:

- One rung after an eighth of the steps, and all four arms that it leaves are trained to their ends (`finalists: 4`).
  The rung at a half, to which the next power of `eta` leads, would save 9 % of the grid's steps more, and choose one of
  four near equals while the learning rate is still high.
- Learning rates by decades, from one that hardly learns to one that does not hold: what a first sweep looks like, as
  long as the right order of magnitude is not known.

Tried with seeds from 100 on, which are none of those reported: with half decades, 1e-3 to 3e-2, the winner or one
within 1 % was found in 3 of 4 sweeps, and with the rung at a half in 0 of 4. There the best rate is the largest that
holds; its arms are in the middle of the field until the schedule lowers the rate, which no rung can see. The rates
below have their best one decade under the first that diverges; with them it was the winner itself in 4 of 4, by arms
of the best rate far ahead at the rung. Those for SmolLM2 go from a tenth of peft's usual 2e-4 upwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.meter import spread
from benchmarks.pretrained import SMALL_BATCH, SMALL_EVALUATION_ROWS, make_pretrained_base, small_subject
from benchmarks.subjects import Workload, make_workload
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.halving import ArmStanding, Competitor, decide, rungs
from rankwise.experiment.schema import EarlyStoppingSpec
from rankwise.modeling.base import LoadedBase
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack

RANKS = (2, 4, 8, 16)
SMALL_RATES = (5e-5, 5e-4, 5e-3, 5e-2)
REAL_RATES = {
    "smollm2": (2e-5, 2e-4, 2e-3, 2e-2),
    "8b": (2e-6, 2e-5, 2e-4, 2e-3),
    "tiny": (1e-4, 1e-3, 1e-2, 1e-1),
}
_REAL_EVALUATION_ROWS = 16
_FIRST_RUNG = 8
_SMALL_SECONDS = 60.0


def measure(bench: Bench, micro_batch: int, save: Callable[[dict[str, Any]], None]) -> None:
    """The winners over the small base, then winner and time over the real one."""
    winners: list[dict[str, Any]] = []
    arms = len(RANKS) * len(SMALL_RATES)
    result: dict[str, Any] = {"complete": False, "arms": arms, "winners": winners}
    path = make_pretrained_base(bench.scratch / "pretrained", bench.options.pretraining_steps)
    small: LoadedBase | None = None
    for seed in bench.options.halving_seeds:
        bench.check_time(_SMALL_SECONDS)
        directory = bench.scratch / f"small-{seed}"
        workload = make_workload(
            small_subject(path, directory, seed), directory, bench.settings, device="cpu", micro_batch=SMALL_BATCH,
            steps=bench.options.small_steps, points=_points(SMALL_RATES, seed),
            evaluation_rows=SMALL_EVALUATION_ROWS, eval_steps=bench.options.small_steps,
        )  # fmt: skip
        small = small or workload.load()
        winners.append({"seed": seed, **sweep(workload, small, directory)})
        bench.say(_sentence(f"halving, seed {seed}", winners[-1]))
        save(result)
    _measure_real(bench, micro_batch, result)
    save({**result, "complete": True})


def _measure_real(bench: Bench, micro_batch: int, result: dict[str, Any]) -> None:
    steps = bench.options.halving_steps
    rates = REAL_RATES[bench.options.subject]
    workload = make_workload(
        bench.subject, bench.scratch / "halving", bench.settings, device=bench.options.device, micro_batch=micro_batch,
        steps=steps, points=_points(rates, 0), evaluation_rows=_REAL_EVALUATION_ROWS, eval_steps=steps,
    )  # fmt: skip
    bench.check_time(3.0 * steps)
    # Before and after: the machine may be busier at one end.
    p2 = _p2_steps(bench, micro_batch) if bench.options.trl else []
    real = sweep(workload, bench.base, bench.scratch / "halving-real", on_halved=lambda seconds: bench.say(
        f"halving on the real base: {seconds:.1f} s"))  # fmt: skip
    result["real"] = real
    bench.say(_sentence("halving on the real base", real))
    if bench.options.trl:
        p2 += _p2_steps(bench, micro_batch)
        result["p2_step"] = spread(p2)["median"]
        result["share"] = real["seconds"] / (result["p2_step"] * real["full_steps"])
        bench.say(f"halving: {real['seconds']:.1f} s, {result['share']:.1%} of the full grid with P2")


def sweep(
    workload: Workload, base: LoadedBase, directory: Path, on_halved: Callable[[float], None] = lambda seconds: None
) -> dict[str, Any]:
    """Halve the arms, then train those that were left out to their ends too.

    Returns:
        Whether halving found the arm that has the smallest loss at the end of all; `loss` of the one that it found,
        `best` and `median` of all; steps and seconds of the halving.
    """
    total = workload.arms[0].training.optimizer_steps(len(workload.rows))
    began = time.perf_counter()
    found, steps = halve(workload, base, directory, total)
    seconds = time.perf_counter() - began
    on_halved(seconds)
    left_out = [arm for arm in workload.arms if arm.spec_hash not in found]
    losses = found | _train(workload, base, left_out, directory)
    choice, best = min(found, key=found.__getitem__), min(losses, key=losses.__getitem__)
    return {
        "same": choice == best,
        "loss": losses[choice],
        "best": losses[best],
        "median": spread(list(losses.values()))["median"],
        "arms": [{"point": _point(arm), "loss": _finite(losses[arm.spec_hash])} for arm in workload.arms],
        "steps": steps,
        "full_steps": len(losses) * total,
        "seconds": seconds,
    }


def halve(workload: Workload, base: LoadedBase, directory: Path, total: int) -> tuple[dict[str, float], int]:
    """Train the arms with successive halving.

    Returns:
        The losses of the arms that were trained to their ends, by spec hash, and the steps made.
    """
    arms = {arm.spec_hash: arm for arm in workload.arms}
    stopping = EarlyStoppingSpec(min_steps=max(1, total // _FIRST_RUNG), eta=4, finalists=4)
    living, made, before = list(arms), 0, 0
    for number, step in enumerate(rungs(stopping, total, len(arms))):
        losses = _train(workload, base, [arms[each] for each in living], directory, stop_at=step)
        made, before = made + len(living) * (step - before), step
        # An arm that is not finite any more has left its pack before the rung, and counts there as lost.
        standings = {each: ArmStanding.PAUSED if math.isfinite(losses[each]) else ArmStanding.FAILED for each in living}
        competitors = [
            Competitor(
                spec_hash=each,
                configuration=arms[each].configuration,
                standing=standing,
                rung=number if standing is ArmStanding.PAUSED else number - 1,
                value=losses[each],
            )
            for each, standing in standings.items()
        ]
        decision = decide(stopping, competitors)
        assert decision is not None, "all arms have come to the rung"
        living = list(decision.promote)
    made += len(living) * (total - before)
    return _train(workload, base, [arms[each] for each in living], directory), made


def _train(
    workload: Workload, base: LoadedBase, arms: Sequence[ArmSpec], directory: Path, stop_at: int | None = None
) -> dict[str, float]:
    """Train to a rung or to the end; the evaluation loss of each arm there, infinity where it diverged."""
    tasks = [ArmTask(spec=arm, train=workload.rows, evaluation=workload.evaluation, stop_at=stop_at) for arm in arms]
    outcomes = train_pack(base, tasks, directory=directory)
    return {
        spec_hash: math.inf if outcome.status == "nonfinite" else outcome.metrics["eval.loss"]
        for spec_hash, outcome in outcomes.items()
    }


def _points(rates: Sequence[float], seed: int) -> list[dict[str, Any]]:
    return [{"lora.r": rank, "training.learning_rate": rate, "seed": seed} for rank, rate in product(RANKS, rates)]


def _point(arm: ArmSpec) -> dict[str, Any]:
    return {"r": arm.lora.r, "learning_rate": arm.training.learning_rate}


def _finite(loss: float) -> float | None:
    """JSON has no infinity."""
    return loss if math.isfinite(loss) else None


def _p2_steps(bench: Bench, micro_batch: int) -> list[float]:
    """Seconds of some steps of P2, as in the throughput part, of an arm of middle rank."""
    from benchmarks.peft_loop import start_values
    from benchmarks.trl_arms import describe, train_over_loaded_base

    workload = bench.workload(micro_batch, steps=max(5, bench.options.steps))
    arm = next(arm for arm in workload.arms if arm.lora.r == 8)
    described = describe(workload, bench.base, arm, start_values(bench.base, arm), workload.definition.parent / "trl")
    return list(train_over_loaded_base(arm, described, bench.reference, checkpointing=True).wall)


def _sentence(what: str, winner: Mapping[str, Any]) -> str:
    found = "the same winner" if winner["same"] else f"loss {winner['loss']:.4f}, the best has {winner['best']:.4f}"
    return f"{what}: {winner['steps']} of {winner['full_steps']} steps: {found}"
