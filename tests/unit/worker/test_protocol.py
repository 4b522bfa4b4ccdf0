import io
import json
import os
import time

import pytest

from rankwise.exceptions import JobError
from rankwise.jobs.job import Outcome
from rankwise.worker.protocol import Result, ResultFiles, Writer, read_messages


@pytest.mark.parametrize("text", ["é ✓ \U0001f600", "no file caf\udce9.csv", 'a "line"\nand\0more'])
def test_a_message_arrives_as_it_was_sent(text):
    stream = io.BytesIO()
    assert Writer(stream).send({"event": "failed", "text": text})
    stream.seek(0)
    assert list(read_messages(stream)) == [{"event": "failed", "text": text}]


def test_a_line_that_a_death_cut_off_is_left_out():
    assert list(read_messages(io.BytesIO(b'{"event": "done"}\n{"eve'))) == [{"event": "done"}]


def test_a_result_is_read_as_it_was_written(tmp_path):
    results = ResultFiles(tmp_path / "results")
    result = Result(token="t", outcome=Outcome.SUCCEEDED, result={"model_uri": "models:/m/1"})
    results.write(result)
    assert results.read("t") == result
    results.remove("t")
    assert results.read("t") is None
    results.remove("t")


def test_a_result_of_another_release_is_refused_with_advice(tmp_path):
    results = ResultFiles(tmp_path)
    path = results.write(Result(token="t", outcome=Outcome.FATAL, error="wrong"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))
    with pytest.raises(JobError, match="by another version of rankwise: finish the job with that version, or remove"):
        results.read("t")


def test_what_the_dead_have_left_is_removed_after_a_week(tmp_path):
    results = ResultFiles(tmp_path)
    for token, days in (("old", 8), ("new", 6)):
        path = results.write(Result(token=token, outcome=Outcome.PREEMPTED))
        os.utime(path, times=(time.time() - days * 86_400,) * 2)
    results.remove_stale()
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]
