"""What is looked up before a base is loaded."""

from __future__ import annotations

import pytest
from helpers.inline_worker import Listener, inline_worker, submission
from helpers.project import make_project

from rankwise.cli.jobs import open_queue
from rankwise.exceptions import ConfigError
from rankwise.settings import Settings


def test_modules_and_columns_that_are_not_there_are_all_told_before_the_base_is_loaded(tmp_path, monkeypatch):
    project = make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKWISE_HOME", str(project.home))
    definition = project.file.read_text()
    split = "{split_from: train, rows: 12, seed: 0}"
    for right, wrong in (("q_proj", "mlp.q_proj"), ("{sum}", "{total}"), (split, "e.csv")):
        assert definition.count(right) == 1
        definition = definition.replace(right, wrong)
    (tmp_path / "e.csv").write_text("a,sum\n1,2\n")
    settings = Settings.load()
    listener = Listener()
    with inline_worker(settings, listener) as loop, pytest.raises(ConfigError) as caught:
        loop.call(submission(definition))
    problems = str(caught.value).splitlines()
    assert len(problems) == 3
    assert problems[0].startswith("lora.target_modules: the base has no linear layer 'mlp.q_proj'")
    assert problems[1].startswith("dataset.completion: unknown column 'total'")
    assert problems[2].startswith("dataset.prompt (eval data): unknown column 'b'")
    assert [told for told in listener.told if told.startswith("base:")] == []
    with open_queue(settings) as queue:
        assert queue.jobs() == []
