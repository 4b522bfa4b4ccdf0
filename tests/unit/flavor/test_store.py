"""Logging to a real MLflow store."""

from __future__ import annotations

import logging
import os

import mlflow
import pytest
import torch
from helpers.bases import inject, logits
from helpers.tiny import make_base

import rankwise.flavor as flavor
from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError, StorageError
from rankwise.flavor.fetch import resolve_uri
from rankwise.flavor.metadata import MANIFEST_TAG, SECTION_TAG
from rankwise.modeling.adapter import read_adapter

TAGS = {"rankwise.job": 7, "rankwise.attempt": 1, "rankwise.spec_hash": "a" * 64}


@pytest.fixture(scope="module")
def base(world):
    return world.load_base()


@pytest.fixture
def run(world, store):
    # Without a place of its own, MLflow would keep its artifacts below the working directory.
    place = (world.settings.artifacts / "rank").as_uri()
    experiment = store.get_experiment_by_name("rank") or store.create_experiment("rank", artifact_location=place)
    experiment_id = experiment if isinstance(experiment, str) else experiment.experiment_id
    made = store.create_run(experiment_id)
    store.log_param(made.info.run_id, "lora.r", 4)
    return made


def test_an_adapter_is_logged_to_a_run_that_is_not_active_with_its_tags_from_the_start(world, store, base, run):
    info = flavor.log_adapter(
        world.adapter, base, registered_model_name="first", run_id=run.info.run_id, tags=TAGS, step=3
    )
    assert mlflow.active_run() is None
    logged = store.get_logged_model(info.model_id)
    version = store.get_model_version("first", "1")
    assert logged.experiment_id == run.info.experiment_id
    assert logged.source_run_id == run.info.run_id
    assert str(logged.status) == "READY"
    assert logged.params == {"lora.r": "4"}
    assert info.registered_model_version == "1"
    assert version.source == f"models:/{info.model_id}"
    assert resolve_uri("models:/first/1").model_id == info.model_id
    assert version.run_id == run.info.run_id
    for tags in (logged.tags, version.tags):
        assert {key: tags[key] for key in TAGS} == {key: str(value) for key, value in TAGS.items()}
        assert tags["lora.r"] == "4"
        assert tags["lora.alpha"] == "8"
        assert tags["lora.target_modules"] == "q_proj,v_proj"
        assert tags["base.fingerprint"] == base.fingerprint.digest
        assert tags["base.quantization"] == "4bit"
        assert tags[MANIFEST_TAG].startswith("sha256:")
        assert tags[SECTION_TAG].startswith("sha256:")
    outputs = store.get_run(run.info.run_id).outputs.model_outputs
    assert [(output.model_id, output.step) for output in outputs] == [(info.model_id, 3)]
    assert store.get_run(run.info.run_id).data.params == {"lora.r": "4"}


def test_metrics_become_tags_of_the_version_and_points_of_the_logged_model_but_no_second_points_of_the_run(
    world, store, base, run
):
    run_id = run.info.run_id
    store.log_metric(run_id, "eval.loss", 2.0, step=10)
    store.log_metric(run_id, "eval.loss", 1.5, step=20)
    info = flavor.log_adapter(
        world.adapter, base, registered_model_name="scored", run_id=run_id, step=20, metrics={"eval.loss": 1.5}
    )
    assert store.get_model_version("scored", "1").tags["eval.loss"] == "1.5"
    assert [(metric.key, metric.value) for metric in store.get_logged_model(info.model_id).metrics] == [
        ("eval.loss", 1.5)
    ]
    assert [point.value for point in store.get_metric_history(run_id, "eval.loss")] == [2.0, 1.5]


def test_without_any_run_the_adapter_is_logged_to_the_current_experiment(world, store, base):
    info = flavor.log_adapter(world.adapter, base)
    logged = store.get_logged_model(info.model_id)
    assert logged.source_run_id is None
    assert logged.experiment_id == "0"
    assert mlflow.active_run() is None


def test_the_base_in_memory_is_not_touched_by_logging_a_saved_adapter(world, store, base):
    before = {name: parameter.data_ptr() for name, parameter in base.model.named_parameters()}
    flavor.log_adapter(world.adapter, base)
    assert {name: parameter.data_ptr() for name, parameter in base.model.named_parameters()} == before
    assert not getattr(base.model, "peft_config", None)


def test_an_adapter_that_was_read_is_logged_without_reading_it_again(world, store, base, monkeypatch):
    expected = flavor.log_adapter(world.adapter, base)
    stored = read_adapter(world.adapter)
    monkeypatch.setattr("rankwise.modeling.adapter.safe_open", lambda *_, **__: pytest.fail("read again"))
    info = flavor.log_adapter(stored, base)
    manifests = [store.get_logged_model(each.model_id).tags[MANIFEST_TAG] for each in (expected, info)]
    assert manifests[0] == manifests[1]


def test_logging_loads_no_second_base_for_the_example(world, store, base, monkeypatch):
    from transformers import AutoModelForCausalLM

    def refuse(*_, **__):
        raise AssertionError("a base was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    info = flavor.log_adapter(world.adapter, base)
    assert info.saved_input_example_info["artifact_path"] == "input_example.json"


def test_mlflow_s_own_way_of_logging_with_a_flavor_works_too(world, store):
    from mlflow.models import Model

    base = world.load_base()
    inject(base.model, "x")
    with mlflow.start_run() as run:
        info = Model.log(
            name="by-mlflow",
            artifact_path=None,
            flavor=flavor,
            registered_model_name="by-mlflow",
            model=base.model,
            tokenizer=base.tokenizer,
            base=base,
            validate_serving_input=False,
        )
    assert store.get_logged_model(info.model_id).source_run_id == run.info.run_id
    loaded = flavor.load_model("models:/by-mlflow/1", settings=world.settings)
    assert torch.equal(logits(loaded.model), logits(base.model))


def test_another_store_than_the_current_one_may_be_named(world, tmp_path, base):
    from helpers.local_store import prepared_home

    other = prepared_home(tmp_path / "other")
    before = mlflow.get_tracking_uri()
    environment = dict(os.environ)
    flavor.log_adapter(
        world.adapter, base, registered_model_name="there", tracking_uri=other.tracking_uri, experiment_id="0"
    )
    assert mlflow.get_tracking_uri() == before
    assert dict(os.environ) == environment
    assert resolve_uri("models:/there/1", other.tracking_uri).version == "1"


def test_only_the_adapter_is_stored(world):
    sizes = {path.name: path.stat().st_size for path in world.saved.rglob("*") if path.is_file()}
    assert sum(sizes.values()) - max(sizes.values()) < world.base_path.joinpath("model.safetensors").stat().st_size
    assert sizes["adapter_model.safetensors"] < 20_000


def test_a_model_directory_is_not_written_into_one_that_is_in_use(world, base, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="is not empty; save the model into a new directory"):
        flavor.save_model(base.model, tmp_path, base.tokenizer, settings=world.settings)


def test_any_peft_model_is_logged_from_a_script_of_one_s_own(world, store, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make_base(tmp_path / "mine", seed=3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval()
    wanted = logits(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with mlflow.start_run() as active:
        info = flavor.log_model(model, tokenizer, registered_model_name="own-script")
    assert store.get_logged_model(info.model_id).source_run_id == active.info.run_id
    assert store.get_run(active.info.run_id).data.params == {}
    loaded = flavor.load_model("models:/own-script/1", settings=world.settings)
    assert torch.equal(logits(loaded.model), wanted)
    assert loaded.metadata.base.source == str(path)
    assert not loaded.metadata.base.quantization.load_in_4bit


def test_a_base_named_wrongly_is_noticed_before_anything_is_stored(world, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    mine, other = make_base(tmp_path / "mine", seed=3), make_base(tmp_path / "other", seed=4)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(mine), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(BaseMismatchError, match=r"is not the base of the model in memory: tensor model.embed_tokens"):
        flavor.save_model(model, tmp_path / "out", None, base=other, settings=world.settings)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_loaded_again_is_refused(world, tmp_path):
    base = world.load_base()
    with pytest.raises(ConfigError, match="has no adapter; add one with"):
        flavor.save_model(base.model, tmp_path / "a", base.tokenizer, base=base)
    inject(base.model, "one")
    with pytest.raises(ConfigError, match=r"name one adapter; the model has one, got 'other'"):
        flavor.save_model(base.model, tmp_path / "b", base.tokenizer, base=base, adapter_name="other")
    base.tokenizer.add_tokens([f"<|more-{index}|>" for index in range(40)])
    with pytest.raises(ConfigError, match=r"token ids up to 339, the base's embedding has 320 rows"):
        flavor.save_model(base.model, tmp_path / "c", base.tokenizer, base=base)
    base.model.resize_token_embeddings(352, mean_resizing=False)
    with pytest.raises(BaseMismatchError, match=r"embedding has 352 rows, but its base .* has 320"):
        flavor.save_model(base.model, tmp_path / "d", base.tokenizer, base=base)
    with pytest.raises(BaseMismatchError, match="352 rows"):
        flavor.log_adapter(world.adapter, base)


def test_a_peft_directory_that_is_not_whole_is_refused(world, base, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterIntegrityError):
        flavor.log_adapter(tmp_path, base)


def test_the_card_names_base_settings_and_results(world, store, base):
    info = flavor.log_adapter(world.adapter, base, metrics={"eval.loss": 0.25})
    location = store.get_logged_model(info.model_id).artifact_location
    from pathlib import Path

    card = (Path(location.removeprefix("file://")) / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert f"| fingerprint | {base.fingerprint.digest} |" in card
    assert "| target_modules | q_proj, v_proj |" in card
    assert "| eval.loss | 0.25 |" in card


def test_a_model_is_held_to_exact_weights_and_one_that_was_repacked_is_spoken_of(world, tmp_path, caplog):
    loaded = world.load_base()
    layer = loaded.model.model.layers[0].mlp.up_proj
    layer.support_avx512bf16_for_cpu = True
    model = loaded.model
    inject(model)
    flavor.save_model(model, tmp_path / "exact", loaded.tokenizer, base=loaded, settings=world.settings)
    assert not layer.support_avx512bf16_for_cpu
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    layer.weight.quant_state.packing_format_for_cpu = True
    flavor.save_model(model, tmp_path / "repacked", loaded.tokenizer, base=loaded, settings=world.settings)
    assert [text for text in caplog.messages if "repacked" in text]
