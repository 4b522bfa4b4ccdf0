"""A store on a copied database, closed at the end; deliveries are quick."""

from __future__ import annotations

import uuid

import pytest
from helpers.local_store import prepared_home


@pytest.fixture
def settings(tmp_path):
    return prepared_home(tmp_path / "home")


@pytest.fixture
def store(settings):
    from rankwise.tracking.store import Store

    with Store.open(settings, interval=0.1) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    """One store for the tests of a module that each stay within an experiment of their own: opening one takes long."""
    from rankwise.tracking.store import Store

    with Store.open(prepared_home(tmp_path_factory.mktemp("home")), interval=0.1) as opened:
        yield opened


@pytest.fixture
def experiment(store):
    return store.experiment(f"diamonds-{uuid.uuid4().hex[:8]}")
