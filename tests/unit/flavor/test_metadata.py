from __future__ import annotations

import copy

import pytest
import yaml

from rankwise.exceptions import AdapterIntegrityError, ConfigError
from rankwise.flavor.metadata import FLAVOR_NAME, AdapterMetadata, section_digest


@pytest.fixture
def mlmodel(world):
    return yaml.safe_load((world.saved / "MLmodel").read_text())


def test_a_section_read_and_written_again_is_the_same(mlmodel):
    section = mlmodel["flavors"][FLAVOR_NAME]
    assert AdapterMetadata.from_section(section, "here").to_section() == section


def test_the_section_says_what_the_adapter_was_trained_over(mlmodel, world):
    section = mlmodel["flavors"][FLAVOR_NAME]
    assert section["base"]["source"] == str(world.base_path)
    assert section["base"]["revision"].startswith("sha256:")
    assert set(section["base"]["fingerprint"]) == {"weights", "config", "tokenizer", "chat_template", "digest"}
    assert section["base"]["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert section["base"]["compute_dtype"] == section["base"]["module_dtype"]
    assert section["adapter"]["lora"]["r"] == 4
    assert section["adapter"]["parameters"] == 1792
    assert section["tokenizer"]["files"] == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert {"rankwise", "torch", "peft", "transformers", "bitsandbytes", "mlflow"} <= set(section["versions"])


def test_a_section_of_a_newer_release_asks_for_an_upgrade(mlmodel):
    section = copy.deepcopy(mlmodel["flavors"][FLAVOR_NAME])
    section["format_version"] = 99
    with pytest.raises(ConfigError, match=r"format 99 .* reads up to 2: install rankwise"):
        AdapterMetadata.from_section(section, "models:/x/1")


@pytest.mark.parametrize("key", ["base", "adapter", "tokenizer", "manifest", "versions", "format_version"])
def test_a_section_without_one_of_its_parts_is_refused(mlmodel, key):
    section = copy.deepcopy(mlmodel["flavors"][FLAVOR_NAME])
    del section[key]
    with pytest.raises(AdapterIntegrityError, match="models:/x/1 is not what was stored"):
        AdapterMetadata.from_section(section, "models:/x/1")


def test_the_section_s_digest_covers_what_decides_loading_and_not_the_ids(mlmodel):
    digest = section_digest(mlmodel)
    assert section_digest({**mlmodel, "model_id": "m-other", "utc_time_created": "never"}) == digest
    for change in (
        lambda m: m["flavors"]["python_function"].update(loader_module="os"),
        lambda m: m["flavors"][FLAVOR_NAME]["base"].update(source="elsewhere"),
        lambda m: m.update(signature=None),
    ):
        other = copy.deepcopy(mlmodel)
        change(other)
        assert section_digest(other) != digest
