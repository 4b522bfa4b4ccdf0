"""The history of alias moves and of promotion attempts, and a lock, since MLflow's registry has no compare-and-set.

An alias is moved inside `moving`, which locks its row until the block ends. Promotions of one alias are thus serialized
across machines. A comparison with the last recorded move reveals changes made directly in MLflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from rankwise.jobs.database import database_errors
from rankwise.jobs.rows import AliasMoveRow, AliasRow, PromotionAttemptRow, now


@dataclass(frozen=True, kw_only=True)
class AliasMove:
    """One move of an alias of the registered model `name`.

    `from_version` is None for a new alias, `to_version` for a removed one. `run_id` is the run with the evidence, if
    any. `moved_at` is in seconds since the epoch by the database's clock.
    """

    name: str
    alias: str
    from_version: int | None
    to_version: int | None
    run_id: str | None
    reason: str
    moved_by: str
    moved_at: float


@dataclass(frozen=True, kw_only=True)
class PromotionAttempt:
    """One comparison of a candidate with the holder of an alias.

    `key` identifies what was compared: versions, rows, metrics and limits. `prompts` are digests of the compared
    prompts. `verdict` is None while the comparison runs, and for one that was interrupted.
    """

    id: int
    key: str
    candidate: int
    champion: int | None
    prompts: frozenset[str]
    verdict: dict[str, Any] | None
    run_id: str | None


class LockedAlias:
    """An alias that is locked by this transaction."""

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
        """Record a move made while the alias is locked."""
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

    def attempts(self) -> list[PromotionAttempt]:
        """All promotion attempts for this alias, oldest first."""
        return _attempts(self._connection, self._name, self._alias)

    def record_attempt(
        self, key: str, *, candidate: int, champion: int | None, prompts: frozenset[str], attempted_by: str
    ) -> int:
        """Record an attempt before its verdict is known, and return its id."""
        statement = insert(PromotionAttemptRow).values(
            name=self._name,
            alias=self._alias,
            key=key,
            candidate=candidate,
            champion=champion,
            prompts=sorted(prompts),
            attempted_by=attempted_by,
            attempted_at=now(),
        )
        return int(self._connection.execute(statement.returning(PromotionAttemptRow.id)).scalar_one())


class AliasHistory:
    """The moves of all aliases; see `JobStore.aliases`."""

    def __init__(self, engine: Engine, reader: Engine) -> None:
        """Use the queue's database: `engine` for writing, `reader` for reading."""
        self._engine = engine
        self._reader = reader

    @contextmanager
    def moving(self, name: str, alias: str) -> Iterator[LockedAlias]:
        """Lock an alias until the block ends. Keep the block short: SQLite has one writer.

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
        with database_errors("reading the history of an alias"), self._reader.begin() as connection:
            return _history(connection, name, alias)

    def attempts(self, name: str, alias: str) -> list[PromotionAttempt]:
        """All promotion attempts for an alias, oldest first."""
        with database_errors("reading the promotion attempts of an alias"), self._reader.begin() as connection:
            return _attempts(connection, name, alias)

    def record_verdict(self, attempt: int, verdict: dict[str, Any], run_id: str) -> None:
        """Store the verdict of an attempt and the run with its evidence."""
        with database_errors("recording a promotion attempt"), self._engine.begin() as connection:
            connection.execute(
                update(PromotionAttemptRow)
                .where(PromotionAttemptRow.id == attempt)
                .values(verdict=verdict, run_id=run_id)
            )


def _history(connection: Connection, name: str, alias: str) -> list[AliasMove]:
    columns = [column for column in AliasMoveRow.__table__.columns if column.name != "id"]
    query = select(*columns).where(AliasMoveRow.name == name, AliasMoveRow.alias == alias).order_by(AliasMoveRow.id)
    return [AliasMove(**row._mapping) for row in connection.execute(query)]


def _attempts(connection: Connection, name: str, alias: str) -> list[PromotionAttempt]:
    row = PromotionAttemptRow
    columns = (row.id, row.key, row.candidate, row.champion, row.prompts, row.verdict, row.run_id)
    query = select(*columns).where(row.name == name, row.alias == alias).order_by(row.id)
    found = connection.execute(query)
    return [PromotionAttempt(**{**attempt._mapping, "prompts": frozenset(attempt.prompts)}) for attempt in found]
