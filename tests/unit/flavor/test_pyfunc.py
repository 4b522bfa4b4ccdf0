"""Through `mlflow.pyfunc`, as servers and evaluators come."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from uuid import uuid4

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.adapted import attach
from helpers.tiny import make_base
from helpers.turns import count_together, in_threads

import rankwise.flavor as flavor
from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError
from rankwise.flavor.metadata import read_params
from rankwise.modeling.decoding import scheduler
from rankwise.modeling.decoding.engine import RunningBatch
from rankwise.modeling.decoding.generation import Decoding, generate_batch, row_seed
from rankwise.modeling.lora.lean import is_dequantized
from rankwise.modeling.lora.packed import Routing, packed_forwards, replaced_forward

FEW = {"max_new_tokens": 4}


@pytest.fixture
def _settings(world, monkeypatch):
    world.enter(monkeypatch)


@pytest.fixture(scope="module")
def model(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKWISE_HOME", str(world.settings.home))
        patch.setenv("RANKWISE_CACHE", str(world.settings.cache))
        return mlflow.pyfunc.load_model(str(world.saved))


def test_every_form_of_input_passes_mlflow_s_checks_and_is_answered(model):
    chat = [{"role": "user", "content": "carat 0.23"}]
    (answer,) = model.predict("carat 0.23", params=FEW)
    assert isinstance(answer, str)
    for one in (
        ["carat 0.23"], chat, [chat], {"messages": chat}, {"prompt": "carat 0.23"}, np.array(["carat 0.23"]),
        pd.DataFrame({"prompt": ["carat 0.23"]}), pd.DataFrame({"messages": [chat]}), pd.Series(["carat 0.23"]),
        [{"messages": chat}],
    ):  # fmt: skip
        assert model.predict(one, params=FEW) == [answer], one
    assert len(model.predict(["a", "b", "c"], params=FEW)) == 3


def test_answers_keep_the_order_of_prompts_whatever_the_batches(model):
    prompts = ["a", "carat 0.23, cut Ideal, color E", "carat", "0 1 2 3 4 5 6 7"]
    alone = [model.predict(prompt, params=FEW)[0] for prompt in prompts]
    for batch_size in (1, 3, 8):
        assert model.predict(prompts, params={**FEW, "batch_size": batch_size}) == alone


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "seed": 7},
        {"stop": ["0", "<|im_end|>"]},
        {"temperature": 1.0},
    ],
)
def test_rows_come_and_go_and_answers_are_those_of_peft_and_generate(model, monkeypatch, params):
    prompts = ["a", "carat 0.23, cut Ideal, color E", "carat", "0 1 2 3 4 5 6 7", "Price is"]
    params = {"max_new_tokens": 12, **params}
    adapter = model.get_raw_model()
    decoding, seed, _ = read_params(params)
    adapter.activate()
    renderer = model._model_impl.renderer
    texts = renderer.texts([[{"role": "user", "content": text}] for text in prompts], add_generation_prompt=True)
    expected = generate_batch(
        adapter.model,
        adapter.tokenizer,
        renderer.tokens(texts),
        decoding,
        seeds=[row_seed(seed, at) for at in range(len(prompts))],
    )
    entered, admit = [], RunningBatch.admit
    monkeypatch.setattr(RunningBatch, "admit", lambda self, rows: (entered.append(len(rows)), admit(self, rows)))
    assert model.predict(prompts, params={**params, "batch_size": 2}) == [row.text for row in expected]
    assert sum(entered) == len(prompts)
    assert len(entered) > 1


def test_the_raw_model_goes_through_the_adapter_before_and_after_a_prediction(model):
    adapter = model.get_raw_model()
    ids = torch.tensor([[5, 9, 11]])
    with torch.no_grad():
        before = adapter.model(ids).logits
        model.predict("carat 0.23", params=FEW)
        assert torch.equal(adapter.model(ids).logits, before)
        with replaced_forward(packed_forwards(adapter.model, Routing())):
            assert not torch.allclose(adapter.model(ids).logits, before)


@pytest.mark.usefixtures("_settings")
def test_an_adapter_that_is_not_plain_lora_is_answered_by_peft_s_own_forward_and_that_is_said(world, tmp_path, caplog):
    base = world.load_base()
    name = attach(base.model, "dora", use_dora=True)
    flavor.save_model(base.model, tmp_path / "saved", base.tokenizer, base=base, adapter_name=name)
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "saved"))
    adapter = loaded.get_raw_model()
    ids = adapter.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)[
        "input_ids"
    ]
    (expected,) = generate_batch(adapter.model, adapter.tokenizer, [ids], Decoding(max_new_tokens=4))
    with caplog.at_level(logging.WARNING, "rankwise"):
        assert loaded.predict("a", params=FEW) == [expected.text]
    assert "not plain LoRA (DoRA or a bias); these adapters are decoded by peft's own forward" in caplog.text


def test_threads_take_turns_each_with_its_own_parameters(model, monkeypatch):
    lengths = (3, 9)
    expected = {length: model.predict("carat 0.23", params={"max_new_tokens": length}) for length in lengths}
    found = in_threads(lambda length: model.predict("carat 0.23", params={"max_new_tokens": length}), lengths)
    assert found == expected
    monkeypatch.setattr(scheduler, "engine_of", lambda model: None)
    together = count_together(monkeypatch, scheduler, "generate_batch")
    found = in_threads(lambda length: model.predict("carat 0.23", params={"max_new_tokens": length}), lengths)
    assert found == expected
    assert together == [1, 1]
    # Nothing that cannot be copied or pickled is part of it.
    assert vars(model._model_impl).keys() == {"adapter", "renderer"}


def test_sampling_is_repeatable_by_its_seed(model):
    params = {"max_new_tokens": 8, "temperature": 2.0}
    one = model.predict(["a", "a"], params={**params, "seed": 1})
    assert model.predict(["a", "a"], params={**params, "seed": 1, "batch_size": 1}) == one
    assert one[0] != one[1]
    assert model.predict(["a", "a"], params={**params, "seed": 2}) != one


def test_declared_params_reach_generation(model):
    full = model.predict("carat 0.23", params={"max_new_tokens": 12})[0]
    stop = full[3:5]
    assert model.predict("carat 0.23", params={"max_new_tokens": 12, "stop": [stop]}) == [full[: full.find(stop)]]
    sampled = {"max_new_tokens": 12, "temperature": 5.0}
    assert model.predict("carat 0.23", params=sampled)[0] != full
    # So small a share is the likeliest token alone.
    assert model.predict("carat 0.23", params={**sampled, "top_p": 1e-6})[0] == full
    with pytest.raises(ConfigError, match="temperature must be 0"):
        model.predict("a", params={"temperature": -1.0})


def test_a_wrong_input_is_refused_by_the_loader_itself(model):
    with pytest.raises(ConfigError, match="row 1: must be a text or a chat, got int"):
        model.predict(["a", 7])
    with pytest.raises(ConfigError, match="row 1: the prompt has half of a character"):
        model.predict(["a", "half \ud83d"])


def test_the_stored_example_is_one_that_the_model_answers(model):
    assert model.input_example is not None
    assert len(model.predict(model.input_example, params=FEW)) == 1


@pytest.mark.usefixtures("_settings")
def test_weights_are_kept_dequantized_as_long_as_the_model_lives(world):
    loaded = flavor._load_pyfunc(str(world.saved))
    raw = loaded.get_raw_model()
    assert is_dequantized(raw.model)
    del loaded
    gc.collect()
    assert not is_dequantized(raw.model)


@pytest.mark.usefixtures("_settings")
def test_a_recorded_system_prompt_is_put_before_bare_texts(world, tmp_path):
    from helpers.bases import inject

    base = world.load_base()
    inject(base.model, "x", seed=5)
    flavor.save_model(base.model, tmp_path / "saved", base.tokenizer, base=base, system="be brief")
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "saved"))
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    assert loaded.predict("a", params=FEW) == loaded.predict(chat, params=FEW)
    assert loaded.get_raw_model().metadata.system == "be brief"


@pytest.mark.usefixtures("_settings")
def test_the_base_may_be_named_at_load(world, tmp_path):
    other = make_base(tmp_path / "other", seed=2)
    with pytest.raises(BaseMismatchError, match="weights: found"):
        mlflow.pyfunc.load_model(str(world.saved), model_config={"base_model": str(other)})
    config = {"base_model": str(other), "allow_base_mismatch": True}
    loaded = mlflow.pyfunc.load_model(str(world.saved), model_config=config)
    assert [override.what for override in loaded.get_raw_model().overrides] == ["base"]


@pytest.mark.usefixtures("_settings")
def test_a_registered_model_is_checked_against_its_tags_and_a_carried_one_says_that_it_was_not(
    world, store, tmp_path, caplog
):
    info = flavor.log_adapter(world.adapter, world.load_base(), registered_model_name="served")
    assert mlflow.pyfunc.load_model("models:/served/1").predict("a", params=FEW)
    path = Path(store.get_logged_model(info.model_id).artifact_location.removeprefix("file://")) / "MLmodel"
    content = path.read_text()
    document = yaml.safe_load(content)
    document["flavors"]["qlora"]["adapter"]["lora"]["r"] = 99
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(AdapterIntegrityError, match="the MLmodel file"):
        mlflow.pyfunc.load_model("models:/served/1")
    path.write_text(content)
    carried = world.copy(tmp_path / "carried")
    (carried / "registered_model_meta").write_text("model_name: served\nmodel_version: 1\n")
    with caplog.at_level(logging.WARNING, "rankwise.flavor"):
        flavor._load_pyfunc(str(carried))
    assert "the tags of" in caplog.text


def test_a_version_whose_logged_model_was_deleted_is_checked_against_its_own_tags(world, store, caplog):
    info = flavor.log_adapter(world.adapter, world.load_base(), registered_model_name="orphan")
    store.delete_logged_model(info.model_id)
    loaded = mlflow.pyfunc.load_model("models:/orphan/1").get_raw_model()
    assert (loaded.origin.uri, "rankwise.manifest" in loaded.origin.tags) == ("models:/orphan/1", True)
    assert "the tags of" not in caplog.text


@pytest.mark.parametrize("content", ["[1]", "a: {", "model_name: x", "null"])
def test_a_note_that_mlflow_has_not_written_is_refused(world, tmp_path, content):
    carried = world.copy(tmp_path / "carried")
    (carried / "registered_model_meta").write_text(content)
    with pytest.raises(AdapterIntegrityError, match="MLflow's note"):
        flavor._load_pyfunc(str(carried))


def test_a_carried_model_is_not_compared_with_another_store_s_version_of_that_name(world, store, tmp_path):
    flavor.log_adapter(world.adapter, world.load_base(), registered_model_name="namesake")
    store.set_model_version_tag("namesake", "1", "rankwise.signature.name", "of other content")
    store.set_model_version_tag("namesake", "1", "rankwise.manifest", "sha256:0")
    carried = world.copy(tmp_path / "carried")
    (carried / "registered_model_meta").write_text("model_name: namesake\nmodel_version: 1\n")
    assert flavor._load_pyfunc(str(carried)).adapter.origin.name == "namesake"


@pytest.fixture
def served(world, store):
    """A version of a registered model of its own, and the directory of its files in the store."""
    name = f"served-{uuid4().hex}"
    info = flavor.log_adapter(world.adapter, world.load_base(), registered_model_name=name)
    return name, info.model_id, stored_files(store, info.model_id)


def stored_files(store, model_id):
    return Path(store.get_logged_model(model_id).artifact_location.removeprefix("file://"))


def change_mlmodel(directory, rank=None, **changes):
    document = yaml.safe_load((directory / "MLmodel").read_text())
    if rank is not None:
        document["flavors"]["qlora"]["adapter"]["lora"]["r"] = rank
    (directory / "MLmodel").write_text(yaml.safe_dump({**document, **changes}))


def downloaded(served, tmp_path):
    """The files as `mlflow models serve` gets them from mlflow 3.18: without a note of the name."""
    directory = Path(mlflow.artifacts.download_artifacts(f"models:/{served[0]}/1", dst_path=str(tmp_path / "down")))
    (directory / "registered_model_meta").unlink(missing_ok=True)
    return directory


@pytest.mark.parametrize("uri", ["models:/{}/1", "models:/{}/latest", "models:/{}@champion", "models:/{1}"])
def test_the_tags_of_the_model_that_a_call_names_decide_whatever_the_files_say(world, store, served, uri):
    name, model_id, files = served
    store.set_registered_model_alias(name, "champion", "1")
    uri = uri.format(name, model_id)
    origin = mlflow.pyfunc.load_model(uri).get_raw_model().origin
    assert (origin.name, origin.model_id) == (None if model_id in uri else name, model_id)
    other = flavor.log_adapter(world.adapter, world.load_base(), metadata={"other": True}).model_id
    change_mlmodel(files, rank=99, model_id=other)
    (files / "registered_model_meta").unlink(missing_ok=True)
    with pytest.raises(AdapterIntegrityError, match="the MLmodel file"):
        mlflow.pyfunc.load_model(uri)
    change_mlmodel(files, rank=99, model_id=None)
    with pytest.raises(AdapterIntegrityError, match="the MLmodel file"):
        mlflow.pyfunc.load_model(uri)


def test_an_old_note_of_another_name_does_not_count_when_a_call_names_the_model(store, served):
    name, model_id, files = served
    mlflow.register_model(f"models:/{model_id}", f"{name}-again")
    (files / "registered_model_meta").write_text(f"model_name: {name}\nmodel_version: 1\n")
    assert mlflow.pyfunc.load_model(f"models:/{name}-again/1").get_raw_model().origin.name == f"{name}-again"


def test_a_directory_without_a_note_is_checked_against_its_logged_model_and_the_missing_name_is_reported(
    served, tmp_path, caplog
):
    directory = downloaded(served, tmp_path)
    for load in (mlflow.pyfunc.load_model, flavor._load_pyfunc):
        caplog.clear()
        load(str(directory))
        assert "the registered name was not checked" in caplog.text
        assert f"tags of models:/{served[1]}." in caplog.text
    change_mlmodel(directory, rank=99)
    for load in (mlflow.pyfunc.load_model, flavor._load_pyfunc):
        with pytest.raises(AdapterIntegrityError, match="the MLmodel file"):
            load(str(directory))


def test_a_directory_whose_logged_model_the_store_does_not_have_is_reported(store, served, tmp_path, caplog):
    directory = downloaded(served, tmp_path)
    change_mlmodel(directory, model_id=f"m-{'0' * 32}")
    assert flavor._load_pyfunc(str(directory)).adapter.origin.model_id is None
    assert f"the tags of {directory} are not checked" in caplog.text


def test_no_database_is_created_to_look_for_tags(served, tmp_path, monkeypatch, caplog):
    directory = downloaded(served, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    try:
        flavor._load_pyfunc(str(directory))
    finally:
        mlflow.set_tracking_uri(before)
    assert "are not checked: there is no store sqlite:///mlflow.db" in caplog.text
    assert not (tmp_path / "mlflow.db").exists()


def test_a_model_of_a_run_has_no_name_to_check(world, store, caplog):
    with mlflow.start_run() as run:
        info = flavor.log_adapter(world.adapter, world.load_base(), name="made")
    loaded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/made").get_raw_model()
    assert (loaded.origin.model_id, loaded.origin.name) == (info.model_id, None)
    assert "registered name" not in caplog.text


def test_an_unknown_model_config_is_refused(world):
    with pytest.raises(ConfigError, match="model_config: not known: temperature"):
        flavor._load_pyfunc(str(world.saved), {"temperature": 1})
