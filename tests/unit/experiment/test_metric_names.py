from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from helpers.definitions import changed, parse
from helpers.example_package import install_example_metrics

from rankwise.exceptions import ConfigError
from rankwise.experiment import metric_names as module
from rankwise.experiment.metric_names import (
    DERIVED_KEYS,
    GENERATIVE_METRICS,
    GREATER_IS_BETTER,
    METRIC_KEYS,
    greater_is_better,
    keys_of,
    known_names,
    means_of,
    metric_facts,
    needs_generation,
)

USER = ("metrics: [loss, number]", "metrics: [loss, answer_length]")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return install_example_metrics(tmp_path_factory.mktemp("site"))


@pytest.fixture
def installed(package, monkeypatch):
    monkeypatch.syspath_prepend(package)
    module._facts_of_package.cache_clear()
    yield
    module._facts_of_package.cache_clear()


@pytest.fixture
def points(monkeypatch):
    def offer(**values):
        found = tuple(EntryPoint(name=k, value=v, group=module.ENTRY_POINT_GROUP) for k, v in values.items())
        monkeypatch.setattr(module, "entry_points", lambda group: found)

    yield offer
    module._facts_of_package.cache_clear()


def test_every_key_belongs_to_one_metric():
    keys = keys_of(METRIC_KEYS)
    assert len(keys) == len(set(keys))
    assert set(keys) >= GREATER_IS_BETTER | DERIVED_KEYS
    assert set(METRIC_KEYS) >= GENERATIVE_METRICS


def test_keys_come_in_the_order_of_the_metrics_and_means_leave_out_what_is_derived():
    assert keys_of(["token_accuracy", "loss"]) == ("eval.token_accuracy", "eval.loss", "eval.perplexity")
    assert means_of(["token_accuracy", "loss"]) == ("eval.token_accuracy", "eval.loss")


def test_losses_and_errors_are_better_when_smaller():
    assert greater_is_better("eval.exact_match")
    assert not greater_is_better("eval.loss")
    assert not greater_is_better("eval.parse_failures")


def test_a_metric_of_an_installed_package_says_itself_what_it_gives(installed):
    assert known_names() == (*METRIC_KEYS, "answer_length")
    assert metric_facts("answer_length").origin == "example-metrics==1.2.0"
    assert keys_of(["loss", "answer_length"])[-2:] == ("eval.answer_length", "eval.digit_share")
    assert greater_is_better("eval.digit_share")
    assert not greater_is_better("eval.answer_length")
    assert needs_generation(["answer_length"])
    assert not needs_generation(["loss"])


def test_a_definition_lists_it_and_is_ranked_and_promoted_by_it(installed):
    experiment = parse(
        USER,
        ("primary_metric: eval.loss", "primary_metric: eval.digit_share"),
        overrides=("promotion={metric: eval.answer_length, max_regression: {eval.digit_share: 0.1}}",),
    )
    assert experiment.spec.evaluation.primary_metric == "eval.digit_share"
    with pytest.raises(ConfigError, match=r"eval\.loss, eval\.perplexity, eval\.answer_length, eval\.digit_share"):
        parse(USER, ("primary_metric: eval.loss", "primary_metric: eval.digits"))


def test_without_the_package_the_definition_says_what_there_is():
    with pytest.raises(ConfigError) as error:
        parse(USER)
    assert "evaluation.metrics[1]: must be loss, token_accuracy, exact_match or number, got 'answer_length'" in str(
        error.value
    )
    assert "to use a metric of another package, install that package" in str(error.value)
    # The primary metric is not complained about as well.
    assert len(error.value.problems) == 1


def test_a_near_miss_of_an_installed_metric_is_suggested(installed):
    with pytest.raises(
        ConfigError, match=r"number or answer_length, got 'answer_lenght'; did you mean 'answer_length'"
    ):
        parse((USER[0], "metrics: [loss, answer_lenght]"))


def test_another_release_of_the_package_asks_for_a_new_evaluation_and_no_new_training(installed, package, monkeypatch):
    before = parse(USER).arms[0]
    hashes = before.spec_hash, before.eval_hash()
    # Longer generations count, since this metric reads them.
    longer = parse(USER, ("primary_metric: eval.loss", "primary_metric: eval.loss\n  max_new_tokens: 5")).arms[0]
    assert longer.eval_hash() != hashes[1]
    newer = metric_facts("answer_length").__class__(
        **{**metric_facts("answer_length").__dict__, "origin": "example-metrics==1.3.0"}
    )
    monkeypatch.setattr(module, "_facts_of_package", lambda name: newer)
    after = parse(USER).arms[0]
    assert after.spec_hash == hashes[0]
    assert after.eval_hash() != hashes[1]
    monkeypatch.undo()


def test_what_cannot_be_used_says_why(points, tmp_path, monkeypatch):
    (tmp_path / "odd_metrics.py").write_text(
        "from types import SimpleNamespace as N\n"
        "taken = N(name='taken', keys=('eval.loss',), derived={}, greater_is_better=(), needs_generation=False)\n"
        "bare = N(name='bare', keys=('bleu',), derived={}, greater_is_better=(), needs_generation=False)\n"
        "number = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points(taken="odd_metrics:taken", bare="odd_metrics:bare", broken="no_such_module:x", number_2="odd_metrics:number")
    for name, says in {
        "taken": "has the keys eval.loss; a key must start with 'eval.' and must not be a key of a built-in",
        "bare": "has the keys bleu; a key must start with",
        "broken": "cannot be loaded from 'no_such_module:x': ModuleNotFoundError",
        "number_2": r"is not the metric 'number_2'; decorate the function with @metric",
    }.items():
        with pytest.raises(ConfigError, match=says):
            metric_facts(name)
        with pytest.raises(ConfigError, match=r"evaluation\.metrics\[1\]: cannot be used: "):
            parse((USER[0], f"metrics: [loss, {name}]"))
    with pytest.raises(ConfigError, match=r"no installed metric produces eval\.bleu") as error:
        greater_is_better("eval.bleu")
    assert "no_such_module" in str(error.value)


def test_checking_a_definition_with_it_needs_no_torch(package, tmp_path):
    (tmp_path / "small.yaml").write_text(changed(USER))
    program = (
        "before = set(sys.modules)\n"
        "from rankwise.cli.main import main\n"
        "try: main(['validate', 'small.yaml'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'mlflow'} & (set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(package)!r}]\n{program}"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
