"""A local MLflow store for tests: migrated once per process, then copied, since the migrations take seconds."""

from __future__ import annotations

import functools
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from rankwise.settings import Settings


@functools.cache
def _template() -> Path:
    from rankwise.tracking.connection import connect

    home = Path(tempfile.mkdtemp(prefix="rankwise-test-store-"))
    connect(local_settings(home))
    return home / "mlflow.db"


def local_settings(home: Path) -> Settings:
    """Settings whose store is `home/mlflow.db`."""
    return Settings.load({"RANKWISE_HOME": str(home), "RANKWISE_CACHE": str(home / "cache")})


def prepared_home(home: Path) -> Settings:
    """Settings of a home with a migrated, empty MLflow database."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_template(), home / "mlflow.db")
    # MLflow puts the artifacts of its default experiment below the directory that the template was made in.
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
        database.execute(
            "UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", [str(home / "artifacts" / "0")]
        )
    return local_settings(home)
