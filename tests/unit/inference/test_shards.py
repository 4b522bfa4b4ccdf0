"""The directory beside an output."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from rankwise.exceptions import ConfigError
from rankwise.inference.predictor import Answer
from rankwise.inference.shards import Parts

ONE, OTHER = "1" * 64, "2" * 64


def answers(text):
    return [Answer(text=text)]


def test_what_another_prediction_has_written_is_no_answer_of_this_one(tmp_path):
    output = tmp_path / "out.jsonl"
    Parts(output, ONE).write(0, answers("one"))
    assert Parts(output, ONE).has(0)
    assert not Parts(output, OTHER).has(0)
    assert not Parts(output).has(0)
    Parts(output).write(1, answers("local"))
    assert Parts(output, OTHER).has(1), "jobs go on with what a local command has answered"


def test_a_leftover_of_the_same_name_is_in_nobodys_way_and_swept(tmp_path):
    parts = Parts(tmp_path / "out.jsonl")
    left = tmp_path / f".out.jsonl.parts.{os.getpid()}.tmp"
    left.mkdir()
    (left / "shard-000000.jsonl").write_text("{}")
    parts.write(0, answers("a"))
    parts.remove()
    assert not parts.directory.exists()
    parts.sweep()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b'{"text": "a"}\n{"text"', b'{"text": "a"}\n[1]\n', b"\xff\n\xff\n"])
def test_a_shard_that_is_not_whole_is_named_and_what_to_do_is_said(tmp_path, content):
    parts = Parts(tmp_path / "out.jsonl")
    parts.write(0, [*answers("a"), *answers("b")])
    whole = SimpleNamespace(shards=1, span=lambda shard: range(2))
    assert [answer.text for answer in parts.answers(whole)] == ["a", "b"]
    (parts.directory / "shard-000000.jsonl").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"shard-000000.jsonl has 0 answers for 2 rows; remove the file, if it exists"
    ):
        list(parts.answers(whole))
