from __future__ import annotations

import io
import re
from dataclasses import replace

from helpers.answers import answered
from helpers.comparisons import arm, ranks, seeds_and_rates
from rich.console import Console

from rankwise.evaluation.answer_text import add_section
from rankwise.evaluation.compare import Comparison, compare
from rankwise.evaluation.findings import find
from rankwise.report.comparison_output import comparison_view


def printed(comparison: Comparison, width: int = 200) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(comparison_view(comparison, console, find(comparison, lambda arms: {})))
    return console.file.getvalue().splitlines()


def row(lines: list[str], *starts: str) -> str:
    return next(line for line in lines if line.split()[: len(starts)] == list(starts))


def test_each_rank_has_a_row_with_size_cost_and_metrics_and_their_errors():
    lines = printed(ranks())
    assert lines[2] == "diamonds-rank: loss on the evaluation rows, smaller is better; lowest: r = 8 with 0.710 ±0.020"
    assert row(lines, "3", "2").split() == [
        "3", "2", "4", "115k", "461", "kB", "0.930", "±0.020", "71.4", "%", "±1.0", "2.0", "%", "±1.0", "1,930", "±150",
        "17.0", "%", "±2.6", "0.0", "%", "±0.0", "1m17s", "1.23", "GB",
    ]  # fmt: skip


def test_the_best_row_is_marked_and_named_with_its_model():
    lines = printed(ranks())
    assert row(lines, "★", "1", "8")
    assert any("(run run008000) is models:/pricer/8" in line for line in lines)


def test_with_one_seed_the_first_lines_say_that_there_is_no_statement_and_what_to_add():
    first, second, *_ = printed(ranks())
    assert first == "Three adapters, one seed each: no statement about ranks. Lowest loss: r = 8."
    assert second == "Another seed can change the order. " + add_section()


def test_an_answer_has_a_line_with_the_limits_of_each_rank():
    comparison, read = answered({2: 0.2, 4: 0.001, 8: 0.0})
    console = Console(file=io.StringIO(), width=250, highlight=False)
    console.print(comparison_view(comparison, console, find(comparison, read)))
    first, second, third, *_ = console.file.getvalue().splitlines()
    assert first.startswith("r = 4 is enough: at most 0.0")
    assert re.fullmatch(
        r"loss against r = 8, \+ is worse: r = 2 \+0\.2\d* \[\+0\.\d+, \+0\.\d+\] not enough; "
        r"r = 4 [+-]0\.\d+ \[-0\.\d+, \+0\.\d+\] enough",
        second,
    )
    assert third.startswith("x: loss on the evaluation rows")


def test_of_many_configurations_the_best_ones_and_the_best_of_each_rank_are_shown():
    arms = [arm(2 ** (1 + at % 5), 1.0 + at % 5 + at / 1000, training__learning_rate=at) for at in range(200)]
    arms += [
        arm(2, None, status="FAILED", reason=f"worker {at} is gone", training__learning_rate=at)
        for at in range(300, 330)
    ]
    comparison = compare("x", arms, primary_metric="eval.loss", greater_is_better=False)
    finding = find(comparison, lambda arms: {})
    console = Console(file=io.StringIO(), width=220, highlight=False)
    console.print(comparison_view(comparison, console, finding))
    lines = console.file.getvalue().splitlines()
    assert len(lines) < 70
    assert {"2", "4", "8", "16", "32"} <= {line.split()[1] for line in lines if line.split()[0].isdecimal()} | {"2"}
    assert "... and 190 more configurations; --csv and --json list all" in lines
    assert "... and 18 more arms without a result; --csv and --json list all" in lines


def test_the_bare_base_has_its_row():
    assert "3.100 ±0.050" in row(printed(ranks()), "base")
    assert any("bare base has not been evaluated" in line for line in printed(ranks(base=None)))


def test_a_failed_arm_is_shown_as_such_with_its_reason():
    lines = printed(ranks())
    assert row(lines, "failed", "16", "32")
    assert any(line.startswith("r = 16, arm ") and line.endswith("FAILED: CUDA out of memory") for line in lines)


def test_a_pruned_arm_is_shown_as_such_and_is_no_failure():
    reason = "pruned at step 16: eval.loss 1.93 is not among the best 4 of 16"
    comparison = compare(
        "x", [arm(2, 0.5), arm(4, None, status="KILLED", reason=reason)], primary_metric="eval.loss",
        greater_is_better=False,
    )  # fmt: skip
    lines = printed(comparison)
    assert row(lines, "pruned", "4", "8")
    assert any(line.startswith("r = 4, arm ") and line.endswith(f"stopped early: {reason}") for line in lines)
    assert comparison.arms[1].to_json()["status"] == "KILLED"
    assert not arm(4, None, status="KILLED", reason="cancelled").pruned


def test_an_arm_that_hardly_answers_is_said_to_have_no_place():
    silent = arm(2, 0.1)
    silent = replace(silent, metrics={**silent.metrics, "eval.loss": replace(silent.metrics["eval.loss"], n=3)})
    lines = printed(compare("x", [silent, arm(4, 0.5)], primary_metric="eval.loss", greater_is_better=False))
    assert any(line.startswith("r = 2, arm ") and line.endswith("a value for only 3 examples") for line in lines)
    assert row(lines, "★", "1", "4")


def test_many_pruned_arms_are_one_line_and_hide_no_failure():
    reasons = [f"pruned at step {4 if at % 3 else 16}: eval.loss {at} is not among the best" for at in range(90)]
    arms = [arm(at + 1, None, status="KILLED", reason=reason) for at, reason in enumerate(reasons)]
    arms += [arm(100, 0.5), arm(101, None, status="FAILED", reason="CUDA out of memory")]
    lines = printed(compare("x", arms, primary_metric="eval.loss", greater_is_better=False))
    assert "90 arms stopped early: 30 pruned at step 16, 60 pruned at step 4; reasons: --csv and --json" in lines
    assert not any("not among the best" in line for line in lines)
    assert any(line.endswith("FAILED: CUDA out of memory") for line in lines)


def test_a_narrow_terminal_gets_two_tables_and_loses_nothing():
    lines = printed(ranks(), width=100)
    assert all(len(line) <= 100 for line in lines)
    assert len([line for line in lines if line.split()[:2] == ["★", "1"]]) == 2
    text = " ".join(" ".join(lines).split())
    for wanted in ("1,710 ±150", "461k", "1m23s", "1.23 GB", "17.0 % ±2.6"):
        assert wanted in text


def test_several_seeds_are_one_row_with_their_number_and_spread():
    lines = printed(seeds_and_rates(), width=220)
    best = row(lines, "★", "1", "16", "32", "0.002", "3")
    assert "0.030" in best
    mean = lines[2].rpartition("lowest: r = 16 with ")[2]
    assert mean in best, "the first line names the row's mean, not one seed's value"
    some = [arm(2, 0.5, seed=0), arm(2, None, seed=1, status="KILLED", reason="interrupted")]
    lines = printed(compare("x", some, primary_metric="eval.loss", greater_is_better=False))
    assert "1 of 2" in row(lines, "★", "1", "2")


def test_an_experiment_without_results_says_so():
    arms = [arm(2, None, status="RUNNING"), replace(arm(4, None), model_uri=None)]
    lines = printed(compare("x", arms, primary_metric="eval.loss", greater_is_better=False))
    assert lines[1].endswith("no arm has a result yet")
    assert row(lines, "running", "2")


def test_square_brackets_are_no_markup():
    arms = [replace(arm(2, None, status="FAILED"), reason="bad [bold]shape[/] [1, 2]")]
    lines = printed(compare("[red]x", arms, primary_metric="eval.loss", greater_is_better=False))
    assert lines[1].startswith("[red]x: ")
    assert any("bad [bold]shape[/] [1, 2]" in line for line in lines)
