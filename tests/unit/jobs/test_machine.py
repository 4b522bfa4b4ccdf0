import pytest
from helpers.fault_table import record
from helpers.machine_runs import LONG, SHORT, run_machine


def test_whatever_happens_the_queue_is_as_the_model_says(tmp_path):
    run_machine(f"sqlite:///{tmp_path / 'q.db'}", tmp_path / "lock", SHORT)


@pytest.mark.faults
def test_whatever_happens_for_long_the_queue_is_as_the_model_says(tmp_path):
    run_machine(f"sqlite:///{tmp_path / 'q.db'}", tmp_path / "lock", LONG)
    record("state machine, SQLite", "as the model says, 0 stuck", f"{LONG.max_examples} runs of up to 50 steps")
