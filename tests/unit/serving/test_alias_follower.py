from __future__ import annotations

import json
import threading
import urllib.error
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from rankwise.exceptions import ConfigError
from rankwise.serving import adapters as module
from rankwise.serving.adapters import ALIAS_TTL_S, AdapterResolver, AliasFollower, ServedAdapter, WatchedAlias, unload
from rankwise.serving.vllm_options import VllmOptions

FIRST = ServedAdapter(uri="models:/m/1", version="1", directory=Path("/x"), number=1)
ALIAS = WatchedAlias(name="m@best", base_model_name="base", uri="models:/m@best", served=FIRST)


class World:
    """A registry with one alias, and a server that keeps what it was given."""

    def __init__(self):
        self.version = "1"
        self.refused = False
        self.unloaded = []
        self.follower = AliasFollower(self.find, self.unloaded.append)

    def find(self, base, uri):
        if self.refused:
            raise ConfigError("r = 64")
        return ServedAdapter(uri=f"models:/m/{self.version}", version=self.version, directory=Path("/x"), number=1)


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(module, "FOLLOW_INTERVAL_S", 3600.0)
    told = World()
    told.follower.watch(ALIAS)
    yield told
    told.follower.close()


def test_the_server_forgets_a_name_once_after_its_alias_has_moved(told):
    told.follower.check()
    assert told.unloaded == []
    told.version = "2"
    told.follower.check()
    told.follower.check()
    assert told.unloaded == ["m@best"]
    # It is watched from there on, also before the name is asked for again.
    told.version = "3"
    told.follower.check()
    assert told.unloaded == ["m@best", "m@best"]


def test_a_version_that_cannot_be_served_leaves_the_old_one(told, caplog):
    told.version, told.refused = "2", True
    told.follower.check()
    assert told.unloaded == []
    assert "m@best stays models:/m/1: ConfigError: r = 64" in caplog.text
    told.refused = False
    told.follower.check()
    assert told.unloaded == ["m@best"]


def test_the_thread_looks_by_itself(monkeypatch):
    monkeypatch.setattr(module, "FOLLOW_INTERVAL_S", 0.01)
    world, seen = World(), threading.Event()
    world.follower = AliasFollower(world.find, lambda name: seen.set())
    world.version = "2"
    world.follower.watch(ALIAS)
    assert seen.wait(10)
    world.follower.close()


@pytest.fixture
def server():
    """A server that answers as vLLM does, and keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, self.headers["Authorization"]))
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *arguments):
            pass

    asked, status = [], [200]
    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", asked, status
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_server_is_told_over_its_own_interface(server):
    url, asked, status = server
    unload(url, None, "models:/m@best")
    unload(url, "key", "m@best")
    assert asked == [
        ("/v1/unload_lora_adapter", {"lora_name": "models:/m@best"}, None),
        ("/v1/unload_lora_adapter", {"lora_name": "m@best"}, "Bearer key"),
    ]
    status[0] = 404
    unload(url, None, "a name that it does not know")
    status[0] = 401
    with pytest.raises(urllib.error.HTTPError, match="401"):
        unload(url, None, "m@best")


def test_an_alias_of_the_registry_is_followed(world, client):
    now = [0.0]
    adapters = AdapterResolver(world.settings, VllmOptions(), clock=lambda: now[0])
    unloaded = []
    follower = AliasFollower(adapters.find, unloaded.append)
    base, uri = str(world.base_path), "models:/served@champion"
    first = adapters.find(base, uri)
    follower.watch(WatchedAlias(name=uri, base_model_name=base, uri=uri, served=first))
    client.set_registered_model_alias("served", "champion", "2")
    now[0] = ALIAS_TTL_S
    follower.check()
    follower.close()
    assert unloaded == [uri]
    assert adapters.find(base, uri).uri == "models:/served/2"
