"""`dataset.train` and `dataset.eval` as lists of sources: fields, rules, hashes, pins, plans and sweeps."""

import pytest
from helpers.definitions import COMMIT, DIGEST, parse

from rankwise.exceptions import ConfigError
from rankwise.experiment.experiment import parse_experiment
from rankwise.experiment.metric_names import greater_is_better, source_keys
from rankwise.experiment.plan import make_plan
from rankwise.experiment.schema import DataSource

TRAIN = f"train: org/rows\n  train_revision: {COMMIT}"
PROMPT = '  prompt: "How much is {carat}?"\n  completion: "${price}"\n'
METRIC = "primary_metric: eval.loss"
SWEEP = "lora.r: [4, 8]"


def listed(text, *changes, **options):
    return parse((TRAIN, f"train: {text}"), *changes, **options)


def two(first="", second="", *changes, **options):
    return listed(
        f"[{{source: org/a, revision: {COMMIT}{first}}}, {{source: org/b, revision: {COMMIT}{second}}}]",
        *changes,
        **options,
    )


def first_hash(experiment):
    return experiment.arms[0].spec_hash


def refused(*arguments, **options):
    with pytest.raises(ConfigError) as caught:
        two(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("data/faq.jsonl.gz", "faq"),
        ("/x/y/Fragen & Antworten.csv", "Fragen_Antworten"),
        ("org/squad.v2", "squad_v2"),
        ("pypi:rows==1.0#rows/diamonds.csv", "diamonds"),
    ],
)
def test_a_source_is_named_after_its_file_or_repository(source, label):
    assert DataSource(source=source).named == label
    assert DataSource(source=source, label="mine").named == "mine"


def test_what_a_source_does_not_give_comes_from_the_section():
    experiment = two(', prompt: "{q}", completion: "{a}"', ", system: Be brief., split: 'train[:9]'")
    dataset = experiment.spec.dataset
    first, second = (dataset.single(source, "train") for source in dataset.train)
    assert (first.train, first.prompt, first.completion, first.system) == ("org/a", "{q}", "{a}", None)
    assert (second.prompt, second.system, second.train_split) == ("How much is {carat}?", "Be brief.", "train[:9]")
    chat = dataset.single(DataSource(source="org/c", format="sharegpt"), "train")
    assert (chat.format, chat.prompt, chat.completion) == ("sharegpt", None, None)
    assert dataset.systems == ("Be brief.",)


def test_mistakes_are_said_where_they_are():
    assert "small.yaml:11: dataset.train[1]: has no weight, but other sources have one" in refused(", weight: 2")
    both = refused(", weight: 2, rows: 5", ", weight: 1")
    assert "dataset.train[0].rows: is 5, but weight is given too" in both
    assert "dataset.train[0].weight: must be a number greater than 0, or null, got 0" in refused(", weight: 0")
    assert "dataset.train[0].wieght: is not a key here; did you mean 'weight'?" in refused(", wieght: 2")
    assert "dataset.train[1].label: is a, like that of dataset.train[0]" in refused("", ", label: a")
    assert "must be at most 60 letters, digits, '_' and '-', got 'a b'" in refused(", label: a b")
    assert "dataset.train[0].label: must not be n, which ends the names" in refused(", label: n")
    assert "dataset.train[1].messages: is 'chat', but prompt or" in refused(
        "", ", messages: chat, prompt: x, completion: y"
    )
    assert "dataset.train[0]: has one of prompt and completion" in refused(", prompt: x")
    pin = "train_revision: " + COMMIT
    with pytest.raises(ConfigError, match=r"dataset\.train_revision: is .*, but dataset\.train is a list"):
        parse((TRAIN, f"train: [{{source: org/a}}]\n  {pin}"))
    with pytest.raises(ConfigError, match=r"dataset\.train\[0\]\.source: there is no file or directory .*gone\.jsonl"):
        listed("[{source: gone.jsonl}]")
    with pytest.raises(ConfigError, match=r"dataset\.train: must be a source"):
        listed("[]")
    evaluation = ("eval: {split_from: train, rows: 20}", "eval: [{source: org/c, weight: 2}]")
    assert "dataset.eval[0].weight: is for training" in refused("", "", evaluation)


def test_a_text_hashes_as_before_and_a_list_by_content_mapping_and_ratio():
    single, one = parse(), listed(f"[{{source: org/rows, revision: {COMMIT}}}]")
    assert first_hash(single) != first_hash(one)
    plain = first_hash(two())
    assert first_hash(two(", weight: 2", ", weight: 1")) != plain
    assert first_hash(two(", weight: 2", ", weight: 1")) == first_hash(two(", weight: 4", ", weight: 2"))
    assert first_hash(two(", rows: 9")) != plain
    assert first_hash(two(", prompt: x, completion: '{y}'")) != plain
    assert first_hash(two(", label: other")) == plain
    # The label is a part of what an evaluation is named.
    assert two(", label: other").arms[0].eval_hash() != two().arms[0].eval_hash()


def test_weights_have_no_influence_on_which_rows_are_evaluated():
    heavy, light = two(", weight: 9", ", weight: 1"), two(", weight: 1", ", weight: 9")
    assert heavy.arms[0].base_eval_hash() == light.arms[0].base_eval_hash()


def test_every_source_gets_its_own_pin():
    experiment = listed("[{source: org/a}, {source: org/b, revision: main}]")
    assert experiment.arms[0].provisional
    pinned = experiment.with_pins(revisions={("org/a", None): COMMIT, ("org/b", "main"): "1" * 40})
    for arm in (pinned.spec, *pinned.arms):
        assert [source.revision for source in arm.dataset.train] == [COMMIT, "1" * 40]
    assert not pinned.arms[0].provisional
    again = parse_experiment(pinned.text, "again.yaml")
    assert [arm.spec_hash for arm in again.arms] == [arm.spec_hash for arm in pinned.arms]


def test_params_name_the_sources_by_their_place():
    params = two(", weight: 2", ", weight: 1").arms[0].params
    assert (params["dataset.train.0.source"], params["dataset.train.0.weight"]) == ("org/a", 2)
    assert params["dataset.train.1.revision"] == COMMIT
    assert "dataset.train" not in params


def test_weights_rows_and_sources_are_axes():
    axis = (SWEEP, "dataset.train[0].weight: [1, 3]")
    experiment = two("", ", weight: 1", axis)
    assert [arm.dataset.train[0].weight for arm in experiment.arms] == [1, 3]
    assert [label for label, _ in experiment.labelled_arms] == [
        "dataset.train[0].weight=1",
        "dataset.train[0].weight=3",
    ]
    assert {arm.params["dataset.train.0.weight"] for arm in experiment.arms} == {1, 3}
    assert len({arm.base_eval_hash() for arm in experiment.arms}) == 1
    changed = two("", ", weight: 1", axis, overrides=("dataset.train[1].weight=5",))
    assert [arm.dataset.train[1].weight for arm in changed.arms] == [5, 5]
    assert "(dataset.train[0].weight=1) and (dataset.train[0].weight=2) are the same arm" in refused(
        "", ", rows: 5", (SWEEP, "dataset.train[0].weight: [1, 2]")
    )


def test_a_search_draws_weights():
    search = ("  parameters:\n    lora.r: [4, 8]", "  method: random\n  trials: 3\n  parameters:\n    "
              "dataset.train[0].weight: {log_uniform: [0.1, 10]}")  # fmt: skip
    weights = {arm.dataset.train[0].weight for arm in two("", ", weight: 1", search).arms}
    assert len(weights) == 3
    assert all(0.1 <= weight <= 10 for weight in weights)


def test_axes_that_make_no_sense_are_refused():
    out = refused("", "", (SWEEP, "dataset.train[2].weight: [1]"))
    assert "sweep.parameters.dataset.train[2].weight: does not exist: dataset.train has 2 sources" in out
    with pytest.raises(ConfigError, match=r"does not exist: dataset\.train is not a list"):
        parse((SWEEP, "dataset.train[0].weight: [1]"))
    out = refused("", "", (SWEEP, "dataset.train[0].source: [org/a, org/c]"))
    assert "needs evaluation rows that are the same for all arms" in out
    with pytest.raises(
        ConfigError, match=r"dataset\.train\[7\]\.weight: '3' cannot be set: there is no dataset\.train\[7\]"
    ):
        two(overrides=("dataset.train[7].weight=3",))


def test_whole_data_sets_are_an_axis_with_evaluation_rows_of_their_own(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text('{"carat": 1, "price": 2}\n')
    experiment = parse(
        (TRAIN, "train: a.jsonl"),
        ("eval: {split_from: train, rows: 20}", "eval: c.jsonl"),
        (SWEEP, "dataset.train: [a.jsonl, [{source: a.jsonl}, {source: b.jsonl, rows: 4}]]"),
        directory=tmp_path,
    )
    one, both = (arm.dataset for arm in experiment.arms)
    assert one.train == str(tmp_path / "a.jsonl")
    assert [source.source for source in both.train] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert len({arm.base_eval_hash() for arm in experiment.arms}) == 1
    pins = {(str(tmp_path / name), None): DIGEST for name in ("a.jsonl", "b.jsonl", "c.jsonl")}
    pinned = experiment.with_pins(base_model_revision=COMMIT, revisions=pins)
    assert not any(arm.provisional for arm in pinned.arms)


def test_the_loss_of_a_source_may_decide():
    experiment = two(", label: faq", ", label: chat", (METRIC, "primary_metric: eval.loss.faq"))
    assert experiment.spec.evaluation.primary_metric == "eval.loss.faq"
    assert not greater_is_better("eval.loss.faq")
    assert source_keys(["number"], ["faq"]) == ()
    out = refused(", label: faq", "", (METRIC, "primary_metric: eval.loss.fak"))
    assert "eval.loss.faq, eval.loss.b), got 'eval.loss.fak'; did you mean 'eval.loss.faq'?" in out


def test_a_plan_counts_the_rows_of_an_epoch(tmp_path):
    for name, rows in (("a.jsonl", 30), ("b.jsonl", 90)):
        (tmp_path / name).write_text('{"carat": 1, "price": 2}\n' * rows)
    text = "[{source: a.jsonl, weight: 1}, {source: b.jsonl, weight: 1}]"
    epochs = ("max_steps: 20", "num_train_epochs: 1\n  per_device_train_batch_size: 10")
    warmup = ("warmup_steps: 5", "warmup_steps: 0")
    experiment = listed(text, epochs, warmup, directory=tmp_path)
    assert {arm.steps for arm in make_plan(experiment).arms} == {10}
    fixed = listed(text.replace("weight: 1}]", "rows: 25}]").replace("a.jsonl, weight: 1", "a.jsonl"), epochs, warmup,
                   directory=tmp_path)  # fmt: skip
    # 30 rows without the 6 for evaluation, and 25.
    assert {arm.steps for arm in make_plan(fixed).arms} == {5}
