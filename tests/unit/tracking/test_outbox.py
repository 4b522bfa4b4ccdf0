from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from rankwise.exceptions import StorageError, TrackingError
from rankwise.tracking.outbox import Outbox

URI = "http://ann:pa55@tracking.example"


def point(step, value=1.0):
    return {"m": {"loss": value}, "s": step, "t": 1000 + step}


def steps(outbox):
    return [entry.record["s"] for entry in outbox.read()]


@pytest.fixture
def outbox(tmp_path):
    made = Outbox.create(tmp_path, "r1", URI)
    yield made
    if not made.closed:
        made.close()


def left_behind(tmp_path, records, tail=b""):
    """The file of a writer that died: closing the descriptor drops its lock."""
    outbox = Outbox.create(tmp_path, "r1", URI)
    for record in records:
        outbox.append(record)
    os.write(outbox._descriptor, tail)
    os.close(outbox._descriptor)
    return outbox.path


def test_records_are_read_in_the_order_of_their_writing(outbox):
    for step in range(5):
        outbox.append(point(step))
    assert steps(outbox) == [0, 1, 2, 3, 4]


def test_what_was_committed_is_not_read_again(outbox):
    for step in range(3):
        outbox.append(point(step))
    outbox.commit(outbox.read()[1].end)
    assert steps(outbox) == [2]
    assert outbox.pending
    outbox.commit(outbox.read()[0].end)
    assert not outbox.pending
    assert outbox.read() == []


def test_a_record_is_in_the_file_as_soon_as_append_returns(outbox):
    outbox.append(point(7))
    assert json.loads(outbox.path.read_text().splitlines()[-1]) == point(7)


def test_the_header_names_format_and_run_and_no_password(outbox):
    header = json.loads(outbox.path.read_text().splitlines()[0])
    assert header["rankwise_outbox"] == 2
    assert header["run_id"] == "r1"
    assert "pa55" not in outbox.path.read_text()


def test_values_that_json_lacks_survive(outbox):
    outbox.append(point(0, float("nan")))
    outbox.append(point(1, float("-inf")))
    first, second = (entry.record["m"]["loss"] for entry in outbox.read())
    assert first != first
    assert second == float("-inf")


def test_a_long_record_is_read_whole_though_the_limit_is_small(outbox):
    outbox.append({"tags": {"note": "x" * 5000}})
    for step in range(20):
        outbox.append(point(step))
    assert 1 <= len(outbox.read(limit=100)) < 10
    assert len(outbox.read()) == 21


def test_a_file_whose_writer_lives_is_not_adopted(outbox):
    assert Outbox.adopt(outbox.path) is None


def test_a_left_file_is_taken_up_at_its_offset(tmp_path):
    path = left_behind(tmp_path, [point(step) for step in range(4)])
    first = Outbox.adopt(path)
    first.commit(first.read()[1].end)
    os.close(first._descriptor)
    second = Outbox.adopt(path)
    assert steps(second) == [2, 3]
    assert second.run_id == "r1"
    second.close()


@pytest.mark.parametrize("tail", [b'{"m":{"lo', b"\0" * 40, b'{"m":{"loss":1.0},"s":9,"t":1}'])
def test_a_torn_last_line_does_not_count(tmp_path, tail):
    outbox = Outbox.adopt(left_behind(tmp_path, [point(0), point(1)], tail))
    assert steps(outbox) == [0, 1]
    outbox.commit(outbox.read()[-1].end)
    assert not outbox.pending
    outbox.close()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_line_in_the_middle_is_shown_without_a_record(tmp_path):
    outbox = Outbox.adopt(left_behind(tmp_path, [point(0)], b'\0\0\0\n{"m":{"loss":1.0},"s":9,"t":1}\n'))
    assert [entry.record and entry.record["s"] for entry in outbox.read()] == [0, None, 9]
    outbox.close()


def test_an_unreadable_offset_means_sending_everything_again(tmp_path):
    path = left_behind(tmp_path, [point(0), point(1)])
    path.with_suffix(".offset").write_bytes(b"\0\0\0")
    outbox = Outbox.adopt(path)
    assert steps(outbox) == [0, 1]
    outbox.close()


def test_closing_removes_a_delivered_file_and_what_belongs_to_it(outbox, tmp_path):
    stored = outbox.spool(b"hello", "a/b.txt")
    assert (outbox.files / stored).read_bytes() == b"hello"
    outbox.append({"file": stored, "to": "a/b.txt", "table": False})
    outbox.commit(outbox.read()[-1].end)
    outbox.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_keeps_a_file_with_something_to_deliver(outbox):
    outbox.append(point(0))
    outbox.close()
    assert outbox.path.exists()


def test_a_newer_format_is_refused_with_advice(tmp_path):
    path = tmp_path / "r1.aaaaaaaa.jsonl"
    path.write_text('{"rankwise_outbox":3,"run_id":"r1","tracking_uri":"x"}\n')
    with pytest.raises(TrackingError, match=r"has outbox format 3; this release reads 1 and 2. Run `rankwise sync`"):
        Outbox.adopt(path)


def test_what_the_first_release_wrote_is_read(tmp_path):
    path = tmp_path / "r1.aaaaaaaa.jsonl"
    header = '{"rankwise_outbox":1,"run_id":"r1","tracking_uri":"x","created":1}\n'
    path.write_text(header + '{"m":{"loss":1.0},"s":3,"t":5}\n')
    outbox = Outbox.adopt(path)
    assert [entry.record["s"] for entry in outbox.read()] == [3]
    assert (outbox.attempt, outbox.once) == (None, False)
    outbox.close()


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(TrackingError, match="is not an outbox file"):
        Outbox.adopt(path)


def test_a_line_that_the_disk_took_only_in_part_is_taken_back(outbox, monkeypatch):
    outbox.append(point(0))
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[:10]))
    with pytest.raises(StorageError, match="No space left on device"):
        outbox.append(point(1))
    monkeypatch.undo()
    outbox.append(point(2))
    assert steps(outbox) == [0, 2]


def test_a_full_disk_names_the_file_and_the_advice(outbox, monkeypatch):
    def full(descriptor, line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"writing the outbox: cannot write .*jsonl.*free some space"):
        outbox.append(point(0))


def test_points_survive_a_killed_process(tmp_path):
    program = (
        "import os, sys, signal; from pathlib import Path; from rankwise.tracking.outbox import Outbox\n"
        "outbox = Outbox.create(Path(sys.argv[1]), 'r1', 'x')\n"
        "for step in range(100): outbox.append({'m': {'loss': 1.0}, 's': step, 't': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    (path,) = tmp_path.glob("*.jsonl")
    outbox = Outbox.adopt(path)
    assert steps(outbox) == list(range(100))
    outbox.close()
