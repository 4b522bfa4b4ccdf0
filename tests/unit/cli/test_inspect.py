import json
import shutil

import mlflow
import pytest
from click.testing import CliRunner
from helpers.bases import inject, resolved, settings_in
from helpers.local_store import prepared_home
from helpers.tiny import make_base

import rankwise.flavor as flavor
from rankwise.assets.base import resolve_base
from rankwise.cli.inspect import inspect
from rankwise.exceptions import AdapterIntegrityError, AssetError, TrackingError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.adapter import WEIGHTS_NAME, save_adapter
from rankwise.modeling.base import load_base

LLAMA_3_1_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "llama", layers=3)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    model = load_base(resolved(base), QuantizationSpec(), settings_in(root), device="cpu").model
    save_adapter(inject(model), "arm-1", root / "adapter", base_source=str(base), base_revision=None)
    return root / "adapter"


@pytest.fixture(scope="module")
def registered(base, tmp_path_factory):
    """An adapter that a run has logged and registered as `tiny`, and what names it in each form."""
    root = tmp_path_factory.mktemp("registered")
    settings = prepared_home(root / "home")
    loaded = load_base(resolve_base(str(base), None, settings), QuantizationSpec(), settings, device="cpu")
    inject(loaded.model, "x")
    client = mlflow.MlflowClient(tracking_uri=settings.tracking_uri)
    run_id = client.create_run("0").info.run_id
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(settings.tracking_uri)
    info = flavor.log_model(
        loaded.model, loaded.tokenizer, base=loaded, registered_model_name="tiny", run_id=run_id, settings=settings
    )
    mlflow.set_tracking_uri(before)
    client.set_registered_model_alias("tiny", "best", "1")
    flavor.save_model(loaded.model, root / "saved", loaded.tokenizer, base=loaded, settings=settings)
    forms = {
        "alias": "models:/tiny@best",
        "version": "models:/tiny/1",
        "logged model": f"models:/{info.model_id}",
        "run": f"runs:/{run_id}",
        "run and name": f"runs:/{run_id}/adapter",
        "run id": run_id,
        "saved": str(root / "saved"),
    }
    return settings, forms, client


@pytest.fixture
def forms(registered, monkeypatch):
    monkeypatch.setenv("RANKWISE_HOME", str(registered[0].home))
    monkeypatch.setenv("RANKWISE_CACHE", str(registered[0].cache))
    return registered[1]


def run(*arguments):
    return CliRunner().invoke(inspect, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_plan_over_llama_3_1_8b_gives_the_numbers_of_the_issue(tmp_path):
    config = tmp_path / "llama.json"
    config.write_text(json.dumps(LLAMA_3_1_8B))
    result = run("--base", config, "--r", 32, "--target-modules", "q_proj,k_proj,v_proj,o_proj", "--json")
    document = json.loads(result.stdout)
    assert document["adapter"]["parameters"] == 27_262_976
    assert document["adapter"]["bytes"] == 109_051_904
    assert document["adapter"]["layers"][31] == {"layer": 31, "parameters": 851_968}
    assert document["base"]["parameters"] == 8_030_261_248
    assert document["base"]["bytes_fp32"] == 32_121_044_992
    assert document["base"]["bytes_quantized"] == pytest.approx(5.70e9, abs=0.005e9)
    assert result.stderr == ""


def test_a_plan_is_shown_with_identical_layers_folded(tmp_path):
    config = tmp_path / "llama.json"
    config.write_text(json.dumps(LLAMA_3_1_8B))
    result = run("--base", config, "--r", 32, "--target-modules", "q_proj,k_proj,v_proj,o_proj")
    assert "27,262,976 parameters, 109.05 MB" in result.stdout
    assert "layers 0 to 31: 32 alike, 851,968 parameters each" in result.stdout
    assert result.stdout.count("self_attn.k_proj") == 1
    assert "Linear4bit 4096 -> 1024" in result.stdout
    assert "lora_A      32 x 4096" in result.stdout
    assert "lora_B      1024 x 32" in result.stdout
    assert "32.12 GB" in result.stdout
    assert "5.70 GB" in result.stdout


def test_a_directory_is_taken_apart_over_its_recorded_base_with_measured_memory(adapter, base):
    document = json.loads(run(adapter, "--json").stdout)
    assert document["adapter"]["parameters"] == 3 * 896
    assert document["memory"]["measured"]
    assert document["memory"]["base_and_adapter"] - document["memory"]["base"] == 4 * 3 * 896
    assert all(check["ok"] for check in document["checks"])
    assert len(document["checks"]) == 5


def test_measured_memory_is_what_is_estimated(adapter):
    measured, estimated = (
        json.loads(run(adapter, "--json", flag).stdout)["memory"] for flag in ("--measure", "--no-measure")
    )
    assert {**measured, "measured": False} == estimated


def test_the_tree_shows_deltas_and_checks(adapter):
    text = run(adapter, "--no-measure").stdout
    assert "layers 0 to 2: 3 alike, 896 parameters each" in text
    assert "effective rank" in text
    assert "ok        bytes: header and tensors = file" in text
    assert "DISAGREE" not in text


@pytest.mark.parametrize(
    "form", ["alias", "version", "logged model", "run", "run and name", "run id", "saved"], ids=lambda form: form
)
def test_every_form_of_a_name_takes_the_same_adapter_apart(forms, form):
    document = json.loads(run(forms[form], "--no-measure", "--json").stdout)
    assert (document["adapter"]["parameters"], len(document["adapter"]["targets"])) == (3 * 896, 6)
    assert document["base"]["parameters"] > 0
    assert [check["ok"] for check in document["checks"]] == [True] * 5


def test_a_registered_model_is_shown_with_its_version_its_base_and_measured_memory(forms, base):
    result = run(forms["alias"])
    text = " ".join(result.stdout.split())
    assert "models:/tiny@best (models:/tiny/1) 2,688 parameters" in text
    assert f"trained over {base} at" in text
    assert "4 bit nf4 with double quantization" in text
    assert "here, measured" in text
    assert result.stderr == ""


def test_a_run_without_a_model_and_a_name_that_is_not_there_say_so(forms, registered):
    empty = registered[2].create_run("0").info.run_id
    with pytest.raises(AssetError, match=f"run {empty} has no output model; it has"):
        run(empty)
    with pytest.raises(AssetError, match=r"no output model 'other'; it has \['adapter'\]"):
        run(f"{forms['run']}/other")
    with pytest.raises(TrackingError, match="models:/tiny@nothing"):
        run("models:/tiny@nothing")


def test_another_quantization_of_the_base_can_be_asked_for(forms):
    memory = {
        name: json.loads(run(forms["alias"], "--no-measure", "--json", "--quantization", name).stdout)["memory"]["base"]
        for name in ("nf4", "int8", "none")
    }
    assert memory["nf4"] < memory["int8"] < memory["none"]


def test_another_base_than_the_recorded_one_is_looked_at_with_a_warning(forms, tmp_path):
    other = make_base(tmp_path / "other", layers=3, seed=5)
    result = run(forms["version"], "--base", other, "--no-measure", "--json")
    assert f"{other} is not the base used in training: weights sha256:" in result.stderr
    assert json.loads(result.stdout)["base"]["parameters"] > 0


def test_a_recorded_base_that_has_changed_is_said_and_the_rest_shown(forms, base):
    template = base / "chat_template.jinja"
    before = template.read_text()
    template.write_text("another")
    try:
        result = run(forms["version"], "--json")
    finally:
        template.write_text(before)
    assert "the base is not available" in result.stderr
    assert "chat_template: found sha256:" in result.stderr
    document = json.loads(result.stdout)
    assert (document["base"], document["adapter"]["parameters"]) == (None, 3 * 896)


def test_a_base_that_is_not_at_hand_is_said_and_the_rest_shown(adapter, tmp_path, base):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/nowhere"}))
    result = run(moved, "--json")
    assert json.loads(result.stdout)["base"] is None
    assert "the base is not available" in result.stderr
    assert json.loads(run(moved, "--json", "--base", base / "config.json").stdout)["base"]["parameters"] > 0


def test_a_page_with_plots_is_written(adapter, tmp_path):
    result = run(adapter, "--no-measure", "--html", tmp_path / "page.html")
    assert "page with plots" in result.stderr
    page = (tmp_path / "page.html").read_text()
    assert f"<h1>{adapter}</h1>" in page
    assert "Norm of the delta" in page


def test_a_plan_can_be_a_page_too(base, tmp_path):
    result = run(
        "--base", base, "--r", 4, "--target-modules", "q_proj", "--json", "--html", tmp_path / "deep" / "plan.html"
    )
    assert json.loads(result.stdout)["adapter"]["parameters"] == 3 * 4 * 128
    assert "<h1>planned: r=4</h1>" in (tmp_path / "deep" / "plan.html").read_text()


def test_a_damaged_adapter_is_refused(adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    (copy / WEIGHTS_NAME).write_bytes((copy / WEIGHTS_NAME).read_bytes()[:-1])
    with pytest.raises(AdapterIntegrityError, match="not a readable safetensors file"):
        run(copy, "--no-measure")


def test_a_model_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(AssetError, match="there is no directory"):
        run(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing: ['--base', '--r', '--target-modules']"),
        (("--base", "x", "--r", "4"), "missing: ['--target-modules']"),
        (("model", "--r", "4"), "give only one"),
        (("--base", "x", "--r", "0", "--target-modules", "q"), "Invalid value for '--r'"),
        (("--base", "x", "--r", "2", "--target-modules", ","), "--target-modules is empty"),
    ],
    ids=str,
)
def test_wrong_usage_says_what_is_missing(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
