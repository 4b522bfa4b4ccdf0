"""Through `mlflow.pyfunc`, as servers and evaluators come."""

from __future__ import annotations

import logging
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from helpers.tiny import make_base
from helpers.turns import count_together, in_threads

import rankwise.flavor as flavor
from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError
from rankwise.flavor import pyfunc

FEW = {"max_new_tokens": 4}


@pytest.fixture
def _settings(world, monkeypatch):
    monkeypatch.setenv("RANKWISE_HOME", str(world.settings.home))
    monkeypatch.setenv("RANKWISE_CACHE", str(world.settings.cache))


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


def test_threads_take_turns_each_with_its_own_parameters(model, monkeypatch):
    lengths = (3, 9)
    expected = {length: model.predict("carat 0.23", params={"max_new_tokens": length}) for length in lengths}
    together = count_together(monkeypatch, pyfunc, "generate_batch")
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


def test_the_stored_example_is_one_that_the_model_answers(model):
    assert model.input_example is not None
    assert len(model.predict(model.input_example, params=FEW)) == 1


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


def test_an_unknown_model_config_is_refused(world):
    with pytest.raises(ConfigError, match="model_config: not known: temperature"):
        flavor._load_pyfunc(str(world.saved), {"temperature": 1})
