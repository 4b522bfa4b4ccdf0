from __future__ import annotations

from types import SimpleNamespace

import pytest

from rankwise.exceptions import ConfigError, GateError
from rankwise.jobs.store import JobStore
from rankwise.tasks.promote import _move, rollback
from rankwise.tracking.registry import ModelVersion


def version(number):
    return ModelVersion(
        name="m", version=number, run_id=None, model_id=None, source="", status="READY", tags={}, aliases=(),
        created_ms=0,
    )  # fmt: skip


class Registry:
    """The aliases of one model, as everybody sees and moves them."""

    def __init__(self):
        self.holder = None

    def get_alias(self, name, alias):
        return self.holder

    def set_alias(self, name, alias, number):
        self.holder = version(number)

    def delete_alias(self, name, alias):
        self.holder = None


@pytest.fixture
def context(tmp_path):
    queue = JobStore(f"sqlite:///{tmp_path / 'queue.db'}", lock=tmp_path / "lock")
    yield SimpleNamespace(store=SimpleNamespace(registry=Registry()), queue=queue)
    queue.close()


def test_moves_are_written_down_and_undone_one_after_the_other(context):
    _move(context, version(1), None, "champion", "run-1", "passed the gate")
    _move(context, version(2), version(1), "champion", "run-2", "by hand")
    moves = context.queue.aliases.history("m", "champion")
    assert [(move.from_version, move.to_version, move.run_id, move.reason) for move in moves] == [
        (None, 1, "run-1", "passed the gate"), (1, 2, "run-2", "by hand")
    ]  # fmt: skip
    assert rollback(context, "m", "champion", reason="worse in use") == (2, 1)
    assert context.store.registry.holder.version == 1


def test_an_alias_that_moved_during_the_comparison_is_not_moved(context):
    registry = context.store.registry
    _move(context, version(1), None, "champion", "r", "")
    registry.holder = version(5)
    with pytest.raises(
        GateError, match=r"was version 1 when the comparison began and is 5 now: it was moved meanwhile"
    ):
        _move(context, version(2), version(1), "champion", "r", "")
    registry.holder = None
    with pytest.raises(GateError, match="was version 1 when the comparison began and is none now"):
        _move(context, version(2), version(1), "champion", "r", "")
    registry.holder = version(3)
    with pytest.raises(GateError, match="was version none when the comparison began and is 3 now"):
        _move(context, version(2), None, "champion", "r", "")
    assert registry.holder.version == 3
    assert len(context.queue.aliases.history("m", "champion")) == 1


def test_the_first_move_is_undone_to_nobody_and_nothing_is_undone_twice(context):
    with pytest.raises(ConfigError, match="no move of models:/m@champion is recorded here"):
        rollback(context, "m", "champion", reason="")
    _move(context, version(1), None, "champion", "r", "")
    assert rollback(context, "m", "champion", reason="") == (1, None)
    assert context.store.registry.holder is None
    with pytest.raises(ConfigError, match="every recorded move of models:/m@champion has been undone"):
        rollback(context, "m", "champion", reason="")


def test_rolling_back_again_goes_further_back_and_not_to_and_fro(context):
    for before, after in ((None, 1), (1, 2), (2, 3)):
        _move(context, version(after), None if before is None else version(before), "champion", "r", "")
    assert rollback(context, "m", "champion", reason="") == (3, 2)
    assert rollback(context, "m", "champion", reason="") == (2, 1)
    # A new move, forced to the version that was rolled back, is a move like others.
    _move(context, version(2), version(1), "champion", "r", "once more")
    assert rollback(context, "m", "champion", reason="") == (2, 1)
    context.store.registry.holder = version(9)
    with pytest.raises(ConfigError, match="is version 9 and not 1, to which rankwise last moved it"):
        rollback(context, "m", "champion", reason="")
