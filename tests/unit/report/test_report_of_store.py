"""The report out of a real MLflow store."""

from __future__ import annotations

import csv
import io
import json

import pytest
from click.testing import CliRunner
from helpers.local_store import prepared_home
from helpers.many_arms import fill
from mlflow import MlflowClient

from rankwise.cli.compare import compare, report
from rankwise.evaluation.findings import findings
from rankwise.evaluation.gather import gather
from rankwise.report.page import report_page
from rankwise.tracking.store import Store

ARMS = 12


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    settings = prepared_home(tmp_path_factory.mktemp("many") / "home")
    with Store.open(settings, interval=0.1) as store:
        fill(store, "many", ARMS)
    return settings


@pytest.fixture
def environment(settings, monkeypatch):
    monkeypatch.setenv("RANKWISE_HOME", str(settings.home))


@pytest.mark.usefixtures("environment")
def test_the_commands_show_the_same_answer_in_every_form(tmp_path):
    page = tmp_path / "deep" / "page.html"
    done = CliRunner().invoke(report, ["many", "--output", str(page)], catch_exceptions=False)
    assert done.stdout == f"{page}\n"
    table = CliRunner().invoke(compare, ["many"], catch_exceptions=False).stdout
    data = json.loads(CliRunner().invoke(compare, ["many", "--json"], catch_exceptions=False).stdout)
    lines = list(csv.DictReader(io.StringIO(CliRunner().invoke(compare, ["many", "--csv"]).stdout)))
    headline = data["answer"]["text"]
    assert data["answer"]["status"] == "no_statement"
    assert headline in page.read_text()
    assert table.splitlines()[0] == headline
    assert len(lines) == len(data["arms"]) == ARMS
    assert CliRunner().invoke(compare, ["many", "--json", "--csv"]).exit_code == 2


def test_the_page_has_curves_layers_and_every_arm(settings):
    with Store.open(settings) as store:
        comparison = gather(store, "many")
        finding = findings(store, comparison)
        page = report_page(store, comparison, finding, command="rankwise report many", version="1")
    for wanted in ("training loss", "loss on the evaluation rows", "effective rank by layer", "layer 11: "):
        assert wanted in page
    for each in comparison.arms:
        assert f'href="#/experiments/{comparison.experiment_id}/runs/{each.run_id}"' in page
    assert {each.status for each in comparison.arms} >= {"FINISHED", "KILLED"}
    assert "pruned at step 16" in page


def test_runs_are_asked_for_in_bulk(settings, monkeypatch):
    asked = []
    for name in ("search_runs", "get_run", "get_metric_history"):
        plain = getattr(MlflowClient, name)

        def counting(self, *given, _name=name, _plain=plain, **options):
            asked.append(_name)
            return _plain(self, *given, **options)

        monkeypatch.setattr(MlflowClient, name, counting)
    with Store.open(settings) as store:
        comparison = gather(store, "many")
        finding = findings(store, comparison)
        assert asked == ["search_runs"]
        report_page(store, comparison, finding, command="x", version="1")
    assert asked.count("search_runs") == 1
    assert asked.count("get_metric_history") <= 2 * 24
    assert "get_run" not in asked
