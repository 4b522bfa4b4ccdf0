"""MLflow's UI as the users of a sweep see it, in a headless browser. SCREENSHOTS=DIR keeps the pictures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from urllib.parse import quote

import pytest
from helpers.browser import browse, find_browser, shots_directory
from helpers.project import make_project

RANKS = [2, 4, 8]
DROPOUTS = [0.0, 0.1]
AXES = "{lora.r: [2, 4, 8], lora.lora_dropout: [0.0, 0.1]}"


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return shots_directory(tmp_path_factory)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A finished sweep of six arms."""
    find_browser()
    project = make_project(tmp_path_factory.mktemp("ui"), fresh=True)
    text = project.file.read_text()
    assert text.count("{lora.r: [2, 4]}") == 1
    project.file.write_text(text.replace("{lora.r: [2, 4]}", AXES))
    return project, json.loads(project.succeed("run", "tiny.yaml", "--json"))


@pytest.fixture(scope="module")
def ui(sweep):
    """The address of the UI, and what `rankwise ui` says of the experiment's table."""
    project, _ = sweep
    process = subprocess.Popen(
        [sys.executable, "-m", "rankwise", "ui", "--port", "0"],
        cwd=project.directory, env=project.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        line = next(line for line in process.stderr if line.startswith("tiny: "))
        yield address, line.removeprefix("tiny: ").strip()
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def page(ui, shots):
    with browse(shots) as opened:
        yield opened


@pytest.fixture
def look(page, ui, shots, request):
    """Go to a route of the UI; what the test leaves on the page is kept as a picture under the test's name."""

    def go(route):
        # A route alone is only another anchor of the same page.
        page.goto("about:blank")
        page.goto(route if route.startswith("http") else f"{ui[0]}/{route}")
        return page

    yield go
    page.screenshot(path=shots / f"{request.node.name.removeprefix('test_')[:80]}.png")


def route(comparison, *, arm=None, tab=""):
    run = comparison["arms"][arm]["run_id"] if arm is not None else comparison["run_id"]
    return f"#/experiments/{comparison['experiment_id']}/runs/{run}{tab}?workflowType=machine_learning"


@pytest.fixture(scope="module")
def known(sweep):
    """The comparison, with the ids that addresses need."""
    from mlflow import MlflowClient

    project, comparison = sweep
    client = MlflowClient(f"sqlite:///{project.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (parent,) = client.search_runs([experiment], "tags.`rankwise.kind` = 'sweep'")
    return {**comparison, "experiment_id": experiment, "run_id": parent.info.run_id}


def test_the_table_has_rank_alpha_dropout_and_metrics_as_columns_and_nests_arms_under_their_sweep(look, ui):
    page = look(ui[1])
    page.get_by_text("sweep of 6 arms").first.wait_for()
    heads = page.locator("[role=columnheader]")
    for name in ("lora.r", "lora.alpha", "lora.dropout", "eval.loss"):
        heads.get_by_text(name, exact=True).wait_for()
    arms = page.get_by_text(re.compile(r"^lora\.r=\d+, lora\.lora_dropout=[\d.]+$"))
    assert arms.count() == 0
    page.locator("[role=row]", has_text="sweep of 6 arms").locator("button").first.click()
    arms.nth(len(RANKS) * len(DROPOUTS) - 1).wait_for()
    assert arms.count() == len(RANKS) * len(DROPOUTS)
    cells = page.locator("[col-id='params.`lora.r`'][role=gridcell]").all_inner_texts()
    assert sorted(int(cell) for cell in cells if cell.strip() not in {"", "-"}) == sorted(RANKS * len(DROPOUTS))


def test_arms_compare_in_parallel_coordinates_and_as_a_contour_by_rank(look, known):
    runs = [arm["run_id"] for arm in known["arms"]]
    address = f"#/compare-runs?runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([known['experiment_id']]))}"
    page = look(address)
    page.get_by_text("Comparing 6 Runs").wait_for()
    axes = page.locator(".parcoords .axis-title, .parcoords .axis-heading text")
    axes.get_by_text("lora.r", exact=True).first.wait_for()
    for name in ("lora.alpha", "lora.dropout"):
        assert axes.get_by_text(name, exact=True).count() > 0
    page.get_by_text("Contour Plot").click()
    for axis, name in (("X-axis:", "lora.r"), ("Y-axis:", "lora.dropout"), ("Z-axis:", "eval.loss")):
        page.get_by_text(axis, exact=True).locator("xpath=following::*[@role='combobox'][1]").click()
        page.get_by_role("option", name=name, exact=True).first.click()
    page.locator("g.contour").first.wait_for(state="attached")
    assert page.locator(".xtitle").first.text_content() == "lora.r"


def test_a_run_tells_what_it_is_and_on_which_rows(look, known):
    page = look(route(known, arm=0))
    page.get_by_role("heading", name="LoRA r = 2, alpha = 4 on q_proj, v_proj").wait_for()
    page.get_by_text(re.compile(r"rows\.jsonl \(")).first.wait_for()
    page.get_by_text("tiny-adder").first.wait_for()
    page.get_by_text("Finished").first.wait_for()


def test_model_metrics_are_charts(look, known):
    page = look(route(known, arm=0, tab="/model-metrics"))
    page.get_by_placeholder("Search metric charts").fill("train.loss")
    page.get_by_text("train.loss", exact=True).first.wait_for()
    page.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for(state="attached")


def test_system_metrics_are_charts(look, known):
    page = look(route(known, arm=0, tab="/system-metrics"))
    page.get_by_text("system_memory_usage_megabytes").first.wait_for()


def test_the_report_opens_in_the_artifact_view(look, known):
    page = look(route(known, tab="/artifacts/report.html"))
    report = page.frame_locator("iframe").last
    report.get_by_role("heading", name="Rank by rank").wait_for()
    assert re.search(r"r = \d", report.locator("body").inner_text().partition("Rank by rank")[0])
    assert report.locator("svg").count() > 3


def test_the_anatomy_opens_in_the_artifact_view(look, known):
    page = look(route(known, arm=0, tab="/artifacts/anatomy.html"))
    anatomy = page.frame_locator("iframe").last
    anatomy.get_by_text("lora_A 2 x 64").first.wait_for(state="attached")
    assert anatomy.locator("svg").count() > 0


def test_predictions_are_a_table(look, known):
    page = look(route(known, arm=0, tab="/artifacts/predictions.json"))
    for name in ("prompt", "reference", "prediction", "eval.loss"):
        page.get_by_role("columnheader", name=name, exact=True).or_(page.get_by_text(name, exact=True)).first.wait_for()
    page.get_by_text(re.compile(r"\d plus \d")).first.wait_for()


def test_the_models_tab_has_every_adapter_with_its_version(look, known):
    page = look(f"#/experiments/{known['experiment_id']}/models?workflowType=machine_learning")
    page.get_by_text("Ready").nth(5).wait_for()
    for arm in known["arms"]:
        label = f"lora.r={arm['params']['lora.r']}, lora.lora_dropout={arm['params']['lora.dropout']:g}"
        page.get_by_text(label, exact=True).first.wait_for()


def test_a_version_has_alias_tags_description_and_the_run_it_came_from(look, known):
    best = next(arm for arm in known["arms"] if arm["spec_hash"] == known["best"])
    page = look(f"#/models/tiny-adder/versions/{best['model_uri'].rpartition('/')[2]}")
    page.get_by_text("@ best").first.wait_for()
    page.get_by_text(f"Registered as {best['model_uri']}").first.wait_for()
    page.get_by_role("link", name=re.compile(r"lora\.r=")).first.wait_for()
    page.get_by_text("base.fingerprint").first.wait_for(state="attached")
