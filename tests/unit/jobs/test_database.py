import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from rankwise.exceptions import JobStoreError
from rankwise.jobs import database
from rankwise.jobs.rows import Table


@pytest.fixture
def engine(tmp_path):
    engine = database.open_engine(f"sqlite:///{tmp_path / 'q.db'}")
    yield engine
    engine.dispose()


def test_the_migrations_make_exactly_the_tables_of_the_code(engine, tmp_path):
    database.upgrade(engine, tmp_path / "lock")
    # Alembic cannot compare indexes with a descending column; they are compared as the database describes them.
    options = {"include_object": lambda _object, _name, kind, *_: kind != "index"}
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts=options), Table.metadata) == []
    assert database.current_revision(engine) == database.head_revision()
    fresh = database.open_engine(f"sqlite:///{tmp_path / 'fresh.db'}")
    Table.metadata.create_all(fresh)
    assert indexes(engine) == indexes(fresh)
    assert len(indexes(engine)) == 11
    fresh.dispose()


def indexes(engine):
    """The columns of each index, and which of them descend."""
    with engine.connect() as connection:
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'index'").scalars().all()
        described = {name: connection.exec_driver_sql(f"PRAGMA index_xinfo('{name}')").all() for name in names}
    return {name: [(row.name, row.desc) for row in rows] for name, rows in described.items() if name[:3] == "ix_"}


def test_a_second_upgrade_changes_nothing(engine, tmp_path):
    lock = tmp_path / "not there yet" / "lock"
    database.upgrade(engine, lock)
    database.upgrade(engine, lock)
    assert database.current_revision(engine) == database.head_revision()


def test_a_database_of_a_newer_release_is_refused(engine, tmp_path):
    database.upgrade(engine, tmp_path / "lock")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(JobStoreError, match=r"revision '9999', which this release does not know .* newer rankwise"):
        database.upgrade(engine, tmp_path / "lock")


@pytest.mark.parametrize(("url", "message"), [
    ("mysql+pymysql://h/d", r"runs on sqlite or postgresql, not on 'mysql'"),
    ("nonsense", r"not a database URL"),
])  # fmt: skip
def test_another_kind_of_database_is_refused(url, message):
    with pytest.raises(JobStoreError, match=message):
        database.open_engine(url)


def test_a_locked_database_waits_for_the_other_writer(engine, tmp_path):
    database.upgrade(engine, tmp_path / "lock")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_postgresql_without_its_driver_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(JobStoreError, match=r"pip install 'rankwise\[postgres\]'"):
        database.open_engine("postgresql://host/db")


def test_a_broken_network_counts_as_away_within_a_lease():
    engine = database.open_engine("postgresql://host/db?connect_timeout=3")
    _, options = engine.dialect.create_connect_args(engine.url)
    assert options["connect_timeout"] == "3"
    timeouts = database.POSTGRESQL_TIMEOUTS
    assert timeouts["keepalives_idle"] + timeouts["keepalives_interval"] * timeouts["keepalives_count"] < 60
    engine.dispose()
