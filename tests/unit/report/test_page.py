"""The page: nothing from outside, every arm shown, whatever there is or is not."""

from __future__ import annotations

import base64
import re
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from helpers.answers import answered
from helpers.comparisons import BASE, arm, ranks, seeds_and_rates

from rankwise.evaluation.compare import compare
from rankwise.evaluation.findings import find
from rankwise.report.page import Material, make_page
from rankwise.report.quality import MOST_CURVES, chosen_arms, thinned
from rankwise.tracking.query import MetricPoint

VOID = {"meta", "input", "br", "link", "img"}
PRUNED = "pruned at step 16: eval.loss 1.61 is not among the best 4 of 16"


class Page(HTMLParser):
    """What a browser would see: references, text, and whether tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.references += [(tag, name, value or "") for name, value in attrs if name in REFERENCES]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in {"script", "style"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


REFERENCES = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


def page_of(comparison, read=lambda arms: {}, **changes) -> str:
    finding = find(comparison, read)
    given = {
        "comparison": comparison, "finding": finding, "curve_arms": chosen_arms(comparison, finding), "curves": {},
        "curve_keys": ["train.loss"], "layer_arms": [], "layers": {}, "mlflow": "http://127.0.0.1:5000",
        "command": "rankwise report x", "version": "1", **changes,
    }  # fmt: skip
    return make_page(Material(**given))


def of(arms, **changes):
    given = {"primary_metric": "eval.loss", "greater_is_better": False, "experiment_id": "7", "base": BASE, **changes}
    return compare("x", arms, **given)


def curves(arms, points=200):
    line = [MetricPoint(step=step, value=3.0 / step + 0.5, timestamp_ms=step) for step in range(1, points + 1)]
    return {each.run_id: {"train.loss": line} for each in arms}


def full() -> str:
    arms = [*seeds_and_rates().arms, arm(32, None, status="FAILED", reason="CUDA out of memory"),
            arm(64, None, status="KILLED", reason=PRUNED)]  # fmt: skip
    comparison = of(arms)
    return page_of(
        comparison, curves=curves(arms), layer_arms=arms[:3], layers={arm.run_id: {0: 1.5, 1: 2.5} for arm in arms[:3]}
    )


def test_the_page_loads_nothing():
    page = full()
    found = Page(page)
    assert found.open == []
    # Links to places in the page or to MLflow's routes, and nothing that a browser would fetch.
    assert {(tag, name) for tag, name, _ in found.references} == {("a", "href")}
    assert all(value.startswith("#") for _, _, value in found.references)
    assert "link" not in found.tags
    assert "iframe" not in found.tags
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", page)
    outside = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert outside == {"http://127.0.0.1:5000"}  # The address that links are pointed to, in a field of its own.
    assert "default-src 'none'" in page


def test_a_page_that_would_load_something_is_noticed():
    found = Page(full().replace("</main>", '<img src="https://example.org/x.png"></main>'))
    assert ("img", "src", "https://example.org/x.png") in found.references


def test_style_and_script_are_the_ones_that_the_policy_names():
    page = full()
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    for text in (style, script):
        assert "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode() in page
    # The policy would drop them.
    assert not re.search(r"<[^>]+ (style|on[a-z]+)=", page)


def test_the_page_leads_with_the_answer_limits_margin_and_seeds():
    comparison, read = answered({2: 0.2, 4: 0.001, 8: 0.0})
    page = page_of(comparison, read)
    (answer,) = re.findall(r'<p class="answer">(.*?)</p>', page)
    assert answer.startswith("r = 4 is enough: at most 0.0")
    found = Page(page)
    assert found.open == []
    first, second = (found.text.index(name) for name in ("How much worse than r = 8?", "How limits narrow with seeds"))
    assert first < second < found.text.index("Quality against rank")
    chart = page.partition('<section id="answer">')[2].partition("</figure>")[0]
    assert chart.count("r = 2, seed ") == chart.count("r = 4, seed ") == 5
    assert chart.count('class="e"') == 2
    assert "margin 0.05" in chart
    assert [chart.count(name) for name in ("r = 2: not enough", "r = 4: enough", "r = 8: the largest rank")] == [1] * 3
    narrow = page.partition('<section id="seeds">')[2].partition("</section>")[0]
    assert narrow.count("<figure>") == 2
    assert "2 seeds: upper limit" in narrow
    table = found.text.partition("upper limit seeds failed seeds")[2]
    assert re.search(r"2 not enough \+0\.\d+ \+0\.\d+ \+0\.\d+ 5 - .* 4 enough .* 8 the largest - - - 5 -", table)


def test_without_an_answer_the_page_calls_nothing_worse():
    text = Page(full()).text
    assert "no margin is set: no statement about ranks. Lowest mean loss: r = " in text
    assert "add `answer: {margin: 0.02}` to the definition" in text
    for word in ("worse", "not enough", "beyond noise"):
        assert word not in text.partition("All arms")[0]


def test_arms_that_failed_or_were_pruned_are_shown_as_such_with_their_reason():
    text = Page(full()).text
    assert "26 arms: 24 finished, 1 failed, 1 pruned" in text
    part = text.partition("They are excluded from")[2].partition("The Pareto front")[0]
    assert "failed 1 CUDA out of memory r = 32" in part
    assert f"pruned 1 {PRUNED} r = 64" in part
    table = text.partition("Peak memory is per process")[0].rpartition("All arms")[2]
    assert "CUDA out of memory" in table
    assert PRUNED in table


def test_reasons_that_differ_in_measured_numbers_are_one_line():
    arms = [arm(2, 0.5)] + [
        arm(4 + at, None, status="KILLED", reason=f"pruned at step 8: eval.loss 1.{at}1 is not among the best 4 of 16")
        for at in range(20)
    ]
    text = Page(page_of(of(arms))).text
    assert "pruned 20 pruned at step 8: eval.loss 1.01 is not among the best 4 of 16 (and similar)" in text
    assert "and 8 more" in text


@pytest.mark.parametrize(
    ("arms", "first"),
    [
        ([arm(8, 0.5)], "r = 8 is the only rank, so there is nothing to compare it with."),
        ([arm(8, 0.5, stderr=None)], "r = 8 is the only rank, so there is nothing to compare it with."),
        ([arm(2, None, status="FAILED", reason="no disk"), arm(4, None, status="FAILED")],
         "No statement about ranks: no arm has finished."),
        ([arm(2, None, status="RUNNING")], "No statement about ranks: no arm has a result yet."),
        ([arm(2, None), arm(4, None)], "No statement about ranks: no arm has a result yet."),
        ([arm(2, 0.5, stderr=None), arm(4, 0.4, stderr=None)],
         "Two adapters, one seed each: no statement about ranks. Lowest loss: r = 4."),
        ([arm(2, 0.5), arm(4, 0.5)], "Two adapters, one seed each: no statement about ranks. Lowest loss: r = 2."),
    ],
    ids=["one arm", "one example", "all failed", "running", "not evaluated", "no noise", "equal"],
)  # fmt: skip
def test_little_makes_a_whole_page_too(arms, first):
    for base in (BASE, None):
        comparison = of(arms, base=base)
        found = Page(page_of(comparison, curves=curves(comparison.arms, points=1)))
        assert found.open == []
        assert first in found.text
        for each in comparison.arms:
            assert each.run_id[:8] in found.text


def test_an_arm_without_costs_or_rank_breaks_nothing():
    bare = arm(8, 0.5)
    bare = bare.__class__(
        spec_hash=bare.spec_hash, run_id="bare", status="FINISHED", params={"seed": 0}, metrics=bare.metrics
    )
    assert "no arm has a result" in Page(page_of(of([bare]))).text
    assert Page(page_of(of([bare, arm(4, 0.5)]))).open == []


def test_one_seed_is_said_before_anything_else():
    text = Page(page_of(of([arm(2, 0.5), arm(4, 0.4)]))).text
    assert "one seed each: no statement about ranks" in text.partition("Rank by rank")[0]
    assert "one seed" not in Page(full()).text


def test_names_and_reasons_are_escaped():
    arms = [arm(2, 0.5), arm(4, None, status="FAILED", reason="<script>alert(1)</script> & more")]
    page = page_of(of(arms, experiment_id='7"><script>'))
    assert "<script>alert" not in page
    assert '7"><script>' not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_links_are_routes_of_mlflow_without_a_host():
    comparison = of([arm(2, 0.5), arm(4, 0.4)])
    page = page_of(comparison)
    for each in comparison.arms:
        assert f'data-route="experiments/7/runs/{each.run_id}" href="#/experiments/7/runs/{each.run_id}"' in page
        assert f'href="#/models/pricer/versions/{each.params["lora.r"]}"' in page


def test_a_thousand_arms_are_less_than_three_megabytes_and_all_there():
    arms = [
        arm(2 ** (1 + at % 6), 1.0 + at % 7 / 10, training__learning_rate=1e-4 * (1 + at // 6)) for at in range(970)
    ] + [arm(2, None, status="FAILED", reason=f"worker {at} is gone", training__learning_rate=at) for at in range(30)]
    page = page_of(of(arms), curves=curves(arms[:MOST_CURVES]))
    assert len(page.encode()) < 3_000_000
    body = page.partition('<table id="arms">')[2]
    assert body.count("<tr") == 1001
    assert "worker 29 is gone" in body


def test_many_arms_show_the_curves_of_some_and_of_the_best_of_each_rank():
    arms = [arm(2 ** (1 + at % 4), 1.0 + at / 100, training__learning_rate=at) for at in range(60)]
    arms += [arm(2, None, status="KILLED", reason=PRUNED, training__learning_rate=1000 + at) for at in range(30)]
    comparison = of(arms)
    finding = find(comparison, lambda arms: {})
    shown = chosen_arms(comparison, finding)
    assert len(shown) <= MOST_CURVES
    assert {each.finished[0].run_id for each in finding.by_rank} <= {each.run_id for each in shown}
    assert any(each.pruned for each in shown)
    assert f"{len(shown)} of 90 arms" in Page(page_of(comparison, curves=curves(shown))).text
    assert chosen_arms(ranks(), find(ranks(), lambda arms: {})) == list(ranks().arms)


def test_long_curves_are_thinned_to_means_of_neighbours():
    points = [MetricPoint(step=step, value=float(step), timestamp_ms=0) for step in range(1, 1001)]
    few = thinned(points)
    assert len(few) <= 80
    assert few[0] == (7.0, 7.0)
    assert thinned(points[:3]) == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert thinned(
        [MetricPoint(step=1, value=9.0, timestamp_ms=0), MetricPoint(step=1, value=2.0, timestamp_ms=1)]
    ) == [(1.0, 2.0)]
