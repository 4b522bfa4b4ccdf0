"""On what and by what models are evaluated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.definitions import DEFINITION, changed, parse

from rankwise.experiment.arm import ArmSpec
from rankwise.tasks import evaluation_setup
from rankwise.tasks.evaluation_setup import recorded_setup, without_aliases


@pytest.fixture
def trained():
    """The arm of rank 8, as the queue knows it."""
    return parse().arms[1]


@pytest.fixture
def context(trained, monkeypatch):
    """The stores: version 3 is of that arm, and has an alias."""
    asked = []
    version = SimpleNamespace(tags={"rankwise.spec_hash": trained.spec_hash}, uri="models:/pricer/3")

    def resolve(uri):
        asked.append(uri)
        return SimpleNamespace(version=version)

    monkeypatch.setattr(evaluation_setup, "ArmWork", SimpleNamespace(of=lambda job: SimpleNamespace(arm=job)))
    monkeypatch.setattr(evaluation_setup, "recorded_definition", lambda context, uri: DEFINITION)
    queue = SimpleNamespace(find=lambda kind, hashes: {trained.spec_hash: trained})
    return SimpleNamespace(store=SimpleNamespace(registry=SimpleNamespace(resolve=resolve)), queue=queue, asked=asked)


def test_the_recorded_arm_counts_as_the_queue_has_it(context, trained):
    assert recorded_setup(context, "models:/pricer/3").arm is trained


def test_a_file_decides_about_rows_and_metrics_although_the_queue_knows_the_version(context, trained, tmp_path):
    file = tmp_path / "other.yaml"
    file.write_text(changed(("How much is {carat}?", "Price of {carat}:"), ("[loss, number]", "[loss]")))
    arm = recorded_setup(context, "models:/pricer/3", file).arm
    assert arm.dataset.prompt == "Price of {carat}:"
    assert arm.evaluation.metrics == ("loss",)
    assert arm.spec_hash == ArmSpec.of(parse(("How much is {carat}?", "Price of {carat}:")).spec).spec_hash
    file.write_text(changed(("[loss, number]", "[loss]")))
    arm = recorded_setup(context, "models:/pricer/3", file).arm
    assert (arm.spec_hash, arm.evaluation.metrics) == (trained.spec_hash, ("loss",))


def test_an_alias_is_looked_up_once(context):
    names = ["models:/pricer@best", "models:/pricer/2", "runs:/abc/adapter", "./adapter@home"]
    found = without_aliases(context, names)
    assert found == {**{name: name for name in names}, "models:/pricer@best": "models:/pricer/3"}
    assert context.asked == ["models:/pricer@best"]
