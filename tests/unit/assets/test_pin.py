import pytest

from rankwise.assets.guard import check_digest, read_source
from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.source import HubSource, LocalSource, PypiSource

ONE, TWO = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


def test_a_wrong_digest_names_both_and_the_ways_out():
    source = PypiSource("rows", "1.0", "rows/rows.csv")
    with pytest.raises(AssetError) as caught:
        check_digest(source, expected=ONE, actual=TWO, key="train_revision", hint="fetch it again")
    assert str(caught.value) == (
        f"wrong digest of pypi:rows==1.0#rows/rows.csv:\n  expected {ONE}\n  found    {TWO}\n"
        f"If what is there now is what you want, write `train_revision: {TWO}`; otherwise fetch it again."
    )
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("expected", [None, ONE])
def test_a_right_digest_or_none_passes(expected):
    check_digest(LocalSource("./x"), expected=expected, actual=ONE, key="k", hint="h")


@pytest.mark.parametrize(
    ("text", "revision", "kind"),
    [
        ("org/name", None, HubSource),
        ("org/name", "main", HubSource),
        ("org/name", "a" * 40, HubSource),
        ("./dir", ONE, LocalSource),
        ("pypi:a==1#b.csv", ONE, PypiSource),
    ],
)
def test_a_source_and_its_revision_are_read(text, revision, kind):
    assert isinstance(read_source(text, revision, key="base_model_revision"), kind)


@pytest.mark.parametrize(
    ("text", "revision", "message"),
    [
        ("org/name/more", None, "^base_model: must be org/name"),
        ("org/name", ONE, "^base_model_revision: must be a commit"),
        ("./dir", "main", "^base_model_revision: must be 'sha256:'"),
        ("./dir", "1" * 64, "did you mean 'sha256:1111"),
    ],
)
def test_a_wrong_form_is_a_configuration_error(text, revision, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_source(text, revision, key="base_model_revision")
    assert caught.value.exit_code == 2
