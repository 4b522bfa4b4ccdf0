"""Adapters of other programs, registered."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.bases import inject, logits
from helpers.mlflow_models import save_with_mlflow
from helpers.tiny import make_base
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import rankwise.flavor as flavor
from rankwise.exceptions import AdapterIntegrityError, AssetError, BaseMismatchError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.imports import import_adapter
from rankwise.modeling.adapter import WEIGHTS_NAME, save_adapter


def codes(done):
    return [finding.code for finding in done.findings]


def test_a_peft_directory_is_registered_and_computes_what_it_did(world, store):
    done = import_adapter(world.adapter, "adopted", base_model=world.base_path, alias="first", settings=world.settings)
    assert (done.uri, done.kind, done.quantization_from) == ("models:/adopted/1", "peft", "assumed")
    assert codes(done) == ["base_not_proven", "quantization_assumed"]
    loaded = flavor.load_model("models:/adopted@first", settings=world.settings)
    assert torch.equal(logits(loaded.model), world.logits)
    assert loaded.overrides == ()
    version = store.get_model_version("adopted", "1")
    assert version.tags["rankwise.import.from"] == str(world.adapter)
    assert version.tags["rankwise.import.quantization"] == "assumed"
    assert "assumed is: 4 bit nf4 with double quantization" in version.description
    again = import_adapter(
        world.adapter, "adopted", quantization=QuantizationSpec(load_in_4bit=False), settings=world.settings
    )
    assert (again.uri, again.quantization_from) == ("models:/adopted/2", "given")
    assert store.get_model_version("adopted", "2").tags["base.quantization"] == "none"


@pytest.mark.parametrize("in_4bit", [True, False])
def test_a_model_whose_base_mlflow_spoilt_is_adopted_over_the_right_base(world, store, tmp_path, in_4bit):
    from peft import PeftModel

    source = save_with_mlflow(world.base_path, tmp_path / "m", in_4bit=in_4bit)
    done = import_adapter(source, "rescued", settings=world.settings)
    assert codes(done) == ["base_reinitialised", "base_compared"]
    assert done.quantization_from == "recorded"
    loaded = flavor.load_model(done.uri, settings=world.settings)
    assert loaded.metadata.base.quantization.load_in_4bit == in_4bit
    wanted = PeftModel.from_pretrained(world.load_base(load_in_4bit=in_4bit).model, source / "peft")
    assert torch.equal(logits(loaded.model), logits(wanted.eval()))
    other = make_base(tmp_path / "other", seed=8)
    with pytest.raises(BaseMismatchError, match="the copy of the base that was saved with it differs in"):
        import_adapter(source, "rescued", base_model=other, settings=world.settings)


def test_files_among_a_run_s_artifacts_and_logged_models_are_found_by_their_uris(world, store, tmp_path):
    run = store.create_run("0").info.run_id
    store.log_artifacts(run, str(world.adapter), "out/adapter")
    done = import_adapter(f"runs:/{run}/out/adapter", "of-a-run", settings=world.settings)
    assert done.uri == "models:/of-a-run/1"
    assert store.get_model_version("of-a-run", "1").tags["rankwise.import.run"] == run
    with pytest.raises(AssetError, match="has no output model 'nothing'"):
        import_adapter(f"runs:/{run}/nothing", "of-a-run", settings=world.settings)


def test_rows_that_an_adapter_brings_are_adopted_too(world, store, tmp_path):
    base = world.load_base()
    base.model.resize_token_embeddings(322, mean_resizing=False)
    inject(base.model, "x", trainable_token_indices={"embed_tokens": [320, 321], "lm_head": [320, 321]})
    save_adapter(base.model, "x", tmp_path / "a", base_source=base.source, base_revision=None)
    done = import_adapter(tmp_path / "a", "rows", settings=world.settings)
    loaded = flavor.load_model(done.uri, settings=world.settings)
    assert torch.equal(logits(loaded.model), logits(base.model))


def test_the_adapter_s_own_tokenizer_is_kept_and_a_base_of_another_name_is_told(world, store, tmp_path):
    directory = shutil.copytree(world.adapter, tmp_path / "a")
    tokenizer = world.load_base().tokenizer
    tokenizer.chat_template = "{{ messages[0]['content'] }}?"
    tokenizer.save_pretrained(directory)
    copy = shutil.copytree(world.base_path, tmp_path / "copy")
    done = import_adapter(directory, "own", base_model=copy, quantization=QuantizationSpec(), settings=world.settings)
    assert codes(done) == ["another_base_named", "base_not_proven"]
    loaded = flavor.load_model(done.uri, settings=world.settings)
    assert loaded.tokenizer.chat_template == "{{ messages[0]['content'] }}?"


def test_an_adapter_that_was_never_trained_is_told(world, store, tmp_path):
    directory = shutil.copytree(world.adapter, tmp_path / "a")
    tensors = load_file(directory / WEIGHTS_NAME)
    save_file({k: v * (0 if "lora_B" in k else 1) for k, v in tensors.items()}, directory / WEIGHTS_NAME)
    done = import_adapter(directory, "untrained", settings=world.settings)
    assert codes(done)[-1] == "untrained"


def test_what_cannot_be_used_is_refused_before_anything_is_registered(world, store, tmp_path):
    def refused(error, message, change=lambda directory: None, **arguments):
        directory = shutil.copytree(world.adapter, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        change(directory)
        with pytest.raises(error, match=message):
            import_adapter(directory, arguments.pop("name", "refused"), settings=world.settings, **arguments)

    def spoil(directory):
        tensors = load_file(directory / WEIGHTS_NAME)
        save_file({name: tensor * float("inf") for name, tensor in tensors.items()}, directory / WEIGHTS_NAME)

    def forget(directory):
        path = directory / "adapter_config.json"
        path.write_text(path.read_text().replace(f'"{world.base_path}"', "null"))

    def name_a_hub(directory):
        path = directory / "adapter_config.json"
        text = path.read_text().replace(f'"{world.base_path}"', '"org/tiny"')
        path.write_text(text.replace(f'"{world.load_base().revision}"', "null"))

    refused(ConfigError, "name: a registered model's name has no '/'", name="a/b")
    refused(AdapterIntegrityError, "logits over its base are not finite", spoil)
    refused(ConfigError, "does not record its base; name it: --base", forget)
    refused(ConfigError, "the commit of org/tiny that the adapter was trained on is not known. Give it", name_a_hub)
    refused(AssetError, "/no/such/base does not exist", base_model="/no/such/base")
    refused(BaseMismatchError, "does not fit GPTNeoX", base_model=make_base(tmp_path / "neox", "gpt_neox"))
    assert not store.search_registered_models("name = 'refused'")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_head_or_embedding_is_loaded_as_peft_loads_it_and_the_base_s_copy_left_out(
    world, store, tmp_path, target
):
    from peft import PeftModel, get_peft_model

    plain = QuantizationSpec(load_in_4bit=False)
    model = get_peft_model(
        world.load_base(load_in_4bit=False).model, LoraConfig(r=4, target_modules=["q_proj", target])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "a")
    assert any(name.endswith("base_layer.weight") for name in load_file(tmp_path / "a" / WEIGHTS_NAME))
    done = import_adapter(
        tmp_path / "a", "heads", base_model=world.base_path, quantization=plain, settings=world.settings
    )
    assert codes(done)[-1] == "base_copies_dropped"
    assert target in done.findings[-1].text
    loaded = flavor.load_model(done.uri, settings=world.settings)
    wanted = PeftModel.from_pretrained(world.load_base(load_in_4bit=False).model, tmp_path / "a")
    assert torch.equal(logits(loaded.model), logits(wanted.eval()))
    stored = flavor.download_adapter(done.uri, tmp_path / "pulled")
    assert not any("base_layer" in name for name in load_file(stored / WEIGHTS_NAME))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_head_that_was_trained_itself_is_refused_with_that_reason(world, store, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(world.load_base(load_in_4bit=False).model, LoraConfig(r=4, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    tensors["base_model.model.lm_head.base_layer.weight"][3] += 1
    save_file(tensors, tmp_path / "a" / WEIGHTS_NAME)
    with pytest.raises(BaseMismatchError, match=r"its own copy of lm_head\.weight, shape .* which is not the base's"):
        import_adapter(tmp_path / "a", "heads", base_model=world.base_path, settings=world.settings)


def test_what_rankwise_pulled_is_imported_with_its_proof(world, store, tmp_path):
    pulled = flavor.download_adapter(world.saved, tmp_path / "pulled")
    done = import_adapter(pulled, "returned", base_model=world.base_path, settings=world.settings)
    assert codes(done) == ["base_compared"]
    assert done.quantization_from == "recorded"
    loaded = flavor.load_model(done.uri, settings=world.settings)
    assert torch.equal(logits(loaded.model), world.logits)
    other = make_base(tmp_path / "other", seed=9)
    with pytest.raises(BaseMismatchError, match=r"is not the one that the adapter was trained on: weights: sha256"):
        import_adapter(pulled, "returned", base_model=other, settings=world.settings)
    changed = shutil.copytree(pulled, tmp_path / "changed")
    (changed / "rankwise.json").write_text((changed / "rankwise.json").read_text().replace("nf4", "fp4"))
    with pytest.raises(AdapterIntegrityError, match=r"rankwise\.json"):
        import_adapter(changed, "returned", base_model=world.base_path, settings=world.settings)
