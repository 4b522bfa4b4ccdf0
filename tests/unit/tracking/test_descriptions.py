from __future__ import annotations

from helpers.arms import small_arms, small_experiment

from rankwise.tracking.notes import arm_note, base_note, sweep_note, table, varying_params


def test_a_sweeps_note_shows_what_varies_and_how_to_run_it_again():
    arms = small_arms((2, 4))
    note = sweep_note(small_experiment(), arms, command="rankwise run diamonds.yaml", results="r = 4 is best.")
    assert note.startswith("# diamonds\n\nr = 4 is best.\n\nWhich rank?\n\n"), "MLflow folds what comes later"
    assert "## 2 arms\n\n| arm | lora.r | lora.alpha |" in note
    assert f"| `{arms[1].short}` | 4 | 8 |" in note
    assert "Base `org/base` at `aaaa" in note
    assert "NF4 with double quantization" in note
    assert "Ranked by `eval.loss`" in note
    assert "```\nrankwise run diamonds.yaml\n```" in note


def test_a_sweep_of_hundreds_of_arms_fits_into_a_tag():
    note = sweep_note(small_experiment(), small_arms(tuple(range(1, 301))))
    assert "## 300 arms" in note
    assert "... and 260 more" in note
    assert len(note) < 7000


def test_a_single_arm_shows_its_rank():
    assert varying_params(small_arms((4,))) == ["lora.r"]


def test_an_arms_note_names_settings_results_and_model():
    (arm,) = small_arms((4,))
    note = arm_note(arm, model_uri="models:/pricer/3", metrics={"eval.loss": 0.123456789})
    assert note.startswith("# LoRA r = 4, alpha = 8 on q_proj, v_proj")
    assert 'load_model("models:/pricer/3")' in note
    assert "| `eval.loss` | 0.123457 |" in note
    assert "| `training.learning_rate` | 0.0002 |" in note
    assert arm.spec_hash in note


def test_the_bases_note_says_what_it_is():
    (arm,) = small_arms((4,))
    assert base_note(arm).startswith("# The base model")


def test_cells_of_a_table_cannot_break_it():
    assert table(["a|b"], [["1\n2"]]) == "| a\\|b |\n| --- |\n| 1 2 |"
