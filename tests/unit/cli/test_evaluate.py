from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from rankwise.cli.evaluate import evaluate


class Stop(Exception):
    """The rest is not looked at."""


def test_an_alias_that_moves_meanwhile_changes_nothing(monkeypatch):
    moved = iter(["models:/m/3", "models:/m/4", "models:/m/5"])
    seen = []

    class Evaluator:
        def __init__(self, context):
            pass

        def assess(self, setting, uris, *, quantization):
            seen.append(uris)
            raise Stop

    def resolve(uri):
        return SimpleNamespace(version=SimpleNamespace(uri=next(moved)))

    def recorded_setup(context, uri, file):
        seen.append(uri)
        return SimpleNamespace(changed=lambda **changes: None)

    context = SimpleNamespace(store=SimpleNamespace(registry=SimpleNamespace(resolve=resolve)))
    monkeypatch.setattr("rankwise.tasks.context.open_context", lambda settings, reporter: nullcontext(context))
    monkeypatch.setattr("rankwise.tasks.evaluation_setup.recorded_setup", recorded_setup)
    monkeypatch.setattr("rankwise.tasks.evaluate.Evaluator", Evaluator)
    runner = CliRunner()
    with pytest.raises(Stop):
        runner.invoke(evaluate, ["models:/m@best", "models:/m/1"], catch_exceptions=False, standalone_mode=False)
    assert seen == ["models:/m/3", ["models:/m/3", "models:/m/1"]]
