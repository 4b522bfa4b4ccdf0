"""Who moved an alias, from where and why; and a lock, since MLflow's registry has no compare-and-set.

Whoever moves an alias does it inside `moving`: the alias's row is locked until the block ends, so that two promotions
of one alias come one after the other, on any number of machines. What is done in MLflow behind this lock's back is
found by comparing with the last move.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from rankwise.jobs.database import database_errors
from rankwise.jobs.rows import AliasMoveRow, AliasRow, now


@dataclass(frozen=True, kw_only=True)
class AliasMove:
    """One move.

    Attributes:
        name: Of the registered model.
        alias: Which alias.
        from_version: Who had it; None for nobody.
        to_version: Who got it; None where it was taken away.
        run_id: The run with the evidence; None where there was none.
        reason: Why, in words.
        moved_by: Who did it.
        moved_at: Seconds since the epoch, by the database's clock.
    """

    name: str
    alias: str
    from_version: int | None
    to_version: int | None
    run_id: str | None
    reason: str
    moved_by: str
    moved_at: float


class LockedAlias:
    """A locked alias."""

    def __init__(self, connection: Connection, name: str, alias: str) -> None:
        self._connection = connection
        self._name = name
        self._alias = alias

    def history(self) -> list[AliasMove]:
        """All moves of this alias, oldest first."""
        return _history(self._connection, self._name, self._alias)

    def note(
        self, from_version: int | None, to_version: int | None, *, run_id: str | None, reason: str, moved_by: str
    ) -> None:
        """Write down a move that was made inside the block."""
        self._connection.execute(
            insert(AliasMoveRow).values(
                name=self._name,
                alias=self._alias,
                from_version=from_version,
                to_version=to_version,
                run_id=run_id,
                reason=reason,
                moved_by=moved_by,
                moved_at=now(),
            )
        )


class AliasHistory:
    """The moves of all aliases; `JobStore.aliases` is one."""

    def __init__(self, engine: Engine, reader: Engine) -> None:
        """Over the queue's database."""
        self._engine = engine
        self._reader = reader

    @contextmanager
    def moving(self, name: str, alias: str) -> Iterator[LockedAlias]:
        """Lock an alias; nobody else may move it until the block ends. Keep it short: SQLite has one writer.

        Raises:
            JobStoreError: The database cannot be reached, or is locked for too long.
        """
        dialect: Any = sqlite if self._engine.dialect.name == "sqlite" else postgresql
        with database_errors(f"locking the alias {alias!r} of {name!r}"), self._engine.begin() as connection:
            connection.execute(dialect.insert(AliasRow).values(name=name, alias=alias).on_conflict_do_nothing())
            connection.execute(select(AliasRow).where(AliasRow.name == name, AliasRow.alias == alias).with_for_update())
            yield LockedAlias(connection, name, alias)

    def history(self, name: str, alias: str) -> list[AliasMove]:
        """All moves of an alias, oldest first."""
        with database_errors("reading the moves of an alias"), self._reader.begin() as connection:
            return _history(connection, name, alias)


def _history(connection: Connection, name: str, alias: str) -> list[AliasMove]:
    columns = [column for column in AliasMoveRow.__table__.columns if column.name != "id"]
    query = select(*columns).where(AliasMoveRow.name == name, AliasMoveRow.alias == alias).order_by(AliasMoveRow.id)
    return [AliasMove(**row._mapping) for row in connection.execute(query)]
