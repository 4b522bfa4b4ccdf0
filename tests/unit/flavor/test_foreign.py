"""What other programs' directories say of a base, and what is wrong with it."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from helpers.mlflow_models import save_with_mlflow
from helpers.tiny import make_base
from safetensors.torch import save_file

from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.foreign import compare_saved_base, read_foreign
from rankwise.modeling.adapter import WEIGHTS_NAME


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Models as mlflow.transformers saves them: with a base from a local path, and with `base_model_path`."""
    root = tmp_path_factory.mktemp("mlflow")
    return {
        name: save_with_mlflow(world.base_path, root / name, **options)
        for name, options in {
            "plain": {"in_4bit": False},
            "4bit": {},
            "by-path": {"by_path": True},
        }.items()
    }


def codes(foreign):
    return [finding.code for finding in foreign.findings]


def test_a_peft_directory_says_its_base_and_neither_quantization_nor_commit(world):
    foreign = read_foreign(world.adapter, "x")
    assert (foreign.kind, foreign.adapter, foreign.base_model) == ("peft", world.adapter, str(world.base_path))
    assert foreign.quantization is None
    assert foreign.tokenizer is None
    assert foreign.saved_base is None
    assert codes(foreign) == []


def test_the_quantization_that_older_peft_wrote_into_the_card_is_read(world, tmp_path):
    shutil.copytree(world.adapter, tmp_path / "a")
    lines = [
        "load_in_8bit: False",
        "load_in_4bit: True",
        "bnb_4bit_quant_type: nf4",
        "bnb_4bit_use_double_quant: False",
    ]
    head = "## Training procedure\n\nThe following `bitsandbytes` quantization config was used during training:\n"
    (tmp_path / "a" / "README.md").write_text(head + "".join(f"- {line}\n" for line in lines))
    assert read_foreign(tmp_path / "a", "x").quantization == QuantizationSpec(bnb_4bit_use_double_quant=False)
    (tmp_path / "a" / "README.md").write_text(head + "- load_in_8bit: True\n- load_in_4bit: False\n")
    eight = QuantizationSpec(load_in_4bit=False, load_in_8bit=True)
    assert read_foreign(tmp_path / "a", "x").quantization == eight


@pytest.mark.parametrize("name", ["plain", "4bit"])
def test_a_base_that_mlflow_saved_with_the_adapter_s_layers_in_it_is_recognised(world, saved, name):
    foreign = read_foreign(saved[name], "x")
    assert foreign.kind == "mlflow.transformers"
    (finding,) = foreign.findings
    assert finding.code == "base_reinitialised"
    assert "4 weights that the adapter targets (q_proj, v_proj)" in finding.text
    assert foreign.quantization == (
        QuantizationSpec(bnb_4bit_compute_dtype="float32") if name == "4bit" else QuantizationSpec(load_in_4bit=False)
    )
    assert foreign.tokenizer == saved[name] / "components" / "tokenizer"
    assert foreign.base_model == str(world.base_path)


def test_mlflow_gives_such_a_model_random_weights_as_the_finding_says(world, saved):
    """The reason for the finding; should a release of MLflow mend it, this test tells."""
    import mlflow.transformers

    loaded = mlflow.transformers.load_model(str(saved["plain"]), return_type="components")["model"]
    layer = loaded.get_base_model().model.layers[0].self_attn
    base = world.load_base(load_in_4bit=False).model.model.layers[0].self_attn
    assert torch.equal(layer.k_proj.weight, base.k_proj.weight)
    assert not torch.equal(layer.q_proj.base_layer.weight, base.q_proj.weight)


def test_a_base_by_its_path_has_lost_its_quantization(saved):
    foreign = read_foreign(saved["by-path"], "x")
    assert codes(foreign) == ["quantization_lost"]
    assert "stored no quantization of the base" in foreign.findings[0].text
    assert (foreign.quantization, foreign.saved_base) == (None, None)


def test_the_revision_that_mlflow_records_for_a_hub_base_is_not_believed(saved, tmp_path):
    shutil.copytree(saved["by-path"], tmp_path / "m")
    document = yaml.safe_load((tmp_path / "m" / "MLmodel").read_text())
    flavor = document["flavors"]["transformers"]
    del flavor["local_base_model_path"]
    flavor.update(source_model_name="org/tiny", source_model_revision="c" * 40)
    (tmp_path / "m" / "MLmodel").write_text(yaml.safe_dump(document))
    foreign = read_foreign(tmp_path / "m", "x")
    assert (foreign.base_model, foreign.base_revision) == ("org/tiny", None)
    assert codes(foreign) == ["quantization_lost", "wrong_revision"]
    assert f"recorded, {'c' * 40}, is the newest commit of org/tiny at the time of saving" in foreign.findings[1].text


@pytest.mark.parametrize("name", ["plain", "4bit"])
def test_the_copy_of_a_base_tells_whether_it_is_the_named_one(world, saved, tmp_path, name):
    copy = read_foreign(saved[name], "x").saved_base
    assert compare_saved_base(copy, world.base_path, "it") == (21 if name == "plain" else 7)
    with pytest.raises(BaseMismatchError, match="base other is not the one that the adapter was trained on: the copy"):
        compare_saved_base(copy, make_base(tmp_path / "other", seed=6), "other")


@pytest.mark.parametrize("key", ["model_binary", "peft_adaptor"])
@pytest.mark.parametrize("how", ["up", "absolute", "parent", "link"])
def test_a_model_leads_to_nothing_but_what_lies_beside_it(world, saved, tmp_path, key, how):
    copy = tmp_path / "above" / "model"
    shutil.copytree(saved["plain"], copy)
    shutil.copytree(world.adapter, copy.parent, dirs_exist_ok=True)
    (copy / "a-link").symlink_to(world.base_path if key == "model_binary" else world.adapter)
    names = {"up": "../../elsewhere", "absolute": str(world.base_path), "parent": "..", "link": "a-link"}
    mlmodel = yaml.safe_load((copy / "MLmodel").read_text())
    mlmodel["flavors"]["transformers"][key] = names[how]
    (copy / "MLmodel").write_text(yaml.safe_dump(mlmodel))
    with pytest.raises(AdapterIntegrityError, match="which is no file or directory beside it"):
        read_foreign(copy, "x")


def test_weights_in_a_pickle_are_refused_with_the_way_out_and_a_trainer_s_state_is_left_out(world, tmp_path):
    directory = shutil.copytree(world.adapter, tmp_path / "a")
    (directory / "optimizer.pt").write_bytes(b"x")
    (directory / "training_args.bin").write_bytes(b"x")
    (finding,) = read_foreign(directory, "x").findings
    assert (finding.code, finding.text.rpartition(": ")[2]) == ("left_out", "optimizer.pt, training_args.bin")
    torch.save({"base_model.x": torch.ones(2, 2).T}, directory / "adapter_model.bin")
    (directory / WEIGHTS_NAME).unlink()
    with pytest.raises(
        AdapterIntegrityError, match=r"weights in adapter_model\.bin: a pickle, which can run code"
    ) as e:
        read_foreign(directory, "x")
    # The way out that the message gives works.

    script = str(e.value).rpartition("python -c ")[2].strip().strip('"')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        exec(script, {})
    assert (directory / WEIGHTS_NAME).is_file()


def test_what_is_neither_is_named_so(world, saved, tmp_path):
    with pytest.raises(ConfigError, match=r"it is neither a PEFT directory .* nor a model of mlflow"):
        read_foreign(tmp_path, "it")
    shutil.copytree(world.adapter, tmp_path / "checkpoint-7")
    with pytest.raises(ConfigError, match="checkpoint-7 in it has one: name that"):
        read_foreign(tmp_path, "it")
    with pytest.raises(ConfigError, match=r"of the flavor qlora already: load it as it is"):
        read_foreign(world.saved, "it")
    for flavors, message in (
        ({"sklearn": {}}, r"not a model of mlflow.transformers; it has the flavors \['sklearn'\]"),
        ({"transformers": {"source_model_name": "x"}}, "a whole model without an adapter"),
        ({"transformers": {"peft_adaptor": "../peft"}}, "no file or directory beside it"),
    ):
        (tmp_path / "MLmodel").write_text(yaml.safe_dump({"flavors": flavors}))
        error = AdapterIntegrityError if "beside" in message else ConfigError
        with pytest.raises(error, match=message):
            read_foreign(tmp_path, "it")


def test_a_copy_in_another_dtype_or_with_more_rows_is_the_same_base(tmp_path):
    base, copy = tmp_path / "base", tmp_path / "copy"
    weight = torch.randn(4, 3)
    for path, tensors in (
        (base, {"a.weight": weight}),
        (copy, {"a.base_layer.weight": torch.cat([weight, weight]).bfloat16().float(), "a.lora_A.x.weight": weight}),
    ):
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
    assert compare_saved_base(copy, base, "x") == 1
