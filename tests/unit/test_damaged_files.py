"""What rankwise reads back from its own files may be damaged: a message or a rebuilt file, never another error."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from helpers.damaged_outboxes import JUNK

from rankwise.assets.gguf_conversion import RECORD as CONVERSION
from rankwise.assets.gguf_conversion import read_conversion
from rankwise.assets.layout import read_json
from rankwise.exceptions import RankwiseError
from rankwise.inference.predictor import Answer
from rankwise.inference.shards import Manifest, Parts, QueuedJobs
from rankwise.inference.source import InputBlock, InputIndex, Survey
from rankwise.jobs.job import Outcome
from rankwise.modeling.fingerprint import check_manifest, write_manifest
from rankwise.modeling.quantized_cache import ENTRY_NAME, cache_root, list_entries
from rankwise.settings import Settings
from rankwise.training.arm import ArmOutcome
from rankwise.training.checkpoint import ENGINE_VERSION, Checkpoints
from rankwise.training.step import Passes
from rankwise.worker.protocol import Result, ResultFiles

# RANKWISE_FUZZ_FILES=3000 for more by hand.
COUNT = int(os.environ.get("RANKWISE_FUZZ_FILES", "150"))
WHOLE = b"[" * 100_000, b'{"a":' * 100_000, b"", b"\0" * 300, b"null", b"[]", b"\xff\xfe", b"9" * 5000, b'"text"', b"{}"


def changed(content: bytes, rng: random.Random) -> bytes:
    """The content with random bytes or values changed."""
    if rng.random() < 0.1:
        return rng.choice(WHOLE)
    if rng.random() < 0.3:
        start, count = rng.randrange(len(content)), rng.choice((1, 3, 30))
        return content[:start] + rng.choice((b"", rng.randbytes(count))) + content[start + count :]
    lines = content.splitlines() if content.startswith(b"{") and content.rstrip().count(b"\n{") else [content]
    at = rng.randrange(len(lines))
    document = json.loads(lines[at])
    places = list(containers(document))
    place = rng.choice(places)
    key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    if rng.random() < 0.25:
        del place[key]
    elif isinstance(place, dict) and rng.random() < 0.2:
        place[str(rng.choice(JUNK))[:50]] = rng.choice(JUNK)
    else:
        place[key] = rng.choice(JUNK)
    lines[at] = json.dumps(document).encode()
    return b"\n".join(lines) + b"\n"


def containers(value):
    if isinstance(value, dict | list) and value:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


class Reader:
    """A file and what reads it."""

    def __init__(self, file: Path, read, after=lambda: None):
        self.file, self.read, self.after = file, read, after


def prediction(tmp_path):
    survey = Survey(rows=3, columns={"a": frozenset({"int"})}, models={"m": 3}, unnamed=0, numbers={"a": "int"})
    queued = QueuedJobs(whole="0" * 64, spans=((0, 1),))
    manifest = Manifest(
        request={"input": "sha256:1"},
        models={"m": "models:/m/1"},
        adapters={},
        survey=survey,
        shard_rows=2,
        queued=queued,
    )
    parts = Parts(tmp_path / "out.jsonl")
    parts.begin(manifest)
    answer = Answer(model="models:/m/1", text="x", finish_reason="stop", prompt_tokens=1, completion_tokens=1)
    parts.write(0, [answer, answer])
    parts.write(1, [answer])
    return parts, manifest


def known_shards(parts):
    manifest = parts.manifest()
    return manifest and [manifest.span(shard) for shard in range(min(manifest.shards, 5))]


def shard_manifest(tmp_path):
    parts, _ = prediction(tmp_path)
    return Reader(parts.directory / "manifest.json", lambda: (known_shards(parts), parts.queued(), parts.own))


def shard_index(tmp_path):
    parts, manifest = prediction(tmp_path)
    fields = InputBlock.__dataclass_fields__
    block = InputBlock(**dict.fromkeys(fields, 0))
    names = dict.fromkeys(InputIndex.__dataclass_fields__, 0)
    index = InputIndex(**{**names, "input": "sha256:1", "shard_rows": 2, "blocks": (block,)})
    parts.write_index(index)
    return Reader(parts.directory / "index.json", lambda: parts.index(manifest))


def shard_answers(tmp_path):
    parts, manifest = prediction(tmp_path)
    return Reader(parts.directory / "shard-000000.jsonl", lambda: list(parts.answers(manifest)))


def worker_result(tmp_path):
    files = ResultFiles(tmp_path)
    path = files.write(Result(token="t1", outcome=Outcome.SUCCEEDED, result={"model_uri": "models:/m/1"}))
    return Reader(path, lambda: files.read("t1"))


def checkpoints(tmp_path):
    return Checkpoints(tmp_path, ["a" * 64], None)


def first_passes(tmp_path):
    stored = checkpoints(tmp_path)
    stored.initial_passes(Passes(parts=2))
    return Reader(stored.directory / "passes.json", lambda: stored.initial_passes(Passes(parts=2)))


def generation(tmp_path):
    stored = checkpoints(tmp_path)
    arm = stored.directory / "step-00000002" / f"arm-{'a' * 12}"
    arm.mkdir(parents=True)
    made_by = {"version": 1, "engine": ENGINE_VERSION}
    state = {**made_by, "step": 2, "seconds": 1.0, "tokens": 3, "metrics": {"train.loss": 1.0}, "best": None}
    (arm / "state.json").write_text(json.dumps(state))
    outcome = {
        **{"spec_hash": "b" * 64, "status": "finished", "steps": 2, "adapter": "final/x", "reason": None},
        **{"metrics": {}, "seconds": 1.0, "peak_memory_bytes": 3, "best": None, "example_ids": []},
    }
    pack = {**made_by, "pack_step": 2, "passes": {"parts": 1, "max_tokens": None}, "living": ["a" * 64]}
    (arm.parent / "pack.json").write_text(json.dumps({**pack, "ended": {"b" * 64: outcome}}))
    write_manifest(arm.parent)
    assert stored.newest().pack_step == 2
    return stored, arm.parent


def pack_record(tmp_path):
    stored, place = generation(tmp_path)
    # As if the damage was there before the manifest: otherwise the manifest alone would refuse it.
    return Reader(place / "pack.json", lambda: stored.newest(), lambda: write_manifest(place))


def arm_state(tmp_path):
    stored, place = generation(tmp_path)
    path = place / f"arm-{'a' * 12}" / "state.json"
    return Reader(path, lambda: (stored.newest(), stored.newest_state("a" * 64)), lambda: write_manifest(place))


def arm_outcome(tmp_path):
    stored = checkpoints(tmp_path)
    place = stored.directory / "final" / "arm-x"
    place.mkdir(parents=True)
    outcome = {
        **{"version": 1, "spec_hash": "a" * 64, "status": "nonfinite", "steps": 2, "adapter": None, "reason": "x"},
        **{"metrics": {"eval.loss": 1.0}, "seconds": 1.0, "peak_memory_bytes": 3, "best": None, "best_step": None},
        **{"best_value": None, "example_ids": ["1"]},
    }
    (place / "outcome.json").write_text(json.dumps(outcome))
    write_manifest(place)
    (known,) = stored.outcomes().values()
    assert isinstance(known, ArmOutcome)
    return Reader(place / "outcome.json", stored.outcomes, lambda: write_manifest(place))


def manifest(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("x")
    write_manifest(tmp_path / "model")
    (file,) = [path for path in (tmp_path / "model").iterdir() if path.name != "file"]
    return Reader(file, lambda: check_manifest(tmp_path / "model"))


def quantized_entry(tmp_path):
    settings = Settings.load({"RANKWISE_HOME": str(tmp_path / "home"), "RANKWISE_CACHE": str(tmp_path / "cache")})
    place = cache_root(settings) / "entry"
    place.mkdir(parents=True)
    document = {"format": 1, "key": {}, "source": "x", "revision": "y", "files": {"a": {"bytes": 1, "sha256": "0"}}}
    (place / ENTRY_NAME).write_text(json.dumps(document))
    return Reader(place / ENTRY_NAME, lambda: list_entries(settings))


def conversion(tmp_path):
    (tmp_path / CONVERSION).write_text(json.dumps({"gguf": "a", "tensors": "b", "libraries": {"transformers": "5"}}))
    assert read_conversion(tmp_path) is not None
    return Reader(tmp_path / CONVERSION, lambda: read_conversion(tmp_path))


def any_object(tmp_path):
    (tmp_path / "config.json").write_text('{"a": {"b": [1]}}')
    return Reader(tmp_path / "config.json", lambda: read_json(tmp_path / "config.json"))


READERS = [
    *(shard_manifest, shard_index, shard_answers, worker_result, first_passes, pack_record, arm_state, arm_outcome),
    *(manifest, quantized_entry, conversion, any_object),
]


def message_of(reader, described):
    """The message with which a file is refused; empty if it is read, rebuilt or passed over."""
    try:
        reader.read()
    except RankwiseError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(described) from error
    return ""


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_a_damaged_file_gives_a_message_or_is_passed_over(tmp_path, make):
    reader = make(tmp_path)
    reader.read()
    content = reader.file.read_bytes()
    rng = random.Random(make.__name__)
    refused = 0
    for number in range(COUNT):
        damaged = changed(content, rng)
        reader.file.write_bytes(damaged)
        reader.after()
        message = message_of(reader, f"number {number}: {damaged[:300]!r}")
        refused += bool(message)
        assert len(message) < 4000, number
        assert message.replace("\n", "").isprintable(), number
        reader.file.write_bytes(content)
        reader.after()
    reader.read()
    print(f"{make.__name__}: {refused} of {COUNT} refused with a message")


@pytest.mark.parametrize("way", ["directory", "gone"])
@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_a_file_that_is_a_directory_or_gone(tmp_path, make, way):
    reader = make(tmp_path)
    reader.file.unlink()
    if way == "directory":
        reader.file.mkdir()
    message = message_of(reader, way)
    assert not message or str(reader.file.parent) in message
