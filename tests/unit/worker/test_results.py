import json
import os
import time

import pytest

from rankwise.exceptions import JobError
from rankwise.jobs.job import Outcome
from rankwise.worker.protocol import Result, Results


def test_a_result_is_read_as_it_was_written(tmp_path):
    results = Results(tmp_path / "results")
    result = Result(token="t", outcome=Outcome.SUCCEEDED, result={"model_uri": "models:/m/1"})
    results.write(result)
    assert results.read("t") == result
    results.remove("t")
    assert results.read("t") is None
    results.remove("t")


def test_a_result_of_another_release_is_refused_with_advice(tmp_path):
    results = Results(tmp_path)
    path = results.write(Result(token="t", outcome=Outcome.FATAL, error="wrong"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))
    with pytest.raises(JobError, match="written by another release: finish with that one, or remove it"):
        results.read("t")


def test_what_the_dead_have_left_is_removed_after_a_week(tmp_path):
    results = Results(tmp_path)
    for token, days in (("old", 8), ("new", 6)):
        path = results.write(Result(token=token, outcome=Outcome.PREEMPTED))
        os.utime(path, times=(time.time() - days * 86_400,) * 2)
    results.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]
