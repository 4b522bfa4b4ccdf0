"""The table of an experiment under its own link has the columns that tell arms apart."""

import json

from helpers.definitions import parse

from rankwise.tracking.notes import VIEW_TAG, latest_views, table_view, view_route


def columns(spec):
    return json.loads(table_view(spec))["selectedColumns"]


def test_rank_alpha_and_dropout_come_first_then_what_the_sweep_varies_then_metrics():
    swept = (
        "    lora.r: [4, 8]\n",
        "    lora.r: [4, 8]\n    lora.lora_alpha: [8, 16]\n    training.learning_rate: [1e-3]\n",
    )
    assert columns(parse(swept).spec) == [
        "params.`lora.r`",
        "params.`lora.alpha`",
        "params.`lora.dropout`",
        "params.`training.learning_rate`",
        "metrics.`eval.loss`",
        "metrics.`eval.perplexity`",
        "metrics.`eval.mean_absolute_error`",
        "metrics.`eval.mean_relative_error`",
        "metrics.`eval.within_20_percent`",
        "metrics.`eval.parse_failures`",
        "metrics.`adapter.parameters`",
        "attributes.`Models`",
    ]


def test_listed_arms_count_too():
    experiment = parse(
        ("sweep:\n  parameters:\n    lora.r: [4, 8]\n", "sweep: {arms: [{lora.r: 2}, {lora.use_rslora: true}]}\n")
    )
    assert "params.`lora.rslora`" in columns(experiment.spec)


def test_columns_have_the_names_that_runs_give_their_params():
    values = {"r": "4", "lora_alpha": "8", "lora_dropout": "0.1", "target_modules": "[q_proj]", "use_rslora": "true"}
    swept = "".join(f"    lora.{field}: [{value}]\n" for field, value in values.items())
    experiment = parse(("    lora.r: [4, 8]\n", swept))
    (arm,) = experiment.arms
    named = [column for column in columns(experiment.spec) if column.startswith("params.")]
    assert len(named) == len(values)
    assert {column.removeprefix("params.").strip("`") for column in named} <= arm.params.keys()


def test_an_experiment_has_the_view_and_is_found_with_its_address(store):
    spec = parse().spec
    experiment = store.experiment(spec.name, spec)
    store.experiment("another")
    view = json.loads(store.client.get_experiment(experiment).tags[VIEW_TAG])
    assert view["selectedColumns"] == view["columnOrder"] == list(view["columnWidths"]) == columns(spec)
    assert latest_views(store.client, 5) == [(spec.name, view_route(experiment))]
    assert view_route("7") == "#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=rankwise"
