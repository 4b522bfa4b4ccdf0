"""The queue's databases for tests: empty ones, and those that older releases have saved."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy import text

from rankwise.jobs.database import open_engine

SAVED = Path(__file__).parent / "saved_queues"
REVISIONS = sorted(path.name.partition(".")[0] for path in SAVED.glob("*.sqlite.sql"))
"""The revisions of released versions."""


def emptied(url: str) -> None:
    """Remove everything from a PostgreSQL database, its tables too."""
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()


def load_sqlite(revision: str, path: Path) -> str:
    """Make the database that a release of this revision left; its URL."""
    connection = sqlite3.connect(path)
    connection.executescript(SAVED.joinpath(f"{revision}.sqlite.sql").read_text(encoding="utf-8"))
    connection.close()
    return f"sqlite:///{path}"


def load_postgresql(revision: str, url: str) -> None:
    """The same in a PostgreSQL database, in place of all that is there."""
    import psycopg

    emptied(url)
    with psycopg.connect(url) as connection:
        connection.execute(SAVED.joinpath(f"{revision}.postgresql.sql").read_text(encoding="utf-8"))
