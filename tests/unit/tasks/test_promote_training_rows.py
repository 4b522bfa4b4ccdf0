"""What a person is told who asks which rows an adapter was trained on, where nobody knows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rankwise.exceptions import AssetError, GateError
from rankwise.tasks import promote as seen
from rankwise.tasks.promote import ROW_DIGESTS_TAG, training_row_filter


def version(uri, run_id, **tags):
    return SimpleNamespace(uri=uri, run_id=run_id, tags=tags)


def refusal(monkeypatch, artifacts, candidate, before=None, training_rows=None):
    monkeypatch.setattr(seen, "read_artifact", lambda context, run_id, name: artifacts.get(run_id))
    registry = SimpleNamespace(resolve=lambda uri: SimpleNamespace(version=before))
    context = SimpleNamespace(store=SimpleNamespace(registry=registry))
    arm = SimpleNamespace(
        dataset=SimpleNamespace(systems=()), spec_hash="a" * 64, init_from=None if before is None else before.uri
    )
    assessor = SimpleNamespace(training_rows=training_rows or (lambda setting: []))
    with pytest.raises(GateError) as caught:
        training_row_filter(context, candidate, SimpleNamespace(arm=arm), assessor)
    return str(caught.value)


@pytest.mark.parametrize("content", [b"not what was stored", b""])
def test_a_file_of_digests_that_is_damaged_is_not_mended_by_a_definition(monkeypatch, content):
    candidate = version("models:/m/2", "r2", **({ROW_DIGESTS_TAG: "sha256:0"} if content else {}))
    told = refusal(monkeypatch, {"r2": content}, candidate)
    assert "--force" in told
    assert "--experiment" not in told


def test_nor_is_the_ignorance_of_what_an_earlier_adapter_was_trained_on(monkeypatch):
    told = refusal(monkeypatch, {}, version("models:/m/2", "r2"), before=version("models:/m/1", "r1"))
    assert "models:/m/2 was trained further from models:/m/1" in told
    assert "--force" in told
    assert "--experiment" not in told


def test_where_the_training_data_has_moved_a_definition_may_name_it(monkeypatch):
    def gone(setting):
        raise AssetError("no such file")

    told = refusal(monkeypatch, {}, version("models:/m/2", "r2"), training_rows=gone)
    assert "(--experiment FILE)" in told
    assert "--force" in told
