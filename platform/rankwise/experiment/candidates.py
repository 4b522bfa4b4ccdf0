"""Points become arms: overlaid, their expressions evaluated, the condition asked, fields and rules checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.document import Problem
from rankwise.experiment.expressions import Expression, ExpressionError
from rankwise.experiment.fields import show
from rankwise.experiment.point import Point
from rankwise.experiment.resolve import Unresolved, evaluate_condition, resolve
from rankwise.experiment.rules import View, find_problems
from rankwise.experiment.search import Told, Verdict, ask
from rankwise.experiment.space import Space
from rankwise.experiment.validation import overlay, validate


class ConditionError(Exception):
    """Raised when `where` cannot be evaluated for some point. Its problem says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point that meets the condition.

    Attributes:
        point: Where it comes from.
        arm: The arm; None when a field of it is wrong.
        problems: What is wrong, at the paths of an arm's fields.
    """

    point: Point
    arm: ArmSpec | None
    problems: tuple[Problem, ...]


class Candidates:
    """Makes candidates out of a definition and the points of its sweep."""

    def __init__(self, data: dict[str, Any], where: Expression | None, *, elsewhere: bool = False) -> None:
        """Take the definition's data without its sweep, and the sweep's condition; `elsewhere` as in `rules.View`."""
        self._elsewhere = elsewhere
        self._base = {key: value for key, value in data.items() if key != "sweep"}
        self._where = where

    def of(self, point: Point) -> Candidate | None:
        """The candidate of a point, or None when `where` refuses it.

        Raises:
            ConditionError: `where` cannot be evaluated.
        """
        resolution = resolve(overlay(self._base, point.values))
        try:
            if self._where is not None and not evaluate_condition(self._where, resolution.data):
                return None
        except ExpressionError as error:
            text = f"must be a condition over fields, got {show(self._where.text if self._where else '')}: {error}"
            raise ConditionError(Problem(path=("sweep", "where"), text=text)) from error
        except Unresolved:
            pass  # The point has a wrong value, which is among its problems.
        spec, problems = validate(resolution)
        arm = ArmSpec.of(spec) if spec is not None and not problems else None
        view = View(resolution.data, elsewhere=self._elsewhere)
        return Candidate(point=point, arm=arm, problems=tuple(problems or find_problems(view)))

    def of_all(self, points: Iterable[Point], most: int) -> list[Candidate]:
        """The first `most` candidates of a grid or list.

        Raises:
            ConditionError: As `of`.
        """
        met = (candidate for point in points if (candidate := self.of(point)) is not None)
        return list(itertools.islice(met, most))

    def of_round(
        self, space: Space, number: int, told: Sequence[Told] = (), *, taken: Iterable[str] = (), greater: bool = False
    ) -> tuple[list[Candidate], int]:
        """The candidates of a round of a search, and how many points were drawn in vain.

        In the first round an arm that cannot work is among them, since the definition has to be mended; in later ones,
        that nobody can foresee, its point counts as refused.

        Args:
            space: What is searched.
            number: The round, from 0.
            told: What the earlier rounds gave.
            taken: Spec hashes of their arms.
            greater: Whether a greater primary metric is better.

        Raises:
            ConditionError: As `of`.
        """
        found: list[Candidate] = []
        hashes = set(taken)

        def accept(point: Point) -> Verdict:
            candidate = self.of(point)
            if candidate is None or (candidate.problems and number > 0):
                return "rejected"
            if candidate.arm is not None and candidate.arm.spec_hash in hashes:
                return "duplicate"
            if candidate.arm is not None:
                hashes.add(candidate.arm.spec_hash)
            found.append(candidate)
            return "good"

        asked = ask(space, number, told, greater_is_better=greater, accept=accept)
        return found, asked.rejected
