from __future__ import annotations

import pytest

from rankwise.evaluation.compare import (
    format_bytes,
    format_count,
    format_param,
    format_seconds,
    format_value,
    title,
    with_error,
)


@pytest.mark.parametrize(
    ("key", "value", "stderr", "text"),
    [
        ("eval.loss", 0.71, 0.0213, "0.710 ±0.021"),
        ("eval.loss", 0.71, None, "0.710"),
        ("eval.loss", None, None, "-"),
        ("eval.loss", float("nan"), None, "-"),
        ("eval.loss", 0.5, 1e-9, "0.5000 ±0.0000"),
        ("eval.mean_absolute_error", 1730.4, 95.0, "1,730 ±95"),
        ("eval.mean_absolute_error", 3856.2, 1234.0, "3,856 ±1,234"),
        ("eval.within_20_percent", 0.17, 0.0266, "17.0 % ±2.7"),
        ("eval.exact_match", 0.0, 0.0, "0.0 % ±0.0"),
        ("eval.length", 12.34, 0.5, "12.34 ±0.50"),
    ],
)
def test_a_value_has_the_digits_that_its_error_supports(key, value, stderr, text):
    assert with_error(key, value, stderr) == text


def test_value_and_error_come_apart():
    assert format_value("eval.loss", 0.71, 0.02) == ("0.710", "0.020")


def test_counts_sizes_and_times_are_short():
    assert [format_count(count) for count in (None, 999, 9999, 460_800, 27_262_976)] == [
        "-", "999", "9,999", "461k", "27.3M",
    ]  # fmt: skip
    assert [format_bytes(count) for count in (None, 999, 1000, 1_843_200, 109_051_904, 2_100_000_000)] == [
        "-", "999 B", "1 kB", "1.84 MB", "109 MB", "2.1 GB",
    ]  # fmt: skip
    assert [format_seconds(seconds) for seconds in (None, 1.25, 59, 75.2, 3725)] == [
        "-", "1.2s", "59s", "1m15s", "1h02m",
    ]  # fmt: skip


def test_settings_are_spelled_as_in_a_definition():
    assert [format_param(value) for value in (None, True, 8, 2e-3, "q_proj,v_proj")] == [
        "-", "yes", "8", "0.002", "q_proj,v_proj",
    ]  # fmt: skip


def test_a_metric_of_another_package_is_titled_by_its_key():
    assert title("eval.rouge_l") == "rouge l"
