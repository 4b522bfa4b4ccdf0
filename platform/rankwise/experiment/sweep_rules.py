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
    """Whether any arm meets a rung. With epochs that is not known before the rows are."""
    steps = [arm.training.max_steps for arm in arms]
    known = [count for count in steps if count is not None]
    if stopping is None or not known or len(known) < len(steps) or stopping.min_steps < max(known):
        return []
    text = f"must be less than max_steps ({show(max(known))}), or no arm meets a rung, got {show(stopping.min_steps)}"
    return [Problem(path=("sweep", "early_stopping", "min_steps"), text=text)]
