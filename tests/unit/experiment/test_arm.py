from __future__ import annotations

import json

import pytest
from helpers.definitions import COMMIT, DIGEST, changed, parse
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import READING, LoraSpec

NO_SWEEP = changed(("sweep:\n  parameters:\n    lora.r: [4, 8]\n", ""))
BEST = ("  alias: best", "  alias: best\n  checkpoint: best")
EVERY_5 = ("  warmup_steps: 5", "  warmup_steps: 5\n  eval_steps: 5")
OWN_EVAL = ("  eval: {split_from: train, rows: 20}", f"  eval: org/eval\n  eval_revision: {COMMIT}")


def arm(*changes: tuple[str, str]) -> ArmSpec:
    return ArmSpec.of(parse(*changes, text=NO_SWEEP).spec)


def test_the_hash_is_64_hex_digits_and_names_the_adapter_without_dots():
    one = arm()
    assert len(one.spec_hash) == 64
    assert int(one.spec_hash, 16)
    assert one.short == one.spec_hash[:12]
    assert one.adapter_name == f"arm-{one.short}"


def test_arms_of_earlier_releases_keep_their_hash():
    first = ArmSpec.from_json(stored_by_an_earlier_release(arm()))
    assert first.rendering == 1
    assert first.spec_hash == "a6d189b1f924afb527c9c85054146a1d1069d55729fd61a7fee023082d7af986"
    assert first.eval_hash() != arm().eval_hash()
    assert ArmSpec.from_json(first.to_json()) == first
    assert not any(key.startswith("dataset.rendering") for key in first.params)
    assert arm(RENDERING_1).spec_hash == first.spec_hash


def stored_by_an_earlier_release(one: ArmSpec) -> str:
    document = json.loads(one.to_json())
    for name in ("rendering", *READING):
        del document["dataset"][name]
    return json.dumps(document)


RENDERING_1 = ("  train: org/rows", "  rendering: 1\n  train: org/rows")


def test_fields_added_later_do_not_change_a_hash_at_their_default():
    fields = ("  warmup_steps: 5", "  warmup_steps: 5\n  optim: adamw_torch_fused\n  train_sampling_strategy: random")
    assert arm(fields).spec_hash == arm().spec_hash
    assert "training.optim" not in arm(fields).params


@pytest.mark.parametrize(
    "change",
    [
        ("  r: 8", "  r: 4"),
        ("2*r", "r"),
        ("0.05", "0.1"),
        ("[q_proj, v_proj]", "[q_proj]"),
        ("[q_proj, v_proj]", "all-linear"),
        ("lora:\n", "lora:\n  use_rslora: true\n"),
        ("max_steps: 20", "max_steps: 21"),
        ("max_steps: 20", "num_train_epochs: 20"),
        ("2e-3", "3e-3"),
        ("warmup_steps: 5", "warmup_steps: 6"),
        ("  warmup_steps: 5", "  warmup_steps: 5\n  max_length: 64"),
        ("  warmup_steps: 5", "  warmup_steps: 5\n  gradient_accumulation_steps: 2"),
        ("org/base", "org/other"),
        (f"base_model_revision: {COMMIT}", f"base_model_revision: {COMMIT[::-1]}"),
        ("  train: org/rows", "  train: org/others"),
        (f"  train_revision: {COMMIT}", f"  train_revision: {COMMIT[::-1]}"),
        ("rows: 20}", "rows: 30}"),
        ("rows: 20}", "rows: 20, seed: 1}"),
        ("How much is", "What costs"),
        RENDERING_1,
        *(
            ("  train: org/rows", f"  {setting}\n  train: org/rows")
            for setting in (
                "format: prompt_completion",
                'delimiter: ";"',
                "encoding: cp1252",
                "na_values: [NA]",
                "tools: functions",
                "chat_template_kwargs: {enable_thinking: false}",
                "supervise: last_answer",
                "overlong: drop",
            )
        ),
        ("${price}", "{price}"),
        ("  warmup_steps: 5", "  warmup_steps: 5\n  optim: adamw_bnb_8bit"),
        ("  warmup_steps: 5", "  warmup_steps: 5\n  train_sampling_strategy: group_by_length"),
        ("  train: org/rows", "  train: org/rows\n  system: Be brief."),
        ("  train: org/rows", "  train: org/rows\n  chat_template: plain"),
        ("  train: org/rows", "  train: org/rows\n  limit: {train: 100}"),
        ("  train: org/rows", "  train: org/rows\n  train_split: validation"),
        ("version: 1", "version: 1\nseed: 1"),
        ("version: 1", "version: 1\nquantization: {bnb_4bit_quant_type: fp4}"),
        ("version: 1", "version: 1\nquantization: {load_in_4bit: false}"),
        ("version: 1", "version: 1\ninit_from: models:/x/1"),
    ],
)
def test_what_influences_the_adapter_changes_the_hash(change):
    assert arm(change).spec_hash != arm().spec_hash


@pytest.mark.parametrize(
    "change",
    [
        ("name: small", "name: other"),
        ("name: small", "name: small\ndescription: other"),
        ("  name: pricer", "  name: other"),
        ("  alias: best", "  alias: other"),
        ("[loss, number]", "[loss]"),
        ("  primary_metric: eval.loss", "  primary_metric: eval.perplexity\n  max_new_tokens: 3"),
        ("  warmup_steps: 5", "  warmup_steps: 5\n  save_steps: 7"),
        ("  warmup_steps: 5", "  warmup_steps: 5\n  logging_steps: 7"),
        EVERY_5,
        ("version: 1", "version: 1\ntracking: {log_examples: false}"),
        ("  train: org/rows", "  train: org/rows\n  limit: {eval: 10}"),
        ("[q_proj, v_proj]", "[v_proj, q_proj]"),
        ("2*r", "16"),
        ("2*r", "16.0"),
        ("2e-3", "0.002"),
        ("2e-3", "1/500"),
        ("version: 1", "version: 1\nseed: 0\nquantization: {load_in_4bit: true}"),
    ],
)
def test_what_does_not_influence_the_adapter_leaves_the_hash_alone(change):
    assert arm(change).spec_hash == arm().spec_hash


def test_evaluation_rows_of_their_own_do_not_influence_the_adapter():
    assert arm(OWN_EVAL).spec_hash == arm((OWN_EVAL[0], OWN_EVAL[1].replace(COMMIT, COMMIT[::-1]))).spec_hash
    assert arm(OWN_EVAL).spec_hash != arm().spec_hash, "a split takes rows away from training"


@pytest.mark.parametrize(
    "change",
    [
        (EVERY_5[1], EVERY_5[1].replace("5", "10")),
        ("primary_metric: eval.loss", "primary_metric: eval.perplexity"),
        (COMMIT + "\n  prompt", COMMIT[::-1] + "\n  prompt"),
        ("  train: org/rows", "  train: org/rows\n  limit: {eval: 10}"),
    ],
)
def test_with_the_best_checkpoint_the_evaluations_choose_the_result(change):
    text = changed(BEST, EVERY_5, OWN_EVAL, text=NO_SWEEP)
    one = ArmSpec.of(parse(text=text).spec)
    assert one.checkpoint == "best"
    assert ArmSpec.of(parse(change, text=text).spec).spec_hash != one.spec_hash
    assert one.spec_hash != arm(OWN_EVAL).spec_hash
    assert (one.params["register.checkpoint"], one.params["training.eval_steps"]) == ("best", 5)


def test_settings_of_a_quantization_that_is_off_do_not_count():
    off = arm(("version: 1", "version: 1\nquantization: {load_in_4bit: false}"))
    fp4 = arm(("version: 1", "version: 1\nquantization: {load_in_4bit: false, bnb_4bit_quant_type: fp4}"))
    assert off.spec_hash == fp4.spec_hash
    assert "quantization.bnb_4bit_quant_type" not in off.params


def test_a_file_is_the_same_wherever_it_lies_once_it_is_pinned(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text("carat,price\n")
    pinned = f"  train_revision: {COMMIT}", f"  train_revision: {DIGEST}"
    here, there = (arm(("org/rows", str(tmp_path / name / "rows.csv")), pinned) for name in ("one", "two"))
    assert here.dataset.train != there.dataset.train
    assert here.spec_hash == there.spec_hash


def test_a_template_s_file_counts_by_what_it_says(tmp_path):
    for name, text in (("a", "{{ x }}"), ("b", "{{ x }}"), ("c", "{{ y }}")):
        (tmp_path / f"{name}.jinja").write_text(text)
    a, b, c = (arm(("  train: org", f"  chat_template: {tmp_path}/{name}.jinja\n  train: org")) for name in "abc")
    assert a.spec_hash == b.spec_hash != c.spec_hash


@pytest.mark.parametrize(
    ("change", "provisional"),
    [
        (("version: 1", "version: 1"), False),
        ((f"base_model_revision: {COMMIT}\n", ""), True),
        ((f"base_model_revision: {COMMIT}", "base_model_revision: main"), True),
        ((f"  train_revision: {COMMIT}\n", ""), True),
        (("version: 1", "version: 1\ninit_from: models:/x@champion"), True),
        (("version: 1", "version: 1\ninit_from: models:/x/3"), False),
        ((OWN_EVAL[0], "  eval: org/eval"), False),
    ],
)
def test_a_hash_is_provisional_while_a_pin_that_it_covers_is_open(change, provisional):
    assert arm(change).provisional is provisional


def test_with_the_best_checkpoint_the_pin_of_the_evaluation_rows_matters_too():
    assert arm(BEST, EVERY_5, (OWN_EVAL[0], "  eval: org/eval")).provisional
    assert not arm(BEST, EVERY_5, OWN_EVAL).provisional


def test_json_gives_an_equal_arm_with_an_equal_hash():
    one = arm(OWN_EVAL, ("0.05", "0.1"))
    again = ArmSpec.from_json(one.to_json())
    assert again == one
    assert again.spec_hash == one.spec_hash
    assert json.loads(one.to_json())["lora"]["r"] == 8


def test_a_changed_copy_has_a_hash_of_its_own_and_is_checked():
    one = arm()
    before = one.spec_hash
    copy = one.model_copy(update={"seed": 1})
    assert copy.spec_hash != before
    assert copy.model_copy(update={"seed": 0}).spec_hash == before
    assert copy.model_copy(update={"seed": 0}) == one
    with pytest.raises(ValidationError):
        one.model_copy(update={"seed": -1})


def test_params_are_flat_under_mlflow_s_names_with_json_numbers():
    params = arm().params
    assert params["lora.r"] == 8
    assert params["lora.alpha"] == 16
    assert params["lora.dropout"] == 0.05
    assert params["lora.target_modules"] == "q_proj,v_proj"
    assert params["lora.rslora"] is False
    assert params["training.learning_rate"] == 0.002
    assert params["seed"] == 0
    assert params["base_model_revision"] == COMMIT
    assert params["dataset.eval.rows"] == 20
    assert params["quantization.bnb_4bit_quant_type"] == "nf4"
    assert not {"init_from", "register.checkpoint", "training.eval_steps"} & params.keys()
    assert json.loads(json.dumps(params)) == params


def test_params_do_not_have_what_a_resumed_run_may_change():
    changed_arm = arm(("  warmup_steps: 5", "  warmup_steps: 5\n  save_steps: 7\n  logging_steps: 2\n  eval_steps: 5"))
    assert changed_arm.params == arm().params


def test_arms_of_one_base_share_a_pack_whatever_they_train():
    one = arm()
    assert one.pack_key == arm(("  r: 8", "  r: 4"), ("2e-3", "1e-3"), ("How much", "What")).pack_key
    assert one.pack_key != arm(("org/base", "org/other")).pack_key
    assert one.pack_key != arm(("version: 1", "version: 1\nquantization: {bnb_4bit_quant_type: fp4}")).pack_key
    checkpointing = arm(("  warmup_steps: 5", "  warmup_steps: 5\n  gradient_checkpointing: true"))
    assert one.pack_key != checkpointing.pack_key


def test_an_evaluation_has_a_hash_of_its_own():
    one = arm()
    assert one.eval_hash() != one.spec_hash
    assert one.eval_hash() != arm(("  r: 8", "  r: 4")).eval_hash()
    assert one.eval_hash() != arm(("[loss, number]", "[loss]")).eval_hash()
    assert one.eval_hash() != arm(("  train: org/rows", "  train: org/rows\n  limit: {eval: 10}")).eval_hash()
    assert one.eval_hash() == arm(("[loss, number]", "[number, loss]")).eval_hash()
    assert one.eval_hash() == arm(("primary_metric: eval.loss", "primary_metric: eval.perplexity")).eval_hash()
    small_batch = arm(("  primary_metric: eval.loss", "  primary_metric: eval.loss\n  per_device_eval_batch_size: 2"))
    assert one.eval_hash() == small_batch.eval_hash()


def test_the_length_of_generation_counts_only_where_text_is_generated():
    longer = ("  primary_metric: eval.loss", "  primary_metric: eval.loss\n  max_new_tokens: 5")
    assert arm(longer).eval_hash() != arm().eval_hash()
    assert arm(longer, ("[loss, number]", "[loss]")).eval_hash() == arm(("[loss, number]", "[loss]")).eval_hash()


def test_the_bare_base_is_evaluated_once_for_all_ranks():
    assert arm().base_eval_hash() == arm(("  r: 8", "  r: 4"), ("2e-3", "1e-3")).base_eval_hash()
    assert arm().base_eval_hash() != arm(("rows: 20}", "rows: 30}")).base_eval_hash()
    assert arm().base_eval_hash() != arm().eval_hash()


@settings(max_examples=50, deadline=None)
@given(st.permutations(["q_proj", "k_proj", "v_proj", "o_proj"]))
def test_the_order_of_modules_never_changes_a_hash(modules):
    one = arm()
    lora = LoraSpec(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=tuple(modules))
    expected = LoraSpec(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=("k_proj", "o_proj", "q_proj", "v_proj"))
    assert one.model_copy(update={"lora": lora}).spec_hash == one.model_copy(update={"lora": expected}).spec_hash


def test_the_hash_of_a_known_arm_stays_what_it_was():
    """A change here means that every stored result is trained again: raise HASH_VERSION on purpose, not by accident."""
    assert arm().spec_hash == "21f6728f4c2665dbd077186cf37d224510b58e8bd6db975a6ef9c30df252bc8f"


def test_evaluations_that_stop_an_arm_are_in_its_hash():
    patience = (EVERY_5[0], f"{EVERY_5[1]}\n  early_stopping_patience: 2")
    one = arm(patience)
    other = arm((EVERY_5[0], "  warmup_steps: 5\n  eval_steps: 4\n  early_stopping_patience: 2"))
    assert len({one.spec_hash, other.spec_hash, arm(EVERY_5).spec_hash}) == 3
    assert one.params["training.early_stopping_patience"] == 2
    assert one.params["training.eval_steps"] == 5
