"""Bases and data from a hub on loopback, in processes of their own: the client reads its endpoint once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_hub import COMMIT, serve
from helpers.tiny import make_base

BASE = """
import json, sys
from contextlib import contextmanager
from rankwise.assets.base import resolve_base
from rankwise.settings import Settings

class Recorder:
    done = {}
    @contextmanager
    def task(self, description, total, unit="B"):
        amount = [0]
        yield lambda more: amount.__setitem__(0, amount[0] + more)
        self.done[description] = [amount[0], total]

base = resolve_base(sys.argv[1], sys.argv[2] or None, Settings.load(), Recorder())
print(json.dumps({"revision": base.revision, "path": str(base.path), "pinned": base.pinned, "done": Recorder.done}))
"""
DATA = """
import json, sys
from rankwise.assets.dataset import load_table, resolve_data
from rankwise.settings import Settings

settings = Settings.load()
data = resolve_data(sys.argv[1], sys.argv[2] or None, settings)
print(json.dumps({"revision": data.revision, "rows": load_table(data, settings).to_list()}))
"""
CONFIG = """
import json, sys
from rankwise.assets.base import find_config
from rankwise.settings import Settings

path = find_config(sys.argv[1], Settings.load())
print(json.dumps({"model_type": json.loads(path.read_text())["model_type"]}))
"""
# What a person sees: the message and the exit code.
MAIN = """
import sys
from rankwise.exceptions import RankwiseError
try:
    exec(sys.stdin.read())
except RankwiseError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def run(script, *arguments):
    command = [sys.executable, "-c", MAIN, *arguments]
    return subprocess.run(command, input=script, capture_output=True, text=True, timeout=120, check=False)


def answer(script, *arguments):
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files_of(requests, commit=COMMIT):
    return sorted(request.split(f"/resolve/{commit}/")[1] for request in requests if request.startswith("GET /org"))


def test_a_base_is_downloaded_once_and_main_becomes_its_commit(hub, base, tmp_path):
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors", "onnx/model.safetensors"):
        (tmp_path / "extra" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "extra" / name).write_bytes(b"x" * 100)
    hub.add("org/tiny", base)
    hub.repos["models", "org/tiny"].update(
        {path.relative_to(tmp_path / "extra").as_posix(): b"x" for path in (tmp_path / "extra").rglob("*.*")}
    )
    first = answer(BASE, "org/tiny", "")
    assert (first["revision"], first["pinned"]) == (COMMIT, False)
    wanted = sorted(path.name for path in base.iterdir())
    assert files_of(hub.requests) == wanted
    assert sorted(path.name for path in Path(first["path"]).iterdir()) == wanted
    for path in base.iterdir():
        assert (Path(first["path"]) / path.name).read_bytes() == path.read_bytes()
    size = sum(path.stat().st_size for path in base.iterdir())
    assert first["done"]["downloading org/tiny"] == [size, size]

    hub.requests.clear()
    second = answer(BASE, "org/tiny", COMMIT)
    assert (second["path"], second["pinned"]) == (first["path"], True)
    assert hub.requests == []


def test_an_interrupted_download_goes_on(hub, base):
    hub.add("org/tiny", base)
    path = Path(answer(BASE, "org/tiny", COMMIT)["path"])
    (path / "model.safetensors").resolve().unlink()
    (path / "model.safetensors").unlink()
    hub.requests.clear()
    assert answer(BASE, "org/tiny", COMMIT)["path"] == str(path)
    assert files_of(hub.requests) == ["model.safetensors"]


def test_a_repository_with_pickles_only_is_refused_before_any_download(hub, base):
    hub.add("org/old", base)
    files = hub.repos["models", "org/old"]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    done = run(BASE, "org/old", COMMIT)
    assert done.returncode == 3
    assert f"org/old at {COMMIT} has its weights as pytorch_model.bin only: pickles can run code" in done.stderr
    assert files_of(hub.requests) == []


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("org/none", "", "the hub has no org/none, or you have no access to it"),
        ("org/tiny", "dev", "org/tiny has no revision 'dev'"),
        ("org/tiny", "f" * 40, f"org/tiny has no revision '{'f' * 40}'"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub, base, repo, revision, message):
    hub.add("org/tiny", base)
    done = run(BASE, repo, revision)
    assert done.returncode == 3
    assert message in done.stderr


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
@pytest.mark.parametrize("script", [BASE, DATA])
def test_a_hub_that_does_not_answer_is_told_with_advice_and_soon(hub, monkeypatch, script, revision):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = run(script, "org/tiny", revision)
    assert done.returncode == 3
    assert "the hub is unreachable (ConnectError" in done.stderr
    assert "HF_ENDPOINT sets a mirror" in done.stderr
    # The client's own retries would take half a minute and say so at each.
    assert "Retrying" not in done.stderr


def test_without_the_hub_the_commit_last_seen_is_taken_and_it_is_said(hub, base, monkeypatch):
    hub.add("org/tiny", base)
    answer(BASE, "org/tiny", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = run(BASE, "org/tiny", "")
    assert json.loads(done.stdout)["revision"] == COMMIT
    assert f"using the last known commit of 'main': {COMMIT}" in done.stderr


def test_rows_of_the_hub_are_read_once(hub, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (folder / "test.jsonl").write_text('{"a": 3}\n')
    hub.add("org/rows", folder, "datasets")
    first = answer(DATA, "org/rows", "")
    assert first == {"revision": COMMIT, "rows": [{"a": 1}, {"a": 2}]}
    hub.requests.clear()
    assert answer(DATA, "org/rows", COMMIT) == first
    assert hub.requests == []


def test_a_loading_script_of_the_hub_is_never_run(hub, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    hub.add("org/rows", folder, "datasets")
    done = run(DATA, "org/rows", COMMIT)
    assert done.returncode in {2, 3}
    assert "org/rows" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_plan_fetches_the_configuration_alone_and_once(hub, base, tmp_path, monkeypatch):
    hub.add("org/tiny", base)
    assert answer(CONFIG, "org/tiny") == {"model_type": "llama"}
    assert files_of(hub.requests) == ["config.json"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert answer(CONFIG, "org/tiny") == {"model_type": "llama"}
    hub.add("org/empty", tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    done = run(CONFIG, "org/empty")
    assert "org/empty has no config.json at" in done.stderr
    assert done.returncode == 3
