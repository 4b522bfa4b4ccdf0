import pytest
from helpers.alias_contract import AliasContract
from helpers.databases import REVISIONS, emptied, load_postgresql
from helpers.fault_table import record
from helpers.job_store_contract import JobStoreContract
from helpers.machine_runs import LONG, SHORT, run_machine
from helpers.migration_contract import MigrationContract
from hypothesis import settings
from sqlalchemy import text

from rankwise.jobs.database import open_engine, upgrade
from rankwise.jobs.job import Limits
from rankwise.jobs.rows import Table
from rankwise.jobs.store import JobStore


@pytest.mark.parametrize("revision", REVISIONS)
class TestMigrations(MigrationContract):
    @pytest.fixture
    def saved(self, revision, postgresql):
        load_postgresql(revision, postgresql)
        yield postgresql
        emptied(postgresql)

    @pytest.fixture
    def lock(self, tmp_path):
        return tmp_path / "lock"


class TestStore(JobStoreContract, AliasContract):
    @pytest.fixture
    def store(self, postgresql, tmp_path):
        store = JobStore(postgresql, lock=tmp_path / "lock", limits=Limits(backoff=0.1))
        engine = open_engine(postgresql)
        with engine.begin() as connection:
            # A migration takes longer than a test: the tables stay.
            connection.execute(
                text("TRUNCATE job, definition, job_dependency, attempt, worker, alias, alias_move RESTART IDENTITY")
            )
        engine.dispose()
        yield store
        store.close()


def test_the_migrations_make_exactly_the_tables_of_the_code(postgresql, tmp_path):
    described = text(
        "SELECT table_name, column_name, data_type, character_maximum_length, is_nullable, column_default "
        "FROM information_schema.columns "
        "WHERE table_schema = 'public' AND table_name <> 'alembic_version' ORDER BY 1, 2"
    )
    indexes = text("SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1")
    found = []
    engine = open_engine(postgresql)
    for make in (lambda: upgrade(engine, tmp_path / "lock"), lambda: Table.metadata.create_all(engine)):
        emptied(postgresql)
        make()
        with engine.connect() as connection:
            rows = [*connection.execute(described).all(), *connection.execute(indexes).all()]
        found.append([tuple(row) for row in rows if row[0] != "alembic_version_pkc"])
    emptied(postgresql)
    engine.dispose()
    assert found[0] == found[1]
    assert len(found[0]) > 40


def test_whatever_happens_the_queue_is_as_the_model_says(postgresql, tmp_path):
    emptied(postgresql)
    run_machine(postgresql, tmp_path / "lock", settings(SHORT, max_examples=3))
    emptied(postgresql)


@pytest.mark.faults
def test_whatever_happens_for_long_the_queue_is_as_the_model_says(postgresql, tmp_path):
    emptied(postgresql)
    run_machine(postgresql, tmp_path / "lock", LONG)
    emptied(postgresql)
    record("state machine, PostgreSQL", "as the model says, 0 stuck", f"{LONG.max_examples} runs of up to 50 steps")
