"""Membership in a set of ids of any size, as an SQL expression.

One bound value carries all ids: SQLite allows 32,766 bound values a statement, PostgreSQL 65,535, and thousands of them
take longer to bind than the statement takes to run.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from sqlalchemy import Boolean, ColumnElement, Integer
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class _given(FunctionElement[int]):
    """The numbers of a JSON array, as a subquery."""

    type = Integer()
    inherit_cache = True


@compiles(_given, "sqlite")
def _given_sqlite(element: _given, compiler: Any, **kwargs: Any) -> str:
    return f"(SELECT value FROM json_each({compiler.process(element.clauses, **kwargs)}))"


@compiles(_given, "postgresql")
def _given_postgresql(element: _given, compiler: Any, **kwargs: Any) -> str:
    array = compiler.process(element.clauses, **kwargs)
    return f"(SELECT value::integer FROM json_array_elements_text(CAST({array} AS json)))"


def one_of(column: Any, ids: Collection[int]) -> ColumnElement[bool]:
    """Whether the integer column holds one of these ids."""
    condition: ColumnElement[bool] = column.op("IN", is_comparison=True, return_type=Boolean())(
        _given(json.dumps(sorted(ids)))
    )
    return condition
