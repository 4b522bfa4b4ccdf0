from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.bases import logits
from helpers.turns import in_threads

from rankwise.exceptions import AdapterIntegrityError, StorageError
from rankwise.flavor import download_adapter
from rankwise.flavor.package import placed
from rankwise.modeling.fingerprint import check_manifest, write_manifest


def test_a_download_is_a_plain_peft_directory_at_the_root_of_a_new_directory(world, tmp_path):
    from peft import PeftModel

    target = download_adapter(world.saved, tmp_path / "new" / "parents" / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in target.iterdir()
    }
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.base_path)
    assert config["revision"].startswith("sha256:")
    model = PeftModel.from_pretrained(world.load_base().model, target)
    assert torch.equal(logits(model), world.logits)


def test_peft_finds_the_base_by_what_the_directory_says(world, tmp_path):
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(download_adapter(world.saved, tmp_path / "adapter"))
    assert model.get_base_model().name_or_path == str(world.base_path)


def test_an_earlier_download_is_replaced_and_anything_else_is_not(world, tmp_path):
    target = download_adapter(world.saved, tmp_path / "adapter")
    assert download_adapter(world.saved, target) == target
    (target / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="not empty, and not an unchanged output of rankwise"):
        download_adapter(world.saved, target)
    assert (target / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    check_manifest(download_adapter(world.saved, tmp_path / "empty"))


def test_a_link_stands_for_the_directory_that_it_points_to(world, tmp_path):
    target = download_adapter(world.saved, tmp_path / "adapter")
    (target / "README.md").unlink()
    write_manifest(target)
    (tmp_path / "link").symlink_to(target)
    assert download_adapter(world.saved, tmp_path / "link") == tmp_path / "link"
    assert (target / "README.md").is_file()
    assert (tmp_path / "link").is_symlink()


def test_several_may_fill_one_directory_at_a_time(tmp_path):
    def fill(content):
        for _ in range(15):
            with placed(tmp_path / "adapter", "filling") as temporary:
                (temporary / "file").write_text(content)
        return True

    assert in_threads(fill, ["a", "b", "c"]) == dict.fromkeys("abc", True)
    check_manifest(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_mount_point_is_refused_with_the_way_out(world):
    with pytest.raises(StorageError, match=r"/proc is a mount point, .* name a directory in it$"):
        download_adapter(world.saved, Path("/proc"))


def test_a_spoilt_model_leaves_nothing_behind(world, tmp_path):
    copy = world.copy(tmp_path / "model")
    (copy / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterIntegrityError):
        download_adapter(copy, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
