from __future__ import annotations

import itertools
import random

from rankwise.report.costs import front


def test_a_point_that_another_one_beats_everywhere_is_not_on_the_front():
    assert front([(1.0, 5.0), (2.0, 3.0), (3.0, 3.0), (4.0, 1.0), (5.0, 5.0)]) == [True, True, False, True, False]


def test_equal_points_are_all_on_it_and_none_has_none():
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [True, True]
    assert front([]) == []


def test_it_agrees_with_the_definition_on_random_points():
    draw = random.Random(0)
    points = [tuple(draw.randrange(5) for _ in range(4)) for _ in range(60)]

    def beaten(point):
        return any(all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points)

    assert front(points) == [not beaten(point) for point in points]
    assert list(itertools.compress(points, front(points)))
