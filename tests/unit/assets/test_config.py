import pytest
from helpers.bases import settings_in
from helpers.gguf_file import make_gguf

from rankwise.assets.base import find_config
from rankwise.exceptions import AssetError


def test_a_configuration_is_named_by_itself_or_by_its_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (tmp_path, tmp_path / "config.json"):
        assert find_config(str(name), settings_in(tmp_path)) == tmp_path / "config.json"


def test_of_a_gguf_it_is_that_of_what_it_becomes(tmp_path):
    path = find_config(str(make_gguf(tmp_path / "tiny.gguf")), settings_in(tmp_path))
    assert path.parent.name.startswith("gguf-")
    assert path.is_file()


def test_what_is_nowhere_is_an_error(tmp_path):
    with pytest.raises(AssetError, match="there is no"):
        find_config(str(tmp_path / "nothing"), settings_in(tmp_path))
