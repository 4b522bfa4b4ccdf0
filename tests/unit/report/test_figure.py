from __future__ import annotations

import io
import struct
import sys
from dataclasses import replace

import pytest
from helpers.comparisons import arm, ranks, seeds_and_rates, values

from rankwise.evaluation.compare import compare
from rankwise.report.figure import failures, rank_figure
from rankwise.report.quality import panels


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_the_first_panel_is_the_primary_metric_and_shows_its_base_and_errors():
    axes = rank_figure(ranks()).axes
    assert axes[0].get_title() == "loss (primary metric, smaller is better)"
    (line,) = [each for each in axes[0].get_lines() if each.get_label() == "bare base"]
    assert set(line.get_ydata()) == {3.1}
    (bars,) = axes[0].containers
    assert list(bars.lines[0].get_xdata()) == [2.0, 4.0, 8.0]
    assert list(bars.lines[0].get_ydata()) == [0.93, 0.78, 0.71]
    segment = bars.lines[2][0].get_segments()[0]
    assert list(segment[:, 1]) == pytest.approx([0.91, 0.95])


def test_a_base_far_away_gets_a_second_panel_with_the_adapters_only():
    far = panels(ranks())
    assert [panel.title for panel in far[:3]] == ["loss", "loss, adapters only", "token accuracy"]
    assert far[1].base is None
    near = panels(ranks(base=values(loss=(1.0, 0.1))))
    assert [panel.title for panel in near[:2]] == ["loss", "token accuracy"]


def test_settings_other_than_the_rank_make_series_and_what_follows_from_the_rank_makes_none():
    (first, *_) = panels(seeds_and_rates())
    assert [series.label for series in first.series] == ["learning rate 0.001", "learning rate 0.002"]
    assert [[point.rank for point in series.points] for series in first.series] == [[2, 4, 8, 16]] * 2
    assert [len(point.arms) for series in first.series for point in series.points] == [3] * 8
    assert [series.label for series in panels(ranks())[0].series] == ["adapter"]
    free = [replace(arm(2, 0.5 + alpha / 10), params={"lora.r": 2, "lora.alpha": alpha, "seed": 0}) for alpha in (1, 2)]
    (panel, *_) = panels(compare("x", free, primary_metric="eval.loss", greater_is_better=False))
    assert [series.label for series in panel.series] == ["alpha 1", "alpha 2"]


def test_arms_without_a_result_have_no_point_and_are_named():
    comparison = ranks()
    assert failures(comparison) == "not shown: r = 16 failed"
    figure = rank_figure(comparison)
    assert figure.get_suptitle().endswith("not shown: r = 16 failed")
    assert [tick for tick in figure.axes[0].get_xticks() if tick] == [2, 4, 8, 16]
    many = [arm(r, None, status="KILLED") for r in range(1, 9)]
    told = failures(compare("x", many, primary_metric="eval.loss", greater_is_better=False))
    assert told is not None
    assert told.endswith("r = 6 killed and 2 more")


def test_the_png_is_an_image_of_a_readable_size_and_pyplot_stays_out_of_it():
    content = png(rank_figure(seeds_and_rates()))
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1000
    assert height >= 500
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_hundreds_of_settings_are_a_cloud_without_a_legend():
    arms = [arm(2 ** (1 + at % 3), 1.0 + at / 100, training__learning_rate=at) for at in range(60)]
    figure = rank_figure(compare("x", arms, primary_metric="eval.loss", greater_is_better=False))
    assert figure.legends == []
    assert len(figure.axes[0].collections[0].get_offsets()) == 60


def test_an_experiment_without_results_gives_an_empty_plot_that_says_so():
    empty = compare("x", [arm(2, None, status="RUNNING")], primary_metric="eval.loss", greater_is_better=False)
    assert "no result yet" in rank_figure(empty).get_suptitle()
    assert png(rank_figure(empty)).startswith(b"\x89PNG")


def test_one_rank_alone_can_be_drawn():
    one = compare("x", [arm(8, 0.5)], primary_metric="eval.loss", greater_is_better=False)
    assert png(rank_figure(one)).startswith(b"\x89PNG")
