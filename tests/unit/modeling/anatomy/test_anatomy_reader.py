import json
import math
import shutil

import pytest
import torch
from helpers.bases import inject, resolved, settings_in
from helpers.tiny import make_base
from safetensors.torch import load_file, save_file

from rankwise.exceptions import AdapterIntegrityError, ConfigError
from rankwise.experiment.schema import LoraSpec, QuantizationSpec
from rankwise.modeling.adapter import WEIGHTS_NAME, save_adapter
from rankwise.modeling.anatomy.reader import adapter_anatomy, plan_anatomy
from rankwise.modeling.base import load_base
from rankwise.modeling.fingerprint import write_manifest

FACTOR = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "llama", layers=12)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    model = load_base(resolved(base), QuantizationSpec(), settings_in(root), device="cpu").model
    inject(model, r=4, lora_alpha=8, lora_dropout=0.05)
    save_adapter(model, "arm-1", root / "adapter", base_source="x", base_revision=None)
    return root / "adapter"


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def rewrite(directory, change):
    tensors = load_file(directory / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def test_shapes_parameters_and_bytes_are_those_of_the_file(adapter, base):
    anatomy = adapter_anatomy(adapter, base_config=base)
    assert len(anatomy.targets) == 24
    first = anatomy.targets[0]
    assert (first.module, first.lora_A, first.lora_B) == ("model.layers.0.self_attn.q_proj", (4, 64), (64, 4))
    assert (first.parameters, first.scaling, first.dropout) == (4 * 128, 2.0, 0.05)
    per_layer = 4 * (64 + 64) + 4 * (64 + 32)
    assert anatomy.layers == dict.fromkeys(range(12), per_layer)
    assert anatomy.parameters == 12 * per_layer
    assert anatomy.bytes == 4 * anatomy.parameters
    assert all(check.ok for check in anatomy.checks)
    assert len(anatomy.checks) == 5


def test_layers_come_in_the_order_of_the_model_with_and_without_its_base(adapter, base):
    expected = [f"model.layers.{layer}.self_attn.{name}" for layer in range(12) for name in ("q_proj", "v_proj")]
    assert [target.module for target in adapter_anatomy(adapter, base_config=base).targets] == expected
    assert [target.module for target in adapter_anatomy(adapter).targets] == expected


def test_deltas_are_those_of_the_factors(adapter):
    tensors = load_file(adapter / WEIGHTS_NAME)
    target = adapter_anatomy(adapter).targets[3]
    assert target.module == "model.layers.1.self_attn.v_proj"
    a, b = (tensors[FACTOR.format(1, "v_proj", part)].double() for part in "AB")
    assert target.delta_norm == pytest.approx(float((2.0 * b @ a).norm()))
    assert 1 < target.effective_rank <= 4


def test_a_module_that_was_never_trained_is_flagged(adapter):
    rewrite(adapter, lambda tensors: tensors[FACTOR.format(5, "q_proj", "B")].zero_())
    flagged = [target for target in adapter_anatomy(adapter).targets if target.flags]
    assert [(target.module, target.flags) for target in flagged] == [
        ("model.layers.5.self_attn.q_proj", ("untrained",))
    ]
    assert (flagged[0].delta_norm, flagged[0].effective_rank) == (0, 0)


@pytest.mark.parametrize("factor", [0.0, 1e-4])
def test_a_module_that_changes_nothing_is_flagged_dead(adapter, factor):
    rewrite(adapter, lambda tensors: tensors[FACTOR.format(2, "v_proj", "A")].mul_(factor))
    flagged = [(t.module, t.flags) for t in adapter_anatomy(adapter).targets if t.flags]
    assert flagged == [("model.layers.2.self_attn.v_proj", ("dead",))]


def test_a_fresh_adapter_is_untrained_everywhere_and_not_dead(adapter):
    rewrite(adapter, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name])
    assert {target.flags for target in adapter_anatomy(adapter).targets} == {("untrained",)}


def test_numbers_that_are_not_finite_are_flagged_and_null_in_json(adapter):
    rewrite(adapter, lambda tensors: tensors[FACTOR.format(0, "q_proj", "A")].fill_(math.nan))
    anatomy = adapter_anatomy(adapter)
    assert anatomy.targets[0].flags == ("nonfinite",)
    document = json.loads(json.dumps(anatomy.to_dict(), allow_nan=False))
    assert document["adapter"]["targets"][0]["delta_norm"] is None


def test_one_direction_in_a_large_rank_shows_as_rank_one(adapter):
    def flatten(tensors):
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor[:, 1:] = 0

    rewrite(adapter, flatten)
    for target in adapter_anatomy(adapter).targets:
        assert (target.effective_rank, target.stable_rank) == (pytest.approx(1), pytest.approx(1))
        assert target.rank_99 == 1


def test_a_rank_that_the_configuration_does_not_have_is_a_loud_disagreement(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    check = next(check for check in adapter_anatomy(adapter).checks if check.name.startswith("parameters"))
    assert not check.ok
    assert check.expected == 2 * check.actual


def test_bytes_behind_the_tensors_cannot_be_hidden(adapter):
    path = adapter / WEIGHTS_NAME
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(AdapterIntegrityError):
        adapter_anatomy(adapter)


def test_another_base_is_a_disagreement_of_shapes(adapter, tmp_path):
    anatomy = adapter_anatomy(adapter, base_config=make_base(tmp_path / "small", layers=2, hidden_size=32))
    check = next(check for check in anatomy.checks if check.name.startswith("targets"))
    assert (check.ok, check.expected, check.actual) == (False, 24, 0)


def test_ranks_and_alphas_of_their_own_are_used(base, tmp_path):
    model = load_base(resolved(base), QuantizationSpec(), settings_in(tmp_path), device="cpu").model
    inject(model, r=4, lora_alpha=8, rank_pattern={"v_proj": 9}, alpha_pattern={"v_proj": 3}, use_rslora=True)
    save_adapter(model, "arm-1", tmp_path / "a", base_source="x", base_revision=None)
    anatomy = adapter_anatomy(tmp_path / "a", base_config=base)
    q, v = anatomy.targets[:2]
    assert (q.lora_A, q.scaling) == ((4, 64), pytest.approx(8 / 2))
    assert (v.lora_A, v.scaling) == ((9, 64), pytest.approx(3 / 3))
    assert all(check.ok for check in anatomy.checks)
    layer = model.model.layers[0].self_attn
    assert layer.v_proj.scaling["arm-1"] == pytest.approx(v.scaling)
    assert layer.q_proj.scaling["arm-1"] == pytest.approx(q.scaling)


def test_dora_and_stored_rows_do_not_raise_a_false_alarm(base, tmp_path):
    model = load_base(resolved(base), QuantizationSpec(), settings_in(tmp_path), device="cpu").model
    inject(model, use_dora=True, trainable_token_indices=[300, 301])
    save_adapter(model, "arm-1", tmp_path / "a", base_source="x", base_revision=None)
    anatomy = adapter_anatomy(tmp_path / "a", base_config=base)
    assert all(check.ok for check in anatomy.checks)
    assert anatomy.parameters == 12 * (4 * (128 + 96) + 64 + 32) + 2 * 64


def test_memory_is_that_of_the_loaded_dtype_or_what_was_measured(adapter, base):
    estimated = adapter_anatomy(adapter, base_config=base, module_dtype="bfloat16").memory
    assert not estimated.measured
    assert estimated.base_and_adapter - estimated.base == adapter_anatomy(adapter).bytes
    measured = adapter_anatomy(adapter, base_config=base).with_memory(5, 7).memory
    assert (measured.base, measured.base_and_adapter, measured.measured) == (5, 7, True)


def test_the_json_has_the_form_that_others_build_on(adapter, base):
    document = adapter_anatomy(adapter, base_config=base).to_dict()
    assert set(document) == {"adapter", "base", "memory", "checks"}
    assert {"parameters", "bytes", "layers", "targets"} <= set(document["adapter"])
    assert document["adapter"]["layers"][0] == {"layer": 0, "parameters": 896}
    target = document["adapter"]["targets"][0]
    assert {"module", "lora_A", "lora_B", "parameters", "delta_norm", "effective_rank"} <= set(target)
    assert (target["lora_A"], target["lora_B"]) == ([4, 64], [64, 4])
    assert "singular_values" not in target
    assert document["adapter"]["rank_use"]["r"] == 4
    assert set(document["base"]) == {*("parameters", "bytes_fp32", "bytes_bf16", "bytes_quantized", "share_4bit")}
    assert {"base", "base_and_adapter"} <= set(document["memory"])
    assert set(document["checks"][0]) == {"name", "expected", "actual", "ok"}
    json.dumps(document, allow_nan=False)


def test_without_its_base_an_adapter_can_still_be_taken_apart(adapter):
    document = adapter_anatomy(adapter).to_dict()
    assert document["base"] is document["memory"] is None
    assert len(document["checks"]) == 4


def test_a_plan_has_everything_but_deltas(base):
    lora = LoraSpec(r=8, lora_alpha=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj"), use_rslora=True)
    anatomy = plan_anatomy(base, lora, QuantizationSpec())
    target = anatomy.targets[0]
    assert (target.lora_A, target.lora_B, target.dropout) == ((8, 64), (64, 8), 0.1)
    assert target.scaling == pytest.approx(4 / math.sqrt(8))
    assert target.delta_norm is target.effective_rank is None
    assert anatomy.bytes == 4 * anatomy.parameters
    json.dumps(anatomy.to_dict(), allow_nan=False)


def test_a_plan_with_an_unknown_target_says_what_there_is(base):
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        plan_anatomy(base, LoraSpec(r=8, lora_alpha=4, target_modules=("q_prj",)), QuantizationSpec())


def test_a_changed_file_is_refused_where_there_is_a_manifest(adapter):
    write_manifest(adapter)
    rewrite(adapter, lambda tensors: tensors[FACTOR.format(0, "q_proj", "A")].add_(1))
    with pytest.raises(AdapterIntegrityError, match=r"files of .* differ from its manifest"):
        adapter_anatomy(adapter)


def test_torch_is_not_asked_for_the_full_delta(adapter, monkeypatch):
    largest = []
    original = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: largest.append(matrix.shape) or original(matrix))
    adapter_anatomy(adapter)
    assert set(largest) == {(4, 4)}
