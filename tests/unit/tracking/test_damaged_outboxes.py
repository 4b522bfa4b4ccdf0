"""Damaged outboxes: every invalid line is set aside with its reason, the rest and the neighbours are delivered."""

from __future__ import annotations

import json
import os
import random
import shutil
import time

import pytest
from helpers.damaged_outboxes import damage, write_outbox
from helpers.local_store import prepared_home

from rankwise.tracking import outbox_records
from rankwise.tracking.outbox_recovery import refused_records
from rankwise.tracking.store import Store

# RANKWISE_FUZZ_OUTBOXES=5000 for more by hand.
COUNT = int(os.environ.get("RANKWISE_FUZZ_OUTBOXES", "120"))
SEED = int(os.environ.get("RANKWISE_FUZZ_SEED", "0"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return prepared_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def store(settings):
    with Store.open(settings, interval=0.05) as opened:
        yield opened


@pytest.fixture(scope="module")
def experiment(store):
    return store.experiment("damaged")


@pytest.fixture
def run_id(store, experiment, settings):
    shutil.rmtree(settings.outbox, ignore_errors=True)
    return new_run(store, experiment)


def new_run(store, experiment):
    return str(store.client.create_run(experiment).info.run_id)


def delivered(store, run_id):
    """Whether a run has everything of `write_outbox`."""
    run = store.client.get_run(run_id)
    files = [file.path for file in store.client.list_artifacts(run_id, "deep")]
    return (
        run.info.status == "FINISHED"
        and run.data.metrics == {"loss": 3.0, "speed": 3.0}
        and run.data.params == {"lora.r": "8"}
        and run.data.tags["note"] == "a text"
        and len(run.inputs.dataset_inputs) == 1
        and files == ["deep/table.json"]
    )


def test_no_damage_stops_a_synchronization(store, experiment, settings, run_id):
    rng = random.Random(SEED)
    refused = invalid = whole = 0
    for number in range(COUNT):
        shutil.rmtree(settings.outbox, ignore_errors=True)
        healthy = new_run(store, experiment)
        path = write_outbox(settings, run_id)
        described = f"number {number}: {damage(path, rng)}"
        neighbour = write_outbox(settings, healthy)
        # Sometimes the damaged one is delivered first, sometimes last.
        os.utime(neighbour, ns=(1, rng.choice((1, 2**62))))
        began = time.monotonic()
        report = store.sync(timeout=20)
        assert time.monotonic() - began < 10, described
        assert healthy in report.delivered, described
        assert delivered(store, healthy), described
        # What can never be delivered must not be retried as in an outage.
        assert report.waiting == {}, described
        left = {file.suffix for file in settings.outbox.iterdir()}
        refused += ".refused" in left
        invalid += ".invalid" in left
        whole += not left
        assert ".refused" not in left or ".reason" in left, described
        if {".refused", ".invalid"} & left:
            assert report.problems or refused_records(settings), described
    print(f"{COUNT} damaged outboxes: {refused} with refused lines, {invalid} refused as a whole, {whole} delivered")
    assert refused > COUNT / 4
    assert invalid > COUNT / 25


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def header(path, change):
    first, *rest = lines_of(path)
    values = json.loads(first)
    change(values)
    path.write_bytes(json.dumps(values).encode() + b"\n" + b"".join(rest))


HEADERS = {
    "no run": (lambda values: values.pop("run_id"), "run_id: Field required"),
    "a number as run": (lambda values: values.update(run_id=7), "run_id: Input should be a valid string, got 7"),
    "a run that is a path": (lambda values: values.update(run_id="../x"), "run_id: String should match pattern"),
    "another run": (lambda values: values.update(run_id="other"), "its first line is for another run, other"),
    "no store": (lambda values: values.pop("tracking_uri"), "tracking_uri: Field required"),
    "a store that steers the terminal": (
        lambda values: values.update(tracking_uri="\x1b[31m"),
        r"tracking_uri: String should match pattern",
    ),
    "an attempt that is a text": (lambda values: values.update(attempt="1"), "attempt: Input should be a valid int"),
    "a format that is a list": (lambda values: values.update(rankwise_outbox=[2]), "rankwise_outbox: Input should be"),
    "a format that never was": (lambda values: values.update(rankwise_outbox=0), "there is no format 0"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_file_without_a_valid_header_is_moved_with_its_reason(store, experiment, settings, run_id, case):
    change, reason = HEADERS[case]
    path, healthy = write_outbox(settings, run_id), new_run(store, experiment)
    content = path.read_bytes()
    header(path, change)
    content = path.read_bytes()
    write_outbox(settings, healthy)
    report = store.sync(timeout=20)
    assert report.delivered == (healthy,)
    assert delivered(store, healthy)
    assert reason in report.problems[0]
    assert f"it is now {path.stem}.invalid" in report.problems[0]
    assert path.with_suffix(".invalid").read_bytes() == content
    assert reason in path.with_suffix(".reason").read_text()
    # What its artifacts are made of stays beside it.
    assert path.with_suffix(".files").is_dir()
    assert store.sync(timeout=20).problems == ()


LINES = {
    "a metric that is a text": (b'{"m":{"loss":"low"},"s":1,"t":1}', "m.loss: Input should be a valid number"),
    "a step of 70 bits": (b'{"m":{"loss":1.0},"s":%d,"t":1}' % (1 << 70), "s: Input should be less than"),
    "no step": (b'{"m":{"loss":1.0},"t":1}', "s: Field required"),
    "a tag that is a list": (b'{"tags":{"a":[1]}}', "tags.a: Input should be a valid string"),
    "a tag with NUL": (b'{"tags":{"a":"x\\u0000"}}', "tags.a: String should match pattern"),
    "a path out of the run": (
        b'{"file":"x","to":"../../x","table":false}',
        "an artifact path must be relative and normalized",
    ),
    "a file outside": (b'{"file":"../../x","to":"x","table":false}', "must have no directory"),
    "a name that no file has": (b'{"file":"%s","to":"x","table":false}' % (b"x" * 300), "at most 255 bytes"),
    "a path that no store has": (b'{"file":"x","to":"%s","table":false}' % (b"x/" * 600 + b"x"), "at most 1000 bytes"),
    "a data set that is a number": (b'{"input":3}', "input: Input should be a valid dictionary"),
    "a status of another program": (b'{"end":"DONE","t":1}', "end: Input should be 'RUNNING'"),
    "a surplus key": (b'{"end":"FINISHED","t":1,"x":1}', "x: Extra inputs are not permitted"),
    "a deep line": (b"[" * 100_000, "not a record: it is nested too deeply"),
    "a deep record": (b'{"m":' * 100_000, "not a record: it is nested too deeply"),
    "zeros after a power failure": (bytes(4096), "not JSON"),
    "a number without end": (b'{"m":{"a":1.0},"s":1,"t":' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "an unknown kind": (b'{"future":1}', "it must be an object that starts with one of m, params"),
}


@pytest.mark.parametrize("case", LINES)
def test_an_invalid_line_is_set_aside_with_its_reason(store, experiment, settings, run_id, case):
    line, reason = LINES[case]
    path, healthy = write_outbox(settings, run_id), new_run(store, experiment)
    first, *rest = lines_of(path)
    path.write_bytes(b"".join([first, *rest[:3], line + b"\n", *rest[3:]]))
    write_outbox(settings, healthy)
    report = store.sync(timeout=20)
    assert set(report.delivered) == {healthy, run_id}
    assert delivered(store, healthy)
    assert delivered(store, run_id)
    (problem,) = report.problems
    assert reason in problem
    assert path.with_suffix(".refused").read_bytes() == line + b"\n"
    assert reason in path.with_suffix(".reason").read_text()
    assert path.with_suffix(".files").is_dir()


def test_a_line_of_any_length_is_copied_without_being_read_whole(store, settings, run_id, monkeypatch):
    monkeypatch.setattr("rankwise.tracking.outbox.MAX_LINE", 3 << 20)
    path = write_outbox(settings, run_id)
    first, *rest = lines_of(path)
    long = b'{"tags":{"a":"' + b"x" * (10 << 20) + b'"}}\n'
    path.write_bytes(b"".join([first, long, *rest]))
    (problem,) = store.sync(timeout=20).problems
    assert f"the line has {len(long):,} bytes; a record has at most" in problem
    assert delivered(store, run_id)
    assert path.with_suffix(".refused").read_bytes() == long


@pytest.mark.parametrize("kind", ["directory", "pipe", "link to itself"])
def test_what_is_no_file_stops_nothing(store, settings, run_id, kind):
    strange = settings.outbox / "strange.00000000.jsonl"
    settings.outbox.mkdir(parents=True)
    if kind == "directory":
        strange.mkdir()
    elif kind == "pipe":
        os.mkfifo(strange)
    else:
        strange.symlink_to(strange)
    write_outbox(settings, run_id)
    report = store.sync(timeout=20)
    assert report.delivered == (run_id,)
    assert str(strange) in report.problems[0]


def test_a_file_behind_a_link_or_that_is_a_directory_is_not_sent(store, settings, run_id):
    path = write_outbox(settings, run_id)
    (file,) = path.with_suffix(".files").iterdir()
    file.unlink()
    file.symlink_to("/etc/hostname")
    report = store.sync(timeout=20)
    assert report.delivered == (run_id,)
    assert "the file for the artifact deep/table.json is gone" in report.problems[0]
    assert store.client.list_artifacts(run_id) == []


@pytest.mark.parametrize("offset", [b"", b"\0\xff", b"9" * 5000, b"-3", "٣".encode(), b"300", b"99999"])
def test_an_offset_that_is_not_the_end_of_a_line_means_sending_everything_again(store, settings, run_id, offset):
    path = write_outbox(settings, run_id)
    path.with_suffix(".offset").write_bytes(offset)
    assert store.sync(timeout=20).problems == ()
    assert delivered(store, run_id)


def test_the_longest_line_leaves_room_for_every_record():
    assert outbox_records.MAX_LINE >= 16 << 20
