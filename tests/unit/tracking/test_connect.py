from __future__ import annotations

import sqlite3

import pytest

from rankwise.exceptions import TrackingError
from rankwise.settings import Settings
from rankwise.tracking.connect import connect


def test_a_database_of_an_older_release_is_copied_before_it_is_upgraded(settings, monkeypatch):
    database = settings.home / "mlflow.db"
    with sqlite3.connect(database) as connection:
        # No revision that MLflow knows: what counts here is that an upgrade is tried, on a database that was copied.
        connection.execute("UPDATE alembic_version SET version_num = 'unknown'")
    connection.close()
    with pytest.raises(TrackingError, match=r"upgrading .*mlflow.db failed, a copy from before is .*\.bak"):
        connect(settings)
    (copy,) = settings.home.glob("mlflow.db.*.bak")
    with sqlite3.connect(copy) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("unknown",)
    connection.close()


def test_a_file_that_is_no_database_is_an_error(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is not a database, " * 100)
    settings = Settings.load({"RANKWISE_HOME": str(tmp_path)})
    with pytest.raises(TrackingError, match=r"opening .*mlflow\.db: .*file is not a database"):
        connect(settings)
