from __future__ import annotations

import json
import logging
import shutil

import mlflow
import pytest
from click.testing import CliRunner
from helpers.flavored import make_world

import rankwise.flavor as flavor
from rankwise.cli.inspect import inspect
from rankwise.cli.registry import keys
from rankwise.exceptions import AdapterIntegrityError, ConfigError
from rankwise.flavor.fetch import fetch
from rankwise.flavor.signing import NAME_TAG, SIGNATURE_NAME, SIGNATURE_TAG, Statement, new_pair
from rankwise.flavor.store import sign_version


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world with an unsigned adapter as version 1, one that `team` has signed as 2, and one of `stranger` as 3."""
    world = make_world(tmp_path_factory.mktemp("signing"))
    patch = pytest.MonkeyPatch()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    base = world.load_base()
    for name in (None, "team", "stranger"):
        if name is not None:
            private, _, _ = new_pair(world.root / name, name)
            patch.setenv("RANKWISE_SIGNING_KEY", str(private))
        flavor.log_adapter(world.adapter, base, registered_model_name="signed")
    patch.undo()
    mlflow.set_tracking_uri(before)
    return world


@pytest.fixture(autouse=True)
def _home(world, monkeypatch):
    world.enter(monkeypatch)


@pytest.fixture
def trusting(world, monkeypatch):
    monkeypatch.setenv("RANKWISE_TRUSTED_KEYS", str(world.root / "team"))


def signer(world, version):
    with fetch(f"models:/signed/{version}", world.settings.tracking_uri) as fetched:
        return fetched.signer


def test_without_trusted_keys_everything_loads_and_the_signer_is_known(world):
    assert signer(world, 1) is None
    assert signer(world, 2).name is None
    assert signer(world, 2).key != signer(world, 3).key


def test_the_signature_is_a_file_and_a_tag_of_model_and_version(world):
    client = mlflow.MlflowClient(tracking_uri=world.settings.tracking_uri)
    version = client.get_model_version("signed", "2")
    with fetch("models:/signed/2", world.settings.tracking_uri) as fetched:
        document = json.loads((fetched.directory / SIGNATURE_NAME).read_bytes())
        model_id = fetched.origin.model_id
    tag = f"{document['key']} {document['signature']}"
    assert version.tags[SIGNATURE_TAG] == tag
    assert client.get_logged_model(model_id).tags[SIGNATURE_TAG] == tag
    assert SIGNATURE_TAG not in client.get_model_version("signed", "1").tags


def test_with_trusted_keys_only_what_they_have_signed_loads(world, trusting, tmp_path):
    assert signer(world, 2).name == "team"
    ways = [
        lambda uri: flavor.load_model(uri, settings=world.settings, tracking_uri=world.settings.tracking_uri),
        lambda uri: flavor.download_adapter(uri, tmp_path / "x", tracking_uri=world.settings.tracking_uri),
        lambda uri: mlflow.pyfunc.load_model(uri),
    ]
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    for way in ways:
        way("models:/signed/2")
        with pytest.raises(
            AdapterIntegrityError, match=r"is not signed, and RANKWISE_TRUSTED_KEYS requires .* of team"
        ):
            way("models:/signed/1")
        with pytest.raises(AdapterIntegrityError, match=r"which is none of RANKWISE_TRUSTED_KEYS \(team\)"):
            way("models:/signed/3")


@pytest.fixture
def client(world):
    return mlflow.MlflowClient(tracking_uri=world.settings.tracking_uri)


def put_in_place_of(client, name, how):
    """Make what `team` has signed for the model `signed` a version of another one, as whoever may write can."""
    if how == "copied":
        return client.copy_model_version("models:/signed/2", name)
    client.create_registered_model(name)
    source = client.get_model_version("signed", "2").source
    if how == "by its files":
        source = client.get_logged_model(source.removeprefix("models:/")).artifact_location
    return client.create_model_version(name, source)


@pytest.mark.parametrize("how", ["copied", "registered", "by its files"])
def test_under_another_name_a_signature_does_not_count_until_it_is_signed_for_that(
    world, client, how, monkeypatch, tmp_path
):
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    name = f"champion-{how.replace(' ', '-')}"
    put_in_place_of(client, name, how)
    ways = [
        lambda: flavor.read_metadata(f"models:/{name}/1", tracking_uri=world.settings.tracking_uri),
        lambda: mlflow.pyfunc.load_model(f"models:/{name}/1"),
    ]
    for way in ways:
        way()
    monkeypatch.setenv("RANKWISE_TRUSTED_KEYS", str(world.root / "team"))
    for way in ways:
        with pytest.raises(
            AdapterIntegrityError,
            match=f"was signed for the registered model signed, and is a version of {name} here",
        ):
            way()
    monkeypatch.setenv("RANKWISE_SIGNING_KEY", str(world.root / "team" / "team.key"))
    done = CliRunner().invoke(keys, ["sign", f"models:/{name}/1"], catch_exceptions=False)
    assert done.stdout == f"models:/{name}/1\n"
    for way in ways:
        way()
    # The new signature is for that name, whoever carries it on.
    client.copy_model_version(f"models:/{name}/1", f"{name}-2")
    with (
        pytest.raises(AdapterIntegrityError, match=f"registered model signed and {name}, and is a version of {name}-2"),
        fetch(f"models:/{name}-2/1", world.settings.tracking_uri),
    ):
        pass


def test_what_nobody_or_a_stranger_has_signed_counts_once_it_is_signed(world, client, trusting, monkeypatch):
    monkeypatch.setenv("RANKWISE_SIGNING_KEY", str(world.root / "team" / "team.key"))
    for number in (1, 3):
        copy = client.copy_model_version(f"models:/signed/{number}", "taken-over")
        uri = f"models:/taken-over/{copy.version}"
        sign_version(uri, world.settings.tracking_uri)
        with fetch(uri, world.settings.tracking_uri) as fetched:
            assert (fetched.signer.name, fetched.signer.model) == ("team", "taken-over")
    monkeypatch.delenv("RANKWISE_TRUSTED_KEYS")
    client.set_model_version_tag("taken-over", "1", NAME_TAG, "{}")
    with (
        pytest.raises(AdapterIntegrityError, match=f"in its tag {NAME_TAG}, cannot be read"),
        fetch("models:/taken-over/1", world.settings.tracking_uri),
    ):
        pass


def test_only_versions_are_signed_for_a_name_and_only_with_a_key(world, monkeypatch):
    with pytest.raises(ConfigError, match="RANKWISE_SIGNING_KEY names no key to sign with"):
        sign_version("models:/signed/1", world.settings.tracking_uri)
    with pytest.raises(ConfigError, match="a version of a registered model is signed for its name"):
        sign_version(str(world.saved), world.settings.tracking_uri)


def test_what_was_signed_without_a_name_is_what_the_first_release_signed_and_counts_under_every_name(
    world, client, trusting, monkeypatch
):
    monkeypatch.setenv("RANKWISE_SIGNING_KEY", str(world.root / "team" / "team.key"))
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    info = flavor.log_adapter(world.adapter, world.load_base(), tracking_uri=world.settings.tracking_uri)
    for name in ("any", "every"):
        mlflow.register_model(f"models:/{info.model_id}", name)
        with fetch(f"models:/{name}/1", world.settings.tracking_uri) as fetched:
            assert (fetched.signer.name, fetched.signer.model) == ("team", None)
            document = json.loads((fetched.directory / SIGNATURE_NAME).read_bytes())
    assert (document["version"], set(document["statement"])) == (1, {"manifest", "section", "base"})
    assert Statement(manifest="m", section="s", base="b").message() == (
        b'{"base":"b","format":"rankwise-signature","manifest":"m","section":"s","version":1}'
    )


@pytest.fixture
def copy(world, tmp_path):
    """A signed model as a directory, without tags."""
    with fetch("models:/signed/2", world.settings.tracking_uri) as fetched:
        return shutil.copytree(fetched.directory, tmp_path / "copy")


def edit(directory, **changes):
    path = directory / SIGNATURE_NAME
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def test_a_signature_does_not_fit_other_content(world, copy, tmp_path):
    shutil.copyfile(copy / SIGNATURE_NAME, tmp_path / "signature.json")
    unsigned = world.copy(tmp_path / "other")
    text = (unsigned / "MLmodel").read_text()
    (unsigned / "MLmodel").write_text(text.replace("lora_alpha: 8", "lora_alpha: 800"))
    assert "lora_alpha: 800" in (unsigned / "MLmodel").read_text()
    shutil.copyfile(copy / SIGNATURE_NAME, unsigned / SIGNATURE_NAME)
    with pytest.raises(AdapterIntegrityError, match="does not fit its content"), fetch(unsigned):
        pass


def test_a_changed_section_breaks_the_signature_of_a_directory(copy):
    text = (copy / "MLmodel").read_text()
    (copy / "MLmodel").write_text(text.replace("compute_dtype: ", "compute_dtype: x"))
    with pytest.raises(AdapterIntegrityError), fetch(copy):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"signature": "AAAA"},
        {"key": "sha256:0"},
        {"public_key": "no"},
        {"version": 1},
        {"format": "another"},
        {"signature": None},
        {"statement": {"name": "other"}},
        {"statement": {}},
        {"statement": []},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_signature_that_was_changed_is_refused_with_and_without_trusted_keys(copy, changes):
    edit(copy, **changes)
    with pytest.raises(AdapterIntegrityError, match="signature of"), fetch(copy):
        pass


def test_a_signature_that_was_taken_away_is_missed(world, trusting, copy, monkeypatch):
    (copy / SIGNATURE_NAME).unlink()
    with pytest.raises(AdapterIntegrityError, match="is not signed"), fetch(copy):
        pass
    monkeypatch.delenv("RANKWISE_TRUSTED_KEYS")
    with fetch("models:/signed/2", world.settings.tracking_uri) as fetched:
        file = fetched.directory / SIGNATURE_NAME
    content = file.read_bytes()
    file.unlink()
    try:
        with pytest.raises(AdapterIntegrityError, match=f"was signed, according to its tag {SIGNATURE_TAG}"):
            signer(world, 2)
    finally:
        file.write_bytes(content)


def test_a_key_that_cannot_be_used_fails_the_logging(world, monkeypatch, tmp_path):
    monkeypatch.setenv("RANKWISE_SIGNING_KEY", str(tmp_path / "none.key"))
    with pytest.raises(ConfigError, match=r"RANKWISE_SIGNING_KEY: .* cannot be read"):
        flavor.log_adapter(world.adapter, world.load_base(), tracking_uri=world.settings.tracking_uri)


def test_the_private_key_is_in_no_file_no_tag_and_no_log(world, monkeypatch, caplog, tmp_path):
    private, _, _ = new_pair(tmp_path, "quiet")
    lines = [line for line in private.read_text().splitlines() if "-----" not in line]
    monkeypatch.setenv("RANKWISE_SIGNING_KEY", str(private))
    with caplog.at_level(logging.DEBUG):
        flavor.log_adapter(
            world.adapter, world.load_base(), registered_model_name="quiet", tracking_uri=world.settings.tracking_uri
        )
    client = mlflow.MlflowClient(tracking_uri=world.settings.tracking_uri)
    with fetch("models:/quiet/1", world.settings.tracking_uri) as fetched:
        stored = b"".join(path.read_bytes() for path in fetched.directory.rglob("*") if path.is_file())
    texts = [caplog.text, str(client.get_model_version("quiet", "1").tags), stored.decode(errors="replace")]
    assert not [line for line in lines if any(line in text for text in texts)]


def test_inspect_tells_who_signed(world, trusting):
    told = CliRunner().invoke(inspect, ["models:/signed/2", "--no-measure"], catch_exceptions=False)
    assert "signed for signed by team (sha256:" in " ".join(told.stdout.split())
    found = CliRunner().invoke(inspect, ["models:/signed/2", "--no-measure", "--json"], catch_exceptions=False)
    assert json.loads(found.stdout)["signer"] == {"key": signer(world, 2).key, "name": "team", "model": "signed"}


def test_the_command_makes_a_pair_and_shows_its_id(tmp_path):
    made = CliRunner().invoke(keys, ["new", str(tmp_path / "my keys"), "--name", "ann"], catch_exceptions=False)
    assert (tmp_path / "my keys" / "ann.key").is_file()
    assert f"export RANKWISE_SIGNING_KEY='{tmp_path}/my keys/ann.key'" in made.stderr
    shown = CliRunner().invoke(keys, ["show", str(tmp_path / "my keys")], catch_exceptions=False)
    assert shown.stdout == f"{made.stdout.strip()}  ann\n"
