from __future__ import annotations

from types import SimpleNamespace

import pytest

from rankwise.evaluation.gate import GateDecision, overlap
from rankwise.experiment.schema import PromotionSpec
from rankwise.jobs.store import JobStore
from rankwise.tasks import promote as module
from rankwise.tasks import promote as promotion
from rankwise.tasks.promote import count_candidates
from rankwise.tracking.query import RunRecord, sweep_tags
from rankwise.tracking.registry import ModelVersion


def run(run_id, *, parent=None, spec_hash=None, metrics=None, tags=None):
    known = {"mlflow.parentRunId": parent, "rankwise.spec_hash": spec_hash} | (tags or {})
    return RunRecord(
        run_id=run_id, experiment_id="1", name=run_id, status="FINISHED", started_ms=0, ended_ms=1, artifact_uri="",
        params={}, metrics=metrics or {}, tags={key: value for key, value in known.items() if value is not None},
    )  # fmt: skip


def version(run_id, number=1):
    return ModelVersion(
        name="m", version=number, run_id=run_id, model_id=None, source="", status="READY", tags={}, aliases=(),
        created_ms=0,
    )  # fmt: skip


SCORED = {"eval.loss": 1.0, "eval.loss.n": 50}
HASHES = [f"{number:064x}"[::-1] for number in range(9)]


@pytest.fixture
def store(monkeypatch):
    """Two sweeps: one of four arms, of which one failed, and the same extended by two; and a run of no sweep."""
    trained = [run(f"arm-{at}", parent="first", spec_hash=HASHES[at], metrics=SCORED) for at in range(3)]
    trained.append(run("failed", parent="first", spec_hash=HASHES[3], metrics={"train.loss": 3.0}))
    trained += [run(f"arm-{at}", parent="second", spec_hash=HASHES[at], metrics=SCORED) for at in (4, 5)]
    trained.append(run("other", parent="third", spec_hash=HASHES[6], metrics=SCORED))
    # The same arm once more, by another attempt.
    trained.append(run("again", parent="first", spec_hash=HASHES[0], metrics=SCORED))
    sweeps = [
        run("first", tags=sweep_tags(HASHES[:4])), run("second", tags=sweep_tags(HASHES[:6])),
        run("third", tags=sweep_tags(HASHES[6:7])),
    ]  # fmt: skip
    alone = run("alone")
    runs = {each.run_id: each for each in (*trained, *sweeps, alone)}
    monkeypatch.setattr(module, "get_run", lambda client, run_id: runs[run_id])
    return SimpleNamespace(client=None, runs=lambda experiment, kind: sweeps if kind == "sweep" else trained)


def test_all_evaluated_arms_of_the_sweeps_of_an_arm_are_its_contenders(store):
    assert count_candidates(store, version("arm-1")) == 5
    assert count_candidates(store, version("arm-5")) == 5
    assert count_candidates(store, version("other")) == 1


def test_what_no_sweep_has_made_was_chosen_among_none(store):
    assert count_candidates(store, version("alone")) == 1
    assert count_candidates(store, version(None)) == 1


@pytest.mark.parametrize(("data", "among"), [(None, 5), ("fresh.jsonl", 1)])
def test_only_rows_that_took_part_in_the_choice_count_its_arms(store, monkeypatch, tmp_path, data, among):
    dataset = SimpleNamespace(eval={"split_from": "train"}, eval_split="test")

    def changed(data=None, limit=None):
        other = SimpleNamespace(eval=data or dataset.eval, eval_split="test")
        return SimpleNamespace(arm=SimpleNamespace(dataset=other))

    setting = SimpleNamespace(arm=SimpleNamespace(dataset=dataset), changed=changed)
    store.registry = SimpleNamespace(
        get_alias=lambda name, alias: None, mark_candidate=lambda *_: None, tag_version=lambda *_: None
    )
    told = {}
    monkeypatch.setattr(promotion, "training_row_filter", lambda *_: None)
    monkeypatch.setattr(promotion, "Evaluator", lambda context: SimpleNamespace(assess=lambda *_, **__: None))
    monkeypatch.setattr(promotion, "_write_evidence", lambda *_: "run")

    def weigh(*arguments):
        told["among"] = arguments[-3]
        return GateDecision(checks=(overlap(None, 1, PromotionSpec()),))

    monkeypatch.setattr(promotion, "_decide", weigh)
    monkeypatch.setattr(promotion, "_comparison_key", lambda *_, **__: "k" * 64)
    monkeypatch.setattr(promotion, "_compared", lambda *_: SimpleNamespace(prompts=frozenset({"p"})))
    queue = JobStore(f"sqlite:///{tmp_path / 'queue.db'}", lock=tmp_path / "lock")
    context = SimpleNamespace(store=store, queue=queue)
    done = promotion.promote(context, setting, version("arm-1"), alias="champion", data=data)
    assert (told["among"], done.moved) == (among, False)
    queue.close()
