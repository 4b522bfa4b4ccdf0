from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.definitions import DEFINITION, changed

from rankwise.cli.experiment import command_line, plan, schema, submit, validate
from rankwise.exceptions import ConfigError
from rankwise.experiment.experiment import load_experiment

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
HEAVY = ("torch", "transformers", "mlflow", "datasets", "peft", "sqlalchemy", "numpy")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(DEFINITION)
    return path


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_validate_says_what_a_file_holds(file):
    assert run(validate, file).stdout == f"{file}: valid: small, 2 arms\n"
    assert run(validate, file, "--set", "sweep.parameters.lora.r=[4]").stdout == f"{file}: valid: small, 1 arm\n"


def test_validate_raises_all_problems_for_the_caller_to_print(file):
    with pytest.raises(ConfigError) as caught:
        run(validate, file, "--set", "lora.r=0", "--set", "training.max_steps=x")
    assert len(caught.value.problems) == 2


def test_plan_prints_the_contract_s_json(file):
    data = json.loads(run(plan, file, "--no-estimates", "--json").stdout)
    arms = load_experiment(file).arms
    assert data["experiment"] == "small"
    assert [arm["spec_hash"] for arm in data["arms"]] == [arm.spec_hash for arm in arms]
    assert [arm["params"]["lora.r"] for arm in data["arms"]] == [4, 8]
    assert [arm["estimates"] for arm in data["arms"]] == [{"steps": 20, "tokens": 163840}] * 2


def test_plan_prints_a_table_and_says_that_a_hash_can_change(file, tmp_path):
    result = run(plan, file, "--no-estimates")
    assert "small: 2 arms" in result.stdout
    assert "163,840" in result.stdout
    assert result.stderr == ""
    open_pin = tmp_path / "open.yaml"
    open_pin.write_text(changed(("base_model_revision: 0123456789abcdef0123456789abcdef01234567\n", "")))
    assert "provisional" in run(plan, open_pin, "--no-estimates").stderr


def test_plan_without_a_configuration_says_how_to_get_estimates(file):
    result = run(plan, file)
    assert "No estimates: the configuration of org/base is not on this machine; set base_model_config." in result.stderr
    assert "?" in result.stdout


def test_plan_counts_the_rows_of_a_local_table(tmp_path):
    (tmp_path / "rows.csv").write_text("carat,price\n" + "1,2\n" * 100)
    file = tmp_path / "x.yaml"
    file.write_text(
        changed(
            ("  train: org/rows\n  train_revision: 0123456789abcdef0123456789abcdef01234567", "  train: rows.csv"),
            ("  max_steps: 20", "  num_train_epochs: 1"),
        )
    )
    data = json.loads(run(plan, file, "--no-estimates", "--json").stdout)
    assert data["arms"][0]["estimates"]["steps"] == 10


def test_plan_of_llama_3_1_8b_gives_the_known_numbers_before_any_download():
    file = EXPERIMENTS / "llama-3.1-8b-rank.yaml"
    arms = json.loads(run(plan, file, "--json").stdout)["arms"]
    (arm,) = [
        arm
        for arm in arms
        if arm["params"]["lora.r"] == 32 and arm["params"]["lora.target_modules"] == "k_proj,o_proj,q_proj,v_proj"
    ]
    assert arm["estimates"]["adapter_parameters"] == 27_262_976
    assert arm["estimates"]["adapter_bytes_fp32"] == 109_051_904
    assert {arm["params"]["lora.r"] for arm in arms} == {8, 16, 32, 64}
    assert {arm["params"]["lora.target_modules"] for arm in arms} == {"k_proj,o_proj,q_proj,v_proj", "all-linear"}
    assert "109.05 MB" in run(plan, file).stdout


def test_the_configuration_of_the_embedded_base_has_its_published_size():
    arms = json.loads(run(plan, EXPERIMENTS / "diamonds-rank.yaml", "--json").stdout)["arms"]
    assert arms[0]["estimates"]["base_parameters"] == 134_515_008


def test_the_printed_schema_is_the_shipped_file():
    assert run(schema).stdout == (EXPERIMENTS / "schema.json").read_text()


@pytest.mark.parametrize("command", [["validate"], ["plan", "--no-estimates"]])
def test_answers_come_at_once_and_without_the_machine_learning_libraries(command, file):
    # validate opens local data, for which it needs pyarrow and numpy.
    heavy = [name for name in HEAVY if command != ["validate"] or name != "numpy"]
    code = (
        "import sys\n"
        "from rankwise.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-c", code, *command, str(file)], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.splitlines()[-1] == "[]"
    # Processor time, since other tests may keep the processor from this one. It takes 0.4 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_a_search_by_results_is_not_submitted_but_run(tmp_path):
    file = tmp_path / "search.yaml"
    search = "  method: tpe\n  trials: 12\n  parameters:\n    lora.r: {int: [2, 64]}"
    file.write_text(changed(("  parameters:\n    lora.r: [4, 8]", search)))
    with pytest.raises(ConfigError, match=r"cannot all be submitted now; run the search with `rankwise run FILE`"):
        run(submit, file)


def test_a_search_with_early_stopping_says_what_is_known(tmp_path):
    file = tmp_path / "search.yaml"
    search = "  method: tpe\n  trials: 12\n  early_stopping: {min_steps: 5}\n  parameters:\n    lora.r: {int: [2, 64]}"
    file.write_text(changed(("  parameters:\n    lora.r: [4, 8]", search)))
    assert run(validate, file).stdout == f"{file}: valid: small, 12 arms in 2 rounds (tpe)\n"
    once = run(validate, file, "--set", "sweep.trials=8").stdout
    assert once == f"{file}: valid: small, 8 arms in 1 round (tpe)\n"
    shown = " ".join(run(plan, file, "--no-estimates").stdout.split())
    assert "small: 12 arms" in shown
    assert "The other 4 arms will be proposed from results (tpe, 2 rounds)." in shown
    assert "Successive halving by eval.loss: 3 of 12 continue at step 5; 105 steps expected, 240 without it." in shown


def test_a_first_rung_within_the_warm_up_is_spoken_of(tmp_path):
    file = tmp_path / "early.yaml"
    grid = "  parameters:\n    lora.r: [4, 8]"
    early = f"{grid}\n    training.warmup_steps: [1, 6]\n  early_stopping: {{min_steps: 5}}"
    file.write_text(changed((grid, early)))
    advice = (
        "sweep.early_stopping.min_steps: the first rung, at step 5, is within the warmup of 2 of 4 arms (6 steps), "
        "when arms have hardly learned anything; choose a later step\n"
    )
    checked = run(validate, file)
    assert (checked.exit_code, checked.stderr) == (0, advice)
    assert advice in run(plan, file, "--no-estimates").stderr
    file.write_text(changed((grid, early.replace("min_steps: 5", "min_steps: 7"))))
    assert run(validate, file).stderr == ""


def test_the_command_that_is_recorded_has_the_overrides():
    told = command_line(Path("my file.yaml"), ("training.max_steps=5", "sweep.parameters={lora.r: [2]}"))
    assert told == "rankwise run 'my file.yaml' --set=training.max_steps=5 '--set=sweep.parameters={lora.r: [2]}'"
    assert command_line(None, ("seed=1",), "models:/m/1") == "rankwise run --from=models:/m/1 --set=seed=1"
