import pytest
from helpers.databases import REVISIONS, load_sqlite
from helpers.migration_contract import MigrationContract


@pytest.mark.parametrize("revision", REVISIONS)
class TestSqlite(MigrationContract):
    @pytest.fixture
    def saved(self, revision, tmp_path):
        return load_sqlite(revision, tmp_path / "q.db")

    @pytest.fixture
    def lock(self, tmp_path):
        return tmp_path / "lock"
