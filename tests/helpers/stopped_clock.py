"""A database clock that a test sets: leases run out and waits end when it says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import text
from sqlalchemy.ext.compiler import compiles

from rankwise.jobs import rows as clock
from rankwise.jobs.database import open_engine


@contextmanager
def stopped_clock() -> Iterator[None]:
    """Have stores that are opened within the block take the time from the table `test_clock`."""
    for name in ("sqlite", "postgresql"):
        compiles(clock.now, name)(lambda element, compiler, **kwargs: "(SELECT at FROM test_clock)")
    try:
        yield
    finally:
        compiles(clock.now, "sqlite")(clock._now_sqlite)
        compiles(clock.now, "postgresql")(clock._now_postgresql)


class Clock:
    """Sets the time of one database."""

    def __init__(self, url: str) -> None:
        """Make the table, at time 0."""
        self._engine = open_engine(url)
        with self._engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS test_clock (at DOUBLE PRECISION)"))
        self.set(0.0)

    def set(self, at: float) -> None:
        """Make it this late."""
        with self._engine.begin() as connection:
            connection.execute(text("DELETE FROM test_clock"))
            connection.execute(text("INSERT INTO test_clock VALUES (:at)"), {"at": at})

    def empty(self) -> None:
        """Remove all jobs, and begin at time 0."""
        with self._engine.begin() as connection:
            for table in ("attempt", "job_dependency", "job", "worker"):
                connection.execute(text(f"DELETE FROM {table}"))
        self.set(0.0)

    def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()
