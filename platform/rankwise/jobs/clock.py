"""The database's clock, as an SQL expression: seconds since the epoch. No decision uses a worker's clock."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Float
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class now(FunctionElement[float]):
    """Seconds since the epoch, by the database."""

    type = Float()
    inherit_cache = True


class new_token(FunctionElement[str]):
    """A random token, another one for every row."""

    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **kwargs: Any) -> str:
    # 2440587.5 is the Julian day of 1970-01-01T00:00Z; unixepoch('subsec') needs SQLite 3.42.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **kwargs: Any) -> str:
    # clock_timestamp, not now(): the latter stands still inside a transaction that waited for a lock.
    return "extract(epoch from clock_timestamp())::double precision"


@compiles(new_token, "sqlite")
def _token_sqlite(element: new_token, compiler: Any, **kwargs: Any) -> str:
    return "lower(hex(randomblob(16)))"


@compiles(new_token, "postgresql")
def _token_postgresql(element: new_token, compiler: Any, **kwargs: Any) -> str:
    return "replace(gen_random_uuid()::text, '-', '')"
