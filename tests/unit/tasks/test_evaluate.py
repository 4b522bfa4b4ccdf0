from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from rankwise.tasks import evaluate
from rankwise.tasks.evaluate import Evaluator


@pytest.fixture
def world(monkeypatch):
    """An evaluator over a base in memory; what is fetched, loaded and given back is written down."""
    log = SimpleNamespace(fetched=[], loaded=[], open=set(), grouped=None)

    @contextmanager
    def fetch(uri, tracking_uri):
        log.fetched.append(uri)
        log.open.add(uri)
        yield SimpleNamespace(metadata=f"metadata of {uri}", uri=uri)
        log.open.discard(uri)

    def group_by_base(context, setting, names, quantization, metadata):
        log.grouped = metadata
        arm = SimpleNamespace(quantization=None, attn_implementation="auto", evaluation=None)
        return [
            SimpleNamespace(
                arm=arm, base=None, bare="base", other=False, towers=False, models=[*names, "base"], experiment="x"
            )
        ]

    def load_model(stored, *, base, settings, allow_base_mismatch):
        log.loaded.append((stored.uri, stored.uri in log.open))
        return SimpleNamespace(adapter_name=f"adapter {stored.uri}", origin=SimpleNamespace(uri=stored.uri))

    rows = SimpleNamespace(evaluated=(["an example"], None))
    monkeypatch.setattr(evaluate, "fetch", fetch)
    monkeypatch.setattr(evaluate, "group_by_base", group_by_base)
    monkeypatch.setattr(evaluate.flavor, "load_model", load_model)
    monkeypatch.setattr(evaluate, "load_adapter", lambda model, directory, name: None)
    monkeypatch.setattr(evaluate, "find_sources", lambda *_, **__: SimpleNamespace(base=None))
    monkeypatch.setattr(evaluate, "delete_adapter", lambda model, name: None)
    monkeypatch.setattr(
        evaluate, "evaluate_attached", lambda base, rows, adapters, *_: {name: name for name in adapters}
    )
    monkeypatch.setattr(evaluate.BaseIdentity, "of", lambda base: "the base")
    context = SimpleNamespace(settings=SimpleNamespace(tracking_uri="http://mlflow"), reporter=None)
    evaluator = Evaluator(context)
    evaluator._bases = SimpleNamespace(get=lambda *_: SimpleNamespace(tokenizer=None, model=None))
    evaluator._rows = SimpleNamespace(get=lambda *_: rows)
    return evaluator, log


def test_a_stored_adapter_is_fetched_once_and_given_back(world, tmp_path):
    evaluator, log = world
    names = ["models:/m/1", "models:/m/2", "base", str(tmp_path), "models:/m/1"]
    found = evaluator.assess(None, names)
    assert log.fetched == ["models:/m/1", "models:/m/2"]
    assert log.grouped == {uri: f"metadata of {uri}" for uri in log.fetched}
    assert log.loaded == [("models:/m/1", True), ("models:/m/2", True)]
    assert log.open == set()
    assert list(found.models) == ["models:/m/1", "models:/m/2", str(tmp_path), "base"]
    assert found.models["models:/m/2"].evaluation == "adapter models:/m/2"
