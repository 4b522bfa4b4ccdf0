from __future__ import annotations

import json

import pytest

from rankwise.exceptions import TrackingError
from rankwise.tracking.registry import JOB


@pytest.fixture
def run(store, experiment):
    with store.start_run(experiment, "r=4", system_metrics=False) as made:
        yield made


def logged(store, run):
    model = store.client.create_logged_model(store.client.get_run(run.run_id).info.experiment_id, "adapter", run.run_id)
    return store.client.finalize_logged_model(model.model_id, "READY").model_id


def register(store, run, **more):
    return store.registry.create_version("pricer", logged(store, run), **more)


def test_a_model_is_created_once_however_often_it_is_asked_for(store):
    store.registry.ensure_model("pricer")
    created = store.client.get_registered_model("pricer").creation_timestamp
    store.registry.ensure_model("pricer")
    assert store.client.get_registered_model("pricer").creation_timestamp == created


def test_versions_are_listed_oldest_first_with_tags(store, run):
    for rank in range(12):
        register(store, run, tags={"lora.r": str(rank)})
    versions = store.registry.versions("pricer")
    assert [version.version for version in versions] == list(range(1, 13))
    assert versions[3].tags == {"lora.r": "3"}
    assert versions[3].uri == "models:/pricer/4"
    assert versions[3].run_id == run.run_id


def test_what_a_job_has_registered_is_found_again(store, run):
    register(store, run, tags={JOB: "7"})
    register(store, run, tags={JOB: "8"})
    assert [version.version for version in store.registry.find_by_tag("pricer", JOB, "7")] == [1]
    assert [version.version for version in store.registry.of_job("pricer", 8, run.run_id)] == [2]
    assert store.registry.of_job("pricer", 8, "0" * 32) == []


def test_an_alias_moves_and_resolves(store, run):
    register(store, run)
    register(store, run)
    assert store.registry.get_alias("pricer", "best") is None
    store.registry.set_alias("pricer", "best", 1)
    store.registry.set_alias("pricer", "best", 2)
    resolved = store.registry.resolve("models:/pricer@best")
    assert resolved.uri == "models:/pricer/2"
    assert resolved.run_id == run.run_id
    assert resolved.version.aliases == ("best",)
    assert store.registry.get("pricer", 1).aliases == ()


def test_a_version_resolves_to_itself(store, run):
    register(store, run)
    resolved = store.registry.resolve("models:/pricer/1")
    assert resolved.uri == "models:/pricer/1"
    assert resolved.source == f"models:/{resolved.model_id}"


def test_tags_of_a_version_can_be_set_later(store, run):
    register(store, run)
    store.registry.tag_version("pricer", 1, {"eval.loss": 0.25, "nothing": None})
    store.registry.describe_version("pricer", 1, "# Note")
    assert store.registry.get("pricer", 1).tags == {"eval.loss": "0.25"}
    assert store.client.get_model_version("pricer", "1").description == "# Note"


def test_a_logged_model_resolves_by_run_and_by_id(store, experiment, run):
    logged(store, run)
    model = store.client.get_logged_model(logged(store, run))
    cut_off = store.client.create_logged_model(experiment, "adapter", run.run_id)
    store.client.finalize_logged_model(cut_off.model_id, "FAILED")
    by_run = store.registry.resolve(f"runs:/{run.run_id}/adapter")
    assert by_run.uri == f"models:/{model.model_id}"
    assert store.registry.resolve(by_run.uri).source == model.artifact_location
    assert store.registry.resolve(by_run.uri).run_id == run.run_id
    version = store.registry.create_version("pricer", model.model_id, run_id=run.run_id)
    assert version.model_id == model.model_id
    assert store.registry.resolve(version.uri).model_id == model.model_id
    tags = store.client.get_logged_model(model.model_id).tags
    assert json.loads(tags["mlflow.modelVersions"]) == [{"name": "pricer", "version": "1"}]


@pytest.mark.parametrize(
    "uri", ["pricer/1", "models:/pricer", "models:/pricer/latest", "models:/a/b/1", "runs:/x", "models:/p@"]
)
def test_other_forms_are_refused_with_the_forms_there_are(store, uri):
    with pytest.raises(TrackingError, match=r"is not a model URI; use `models:/NAME/VERSION`"):
        store.registry.resolve(uri)


@pytest.mark.parametrize("uri", ["models:/pricer/9", "models:/pricer@champion"])
def test_a_missing_version_or_alias_names_those_there_are(store, run, uri):
    register(store, run)
    store.registry.set_alias("pricer", "best", 1)
    with pytest.raises(TrackingError, match=r"versions of 'pricer': 1; aliases: best"):
        store.registry.resolve(uri)


@pytest.mark.parametrize("uri", ["models:/nothing/1", "models:/nothing@best"])
def test_a_missing_model_is_named(store, uri):
    with pytest.raises(TrackingError, match="no registered model 'nothing' has versions"):
        store.registry.resolve(uri)


def test_a_run_without_the_model_is_named(store, run):
    with pytest.raises(TrackingError, match="has no logged model named 'adapter'"):
        store.registry.resolve(f"runs:/{run.run_id}/adapter")


def test_a_quote_in_a_name_is_refused_rather_than_searched_for(store):
    with pytest.raises(TrackingError, match="must not contain a quote"):
        store.registry.versions("o'pricer")
