"""Homes that released versions wrote, for tests that later versions still work on them.

`VERSION.tar.xz` is a project directory whose `RANKWISE_HOME` is `mlruns`; `make.py` wrote it. MLflow's database and the
queue hold absolute paths below `ROOT`, which `unpack` rewrites. Files of registered models and of checkpoints are left
as they are: manifests cover them.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

from helpers.project import Project

ROOT = "/home-of-rankwise"
"""Where the homes were when they were made."""

_DATABASES = ("rankwise.db", "mlflow.db")


def unpack(version: str, directory: Path) -> tuple[Project, dict[str, Any]]:
    """Unpack a home into an empty directory.

    Returns:
        The project, and what its version printed and computed when it made the home (see `make.py`).
    """
    with tarfile.open(Path(__file__).with_name(f"{version}.tar.xz")) as archive:
        archive.extractall(directory, filter="data")
    for name in _DATABASES:
        with closing(sqlite3.connect(directory / "mlruns" / name)) as database, database:
            replace_in_database(database, ROOT, str(directory))
    covered = [path.parent for path in directory.rglob("manifest.json")]
    for path in [*directory.rglob("*.json"), *directory.rglob("*.yaml")]:
        if not any(path.is_relative_to(folder) for folder in covered):
            text = path.read_text(encoding="utf-8")
            if ROOT in text:
                path.write_text(text.replace(ROOT, str(directory)), encoding="utf-8")
    return Project(directory), json.loads((directory / "expected.json").read_text(encoding="utf-8"))


def replace_in_database(database: sqlite3.Connection, old: str, new: str) -> None:
    """Replace a text wherever a table has it."""
    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        for _, column, *_ in database.execute(f'PRAGMA table_info("{table}")').fetchall():
            database.execute(
                f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) '
                f'WHERE typeof("{column}") = \'text\' AND instr("{column}", ?)',
                [old, new, old],
            )
