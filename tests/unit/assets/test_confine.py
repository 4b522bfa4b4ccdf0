from __future__ import annotations

import pytest

from rankwise.assets.base import find_config, resolve_base
from rankwise.assets.dataset import resolve_data
from rankwise.assets.input_checks import confine, refuse_external_files
from rankwise.exceptions import AssetError, ConfigError
from rankwise.settings import Settings


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "rows.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "secret.jsonl").write_text('{"a": "secret"}\n')
    return tmp_path / "root"


@pytest.fixture
def settings(root):
    return Settings.load({"RANKWISE_DATA_ROOT": str(root), "RANKWISE_CACHE": str(root.parent / "cache")})


def test_files_below_the_root_are_read_and_without_a_root_all(root, settings):
    assert resolve_data(str(root / "rows.jsonl"), None, settings).path == root / "rows.jsonl"
    free = Settings.load({"RANKWISE_CACHE": str(root.parent / "cache")})
    assert resolve_data(str(root.parent / "secret.jsonl"), None, free).path == root.parent / "secret.jsonl"


def test_files_outside_are_refused_however_they_are_named(root, settings):
    (root / "link.jsonl").symlink_to(root.parent / "secret.jsonl")
    (root / "up").symlink_to(root.parent)
    names = [root.parent / "secret.jsonl", root / ".." / "secret.jsonl", root / "link.jsonl", root / "up/secret.jsonl"]
    for name in names:
        with pytest.raises(ConfigError, match=r"dataset: .* is outside of RANKWISE_DATA_ROOT"):
            resolve_data(str(name), None, settings)


def test_several_roots_are_separated_as_in_path(root):
    (root.parent / "other").mkdir()
    several = Settings.load({"RANKWISE_DATA_ROOT": f"{root}:{root.parent / 'other'}"})
    for path in (root / "rows.jsonl", root.parent / "other" / "out.jsonl"):
        assert confine(path, several, "OUTPUT") == path
    with pytest.raises(ConfigError, match=r"outside of RANKWISE_DATA_ROOT .*/root:.*/other,"):
        confine(root.parent / "secret.jsonl", several, "INPUT")


def test_a_root_that_only_begins_alike_is_another_directory(root, settings):
    (root.parent / "root-other").mkdir()
    with pytest.raises(ConfigError, match="outside of RANKWISE_DATA_ROOT"):
        confine(root.parent / "root-other", settings, "base_model")


def test_a_directory_is_looked_through(root, settings):
    data = root / "data" / "deep"
    data.mkdir(parents=True)
    (data / "rows.jsonl").symlink_to(root.parent / "secret.jsonl")
    with pytest.raises(ConfigError, match=r"data/deep/rows\.jsonl \(it is .*secret\.jsonl\) is outside"):
        resolve_data(str(root / "data"), None, settings)
    with pytest.raises(ConfigError, match=r"base_model: .* is outside"):
        resolve_base(str(root / "data"), None, settings)


def test_bases_and_their_configurations_are_confined_and_the_operators_own_are_allowed(root, settings):
    outside = root.parent / "bases" / "tiny"
    outside.mkdir(parents=True)
    (outside / "config.json").write_text("{}")
    for name in (outside, outside / "config.json"):
        with pytest.raises(ConfigError, match=r"base_model: .* is outside"):
            find_config(str(name), settings)
    listed = Settings.load({"RANKWISE_DATA_ROOT": str(root), "RANKWISE_BASES": str(outside.parent)})
    assert find_config(str(outside), listed) == outside / "config.json"


@pytest.mark.parametrize(
    "name", ["../secret.jsonl", "/etc/passwd", "https://host.example/x.csv", "a/../../secret.jsonl"]
)
def test_a_directorys_card_cannot_lead_elsewhere(root, settings, name):
    # `datasets` would read them: it was tried.
    (root / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {name}\n---\n# Data\n"
    )
    for each in (settings, Settings.load({"RANKWISE_CACHE": str(root.parent / "cache")})):
        with pytest.raises(AssetError, match="names data outside of its directory"):
            resolve_data(str(root), None, each)


def test_an_ordinary_card_is_none_of_this(root):
    head = "license: mit\nhomepage: https://host.example/\nconfigs:\n- data_files: rows.jsonl\n"
    (root / "README.md").write_text(f"---\n{head}---\nSee /etc and ../x\n")
    refuse_external_files(root)
    (root / "README.md").write_text("# No head\n")
    refuse_external_files(root)


def test_what_datasets_does_with_such_a_card_is_why(root, tmp_path):
    import datasets

    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../secret.jsonl\n---\n"
    )
    datasets.disable_progress_bars()
    rows = datasets.load_dataset(str(root), split="train", cache_dir=str(tmp_path / "datasets"))
    assert rows["a"][:] == ["secret"]
