"""What a sweep section needs of the rest of the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.document import Problem
from rankwise.experiment.fields import show
from rankwise.experiment.rules import View, find_problems
from rankwise.experiment.schema import EarlyStoppingSpec


def sweep_problems(view: View) -> list[Problem]:
    """Everything that is wrong; a rule whose field is wrong itself is skipped."""
    return find_problems(view, _RULES)


def _results_need_rows(view: View) -> Iterator[Problem]:
    if view["sweep.method"] == "tpe" and not view.given("dataset.eval"):
        text = "is tpe, which proposes arms from results on evaluation rows: give dataset.eval"
        yield Problem(path=("sweep", "method"), text=text)


def _rungs_need_rows(view: View) -> Iterator[Problem]:
    if view.given("sweep.early_stopping") and not view.given("dataset.eval"):
        text = "compares arms on evaluation rows: give dataset.eval"
        yield Problem(path=("sweep", "early_stopping"), text=text)


def _rungs_choose_nothing(view: View) -> Iterator[Problem]:
    """An evaluation at a rung must not be one more from which the best checkpoint is taken: see the hash's rules."""
    if not view.given("sweep.early_stopping") or not view.given("register") or view["register.checkpoint"] != "best":
        return
    first, every = view["sweep.early_stopping.min_steps"], view["training.eval_steps"]
    if every is not None and first % every:
        text = f"must be a multiple of training.eval_steps ({show(every)}) with register.checkpoint: best, "
        text += f"got {show(first)}; a rung would be one more state to choose from"
        yield Problem(path=("sweep", "early_stopping", "min_steps"), text=text)


_RULES: tuple[Callable[[View], Iterator[Problem]], ...] = (
    _results_need_rows,
    _rungs_need_rows,
    _rungs_choose_nothing,
)


def rung_problems(stopping: EarlyStoppingSpec | None, arms: Sequence[ArmSpec]) -> list[Problem]:
    """Whether a rung leaves anybody out, and any arm meets one. With epochs that is not known before the rows are."""
    if stopping is None or not arms:
        return []
    problems = []
    place = ("sweep", "early_stopping")
    configurations = len({arm.configuration for arm in arms})
    if configurations == 1 and len(arms) > 1:
        text = "compares the means over seeds, but the arms differ in the seed only; remove it, or sweep something else"
        problems.append(Problem(path=place, text=text))
    elif configurations <= stopping.finalists and stopping.finalists > 1:
        text = f"must be less than the number of configurations ({configurations:,}), or no arm is left out, "
        problems.append(Problem(path=(*place, "finalists"), text=f"{text}got {show(stopping.finalists)}"))
    known = [arm.training.max_steps for arm in arms if arm.training.max_steps is not None]
    if len(known) == len(arms) and stopping.min_steps >= max(known):
        text = f"must be less than max_steps ({show(max(known))}), or no arm meets a rung, "
        problems.append(Problem(path=(*place, "min_steps"), text=f"{text}got {show(stopping.min_steps)}"))
    return problems


def rung_advice(stopping: EarlyStoppingSpec | None, arms: Sequence[ArmSpec]) -> list[str]:
    """What works, and will hardly do what it is meant for: one sentence each."""
    if stopping is None:
        return []
    warming = [warmup for arm in arms if (warmup := _warmup(arm)) is not None and warmup >= stopping.min_steps]
    if not warming:
        return []
    which = "all arms" if len(warming) == len(arms) else f"{len(warming):,} of {len(arms):,} arms"
    return [
        f"sweep.early_stopping.min_steps: the first rung, at step {stopping.min_steps:,}, lies within the warm-up of "
        f"{which} ({max(warming):,} steps): it compares what has hardly begun to learn; choose a later one"
    ]


def _warmup(arm: ArmSpec) -> int | None:
    """Steps of warm-up; None where they are a share of epochs, whose steps are not known before the rows are."""
    training = arm.training
    if training.max_steps is None and training.warmup_steps < 1:
        return None
    return training.warmup(training.max_steps or 0)
