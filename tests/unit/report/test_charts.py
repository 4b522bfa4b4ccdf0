from __future__ import annotations

import re

from rankwise.evaluation.compare import format_seconds
from rankwise.report.charts import Chart, axis


def test_values_lie_between_both_ends_and_equal_factors_are_equal_lengths():
    ranks = axis("rank r", [2, 4, 8], log=True, ticks=[2, 4, 8])
    shares = [ranks.share(rank) for rank in (2, 4, 8)]
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    assert abs((shares[1] - shares[0]) - (shares[2] - shares[1])) < 1e-12
    assert ranks.marks == [2, 4, 8]


def test_one_value_zero_values_and_values_below_zero_have_an_axis():
    for values in ([5.0], [0.0, 0.0], [-3.0, 2.0], [0.0, 10.0], [1e-9, 2e-9], [1e12]):
        for log in (False, True):
            made = axis("x", values, log=log)
            assert all(0 <= made.share(value) <= 1 for value in values)
            assert len(made.marks) >= 1


def test_ticks_are_round_numbers_within_the_axis():
    assert axis("x", [0.0, 1.0]).marks == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert axis("steps", [0, 3], whole=True).marks == [0, 1, 2, 3]
    decades = axis("x", [1e-5, 1e-1], log=True)
    assert [tick for tick in decades.marks if str(tick).strip("0.").startswith("1")]
    assert decades.text(1e-5) == "10⁻⁵"


def test_no_two_ticks_are_spelled_alike():
    made = axis("time", [45.0, 45.6], text=format_seconds)
    texts = [format_seconds(tick) for tick in made.marks]
    assert len(set(texts)) == len(texts) >= 2
    assert made.marks == sorted(made.marks)


def test_an_axis_of_shares_does_not_go_beyond_what_can_be():
    shown = axis("share", [0.0, 0.0], bounds=(0.0, 1.0))
    assert -0.05 < shown.low < 0
    assert shown.high < 0.2


def test_texts_are_escaped_and_marks_carry_them():
    chart = Chart(title="<b>", x=axis("x & y", [0, 1]), y=axis("y", [0, 1]))
    chart.point(0.5, 0.5, tip="a < b", error=0.2)
    chart.line([(0, 0), (1, 1)], tip='"quoted"')
    chart.legend("<i>")
    drawn = str(chart.draw())
    for text in ("&lt;b&gt;", "x &amp; y", "a &lt; b", "&quot;quoted&quot;", "&lt;i&gt;"):
        assert text in drawn
    assert "<b>" not in drawn
    assert "<i>" not in drawn
    assert len(re.findall("<title>", drawn)) == 2


def test_error_bars_end_at_the_frame():
    chart = Chart(title="x", x=axis("x", [0, 1]), y=axis("y", [0, 1]))
    chart.point(0.5, 0.5, error=100.0)
    (top, bottom) = re.findall(r"M[\d.]+,([\d.]+)V([\d.]+)", str(chart.draw()))[0]
    assert 0 < float(top) < float(bottom) < chart.height


def test_series_differ_in_shape_as_well_as_in_colour():
    chart = Chart(title="x", x=axis("x", [0, 1]), y=axis("y", [0, 1]))
    for colour in range(4):
        chart.point(0.5, 0.5, colour=colour)
    marks = re.findall(r'<g class="m c\d"><(\w+)', str(chart.draw()))
    assert marks == ["circle", "rect", "path", "path"]
