"""What is stored is what is loaded, or nothing is."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

import rankwise.flavor as flavor
from rankwise.exceptions import AdapterIntegrityError, AssetError, ConfigError, TrackingError
from rankwise.flavor.fetch import check, fetch, obtain, resolve_uri
from rankwise.flavor.metadata import MANIFEST_TAG, SECTION_TAG
from rankwise.modeling.fingerprint import write_manifest

FILES = [
    "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    "adapter/chat_template.jinja", "adapter/tokenizer.json", "adapter/tokenizer_config.json", "conda.yaml",
    "input_example.json", "manifest.json", "python_env.yaml", "requirements.txt", "serving_input_example.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def registered(world):
    """A version of a registered model, and its alias."""
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    info = flavor.log_adapter(world.adapter, world.load_base(), registered_model_name="fetched")
    mlflow.MlflowClient().set_registered_model_alias("fetched", "champion", "1")
    mlflow.set_tracking_uri(before)
    return info


def load(directory, world):
    return flavor.load_model(directory, settings=world.settings)


def test_the_list_of_files_above_is_the_list_of_files_stored(world):
    names = {path.relative_to(world.saved).as_posix() for path in world.saved.rglob("*") if path.is_file()}
    assert names == {*FILES, "MLmodel", *(name for name in names if name.startswith("wheels/"))}


@pytest.mark.parametrize("name", [*FILES, "wheels"])
def test_a_flipped_byte_anywhere_in_any_stored_file_is_refused(world, tmp_path, name):
    copy = world.copy(tmp_path / "model")
    path = copy / name if name != "wheels" else next((copy / "wheels").iterdir())
    content = path.read_bytes()
    for place in sorted({0, 1, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1}):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(AdapterIntegrityError) as caught:
            load(copy, world)
        assert path.name in str(caught.value)
        assert str(caught.value).count("sha256") >= 1 or "recorded" in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_missing_is_refused(world, tmp_path, name):
    copy = world.copy(tmp_path / "model")
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterIntegrityError, match=name.rpartition("/")[2]):
        load(copy, world)
    (copy / name).unlink()
    with pytest.raises(AdapterIntegrityError, match=name.rpartition("/")[2]):
        load(copy, world)


def test_files_exchanged_between_two_places_are_refused(world, tmp_path):
    copy = world.copy(tmp_path / "model")
    (copy / "input_example.json").rename(copy / "kept")
    shutil.copy(copy / "adapter" / "tokenizer_config.json", copy / "input_example.json")
    (copy / "kept").unlink()
    with pytest.raises(AdapterIntegrityError, match=r"input_example\.json: \d+ bytes, expected"):
        load(copy, world)


def test_the_weights_of_another_adapter_of_the_same_shape_are_refused(world, tmp_path):
    from helpers.bases import inject

    base = world.load_base()
    inject(base.model, "x", seed=9)
    flavor.save_model(base.model, tmp_path / "other", base.tokenizer, base=base)
    copy, name = world.copy(tmp_path / "model"), "adapter/adapter_model.safetensors"
    assert (tmp_path / "other" / name).stat().st_size == (copy / name).stat().st_size
    shutil.copy(tmp_path / "other" / name, copy / name)
    with pytest.raises(AdapterIntegrityError, match=rf"{name}: sha256"):
        load(copy, world)
    # Its manifest beside them does not help: MLmodel has the digest of the manifest.
    shutil.copy(tmp_path / "other" / "manifest.json", copy / "manifest.json")
    with pytest.raises(AdapterIntegrityError, match=r"manifest"):
        load(copy, world)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SPOILT = {
    "auto_map in the configuration": (
        lambda d: edit_json(d / "adapter_config.json", auto_map={"AutoModel": "evil.Model"}),
        r"adapter_config\.json has auto_map",
    ),
    "auto_map in the tokenizer": (
        lambda d: edit_json(d / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}),
        r"tokenizer_config\.json has auto_map",
    ),
    "an unknown key": (lambda d: edit_json(d / "adapter_config.json", surprise=1), "does not know: surprise"),
    "another rank": (
        lambda d: edit_json(d / "adapter_config.json", r=2),
        r"shape \(4, 64\), the model needs \(2, 64\)",
    ),
    "pickled weights": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        r"pickled files \(adapter_model\.bin\)",
    ),
    "a missing tensor": (
        lambda d: edit_tensors(d / "adapter_model.safetensors", lambda t: t.pop(FIRST)),
        f"missing: {FIRST}",
    ),
    "a surplus tensor": (
        lambda d: edit_tensors(d / "adapter_model.safetensors", lambda t: t.update({f"{FIRST}.x": t[FIRST].clone()})),
        f"surplus: {FIRST}.x",
    ),
    "another template": (lambda d: (d / "chat_template.jinja").write_text("{{ 1 }}"), "the chat template of"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "the tokenizer of .* cannot be loaded"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_spoilt_and_sealed_anew_is_refused_all_the_same(world, tmp_path, name):
    """A directory has no tags; whoever wrote its manifest may have written anything."""
    spoil, message = SPOILT[name]
    copy = world.copy(tmp_path / "model")
    before = check(copy, resolve_uri(copy)).metadata.manifest
    spoil(copy / "adapter")
    after = write_manifest(copy)
    (copy / "MLmodel").write_text((copy / "MLmodel").read_text().replace(before, after))
    with pytest.raises(AdapterIntegrityError, match=message):
        load(copy, world)


def test_code_that_a_model_brings_is_not_imported(world, tmp_path):
    copy = world.copy(tmp_path / "model")
    document = yaml.safe_load((copy / "MLmodel").read_text())
    document["flavors"]["python_function"]["code"] = "code"
    (copy / "MLmodel").write_text(yaml.safe_dump(document))
    with pytest.raises(AdapterIntegrityError, match="contains code to import, which is refused"):
        load(copy, world)


def test_a_flipped_byte_in_mlmodel_is_refused_or_changes_nothing_that_decides(world, store, registered, tmp_path):
    """MLflow writes MLmodel last, so it is in no manifest: the tags have the digest of the parts that decide."""
    from pathlib import Path

    source = Path(store.get_logged_model(registered.model_id).artifact_location.removeprefix("file://"))
    copy = shutil.copytree(source, tmp_path / "model")
    origin, path = resolve_uri("models:/fetched/1"), copy / "MLmodel"
    content = path.read_bytes()
    intact = check(copy, origin).metadata
    refused = 0
    for place in range(0, len(content), len(content) // 40):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = check(copy, origin)
        except (AdapterIntegrityError, ConfigError):
            refused += 1
        else:
            assert found.metadata == intact
    assert refused > 20


@pytest.mark.parametrize("name", ["adapter/adapter_model.bin", "adapter/more.json", "code/evil.py", "pickle.pkl"])
def test_a_surplus_file_is_refused(world, tmp_path, name):
    copy = world.copy(tmp_path / "model")
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"x")
    with pytest.raises(AdapterIntegrityError, match=f"surplus: {name}"):
        load(copy, world)


def test_a_link_in_place_of_a_file_is_refused(world, tmp_path):
    copy = world.copy(tmp_path / "model")
    path = copy / "adapter" / "adapter_model.safetensors"
    path.unlink()
    path.symlink_to(world.saved / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterIntegrityError, match="is a link"):
        load(copy, world)


def test_mlflow_s_note_of_a_download_is_no_surplus_file(world, tmp_path):
    copy = world.copy(tmp_path / "model")
    (copy / "registered_model_meta").write_text("model_name: x\nmodel_version: 1\n")
    assert check(copy, resolve_uri(copy)).metadata.parameters == 1792


def test_a_directory_that_is_no_model_of_this_flavor_is_named_so(world, tmp_path):
    with pytest.raises(ConfigError, match="has no MLmodel file, so it is not a stored model"):
        load(world.adapter, world)
    (tmp_path / "MLmodel").write_text("flavors:\n  sklearn: {}\n")
    with pytest.raises(ConfigError, match=r"is not a model of the flavor qlora \(it has \['sklearn'\]\)"):
        load(tmp_path, world)
    (tmp_path / "MLmodel").write_text("{")
    with pytest.raises(AdapterIntegrityError, match="cannot be read"):
        load(tmp_path, world)


def test_every_form_of_uri_names_the_model(world, store, registered):
    names = ["models:/fetched@champion", "models:/fetched/1", f"models:/{registered.model_id}"]
    found = [resolve_uri(name) for name in names]
    assert {origin.model_id for origin in found} == {registered.model_id}
    assert [origin.version for origin in found] == ["1", "1", None]
    assert found[0].uri == "models:/fetched/1"
    assert resolve_uri(world.saved.as_uri()).location == str(world.saved)
    run = store.create_run("0")
    info = flavor.log_adapter(world.adapter, world.load_base(), name="again", run_id=run.info.run_id)
    assert resolve_uri(f"runs:/{run.info.run_id}/again").model_id == info.model_id
    with pytest.raises(AssetError, match=r"has no output model 'other'; it has \['again'\]"):
        resolve_uri(f"runs:/{run.info.run_id}/other")


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("models:/fetched@nobody", TrackingError, "looking up models:/fetched@nobody"),
        ("models:/fetched/99", TrackingError, "looking up models:/fetched/99"),
        ("models:/nothing@champion", TrackingError, "looking up models:/nothing@champion"),
        ("models:/fetched/Production", ConfigError, "a model must be given as models:/NAME@ALIAS"),
        ("s3://bucket/model", ConfigError, "a model must be given as"),
        ("/no/such/directory", AssetError, "there is no directory /no/such/directory"),
    ],
)
def test_a_uri_that_names_nothing_is_refused(store, registered, uri, error, message):
    with pytest.raises(error, match=message):
        resolve_uri(uri)


@pytest.fixture(scope="module")
def base(world):
    return world.load_base()


def test_a_version_whose_logged_model_was_deleted_loads_and_is_checked_as_long_as_its_files_are_there(
    world, store, base, tmp_path
):
    info = flavor.log_adapter(world.adapter, base, registered_model_name="deleted")
    store.delete_logged_model(info.model_id)
    origin = resolve_uri("models:/deleted/1")
    assert (origin.model_id, MANIFEST_TAG in origin.tags, SECTION_TAG in origin.tags) == (info.model_id, True, True)
    with fetch("models:/deleted/1") as fetched:
        assert fetched.metadata.lora["r"] == 4
    shutil.move(origin.location, tmp_path / "gone")
    with (
        pytest.raises(AdapterIntegrityError, match=r"files of models:/deleted/1 are gone from /.* another version$"),
        obtain(origin),
    ):
        pass


def test_a_run_s_model_is_the_newest_whole_one_that_is_left(world, store, base):
    run_id = store.create_run("0").info.run_id
    first, second, third = (flavor.log_adapter(world.adapter, base, run_id=run_id).model_id for _ in range(3))
    store.finalize_logged_model(third, "FAILED")
    assert resolve_uri(f"runs:/{run_id}/adapter").model_id == second
    store.delete_logged_model(second)
    assert resolve_uri(f"runs:/{run_id}").model_id == first
    for model_id in (first, third):
        store.delete_logged_model(model_id)
    with pytest.raises(AssetError, match=r"has no output model 'adapter'; it has \[\]"):
        resolve_uri(f"runs:/{run_id}/adapter")


def test_what_lies_in_the_store_is_checked_against_the_tags(world, store, registered, tmp_path):
    """Somebody who can write the artifacts changes all of them so that they fit each other: the tags tell."""
    from pathlib import Path

    base = world.load_base()
    info = flavor.log_adapter(world.adapter, base, registered_model_name="attacked")
    directory = Path(store.get_logged_model(info.model_id).artifact_location.removeprefix("file://"))
    before = resolve_uri("models:/attacked/1").tags[MANIFEST_TAG]
    (directory / "adapter" / "README.md").write_text("another card")
    after = write_manifest(directory)
    with pytest.raises(AdapterIntegrityError, match=f"expected {before}, got {after}"), fetch("models:/attacked/1"):
        pass
    mlmodel = (directory / "MLmodel").read_text()
    (directory / "MLmodel").write_text(mlmodel.replace(before, after))
    with (
        pytest.raises(AdapterIntegrityError, match=rf"the MLmodel file of models:/attacked/1 .* {SECTION_TAG}"),
        fetch("models:/attacked/1"),
    ):
        pass
    # Beside each other the files agree: only the store knows better.
    assert check(directory, resolve_uri(directory)).metadata.manifest == after


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loader_module: rankwise.flavor", "loader_module: another.module"),
        ("compute_dtype: float32", "compute_dtype: float16"),
        ("lora_alpha: 8", "lora_alpha: 9"),
        ('"name": "seed"', '"name": "sead"'),
    ],
)
def test_a_change_in_the_sealed_parts_of_mlmodel_is_refused(world, store, registered, old, new):
    from pathlib import Path

    path = Path(store.get_logged_model(registered.model_id).artifact_location.removeprefix("file://")) / "MLmodel"
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))
    try:
        with (
            pytest.raises(AdapterIntegrityError, match="the MLmodel file of models:/fetched/1"),
            fetch("models:/fetched@champion"),
        ):
            pass
    finally:
        path.write_text(content)
