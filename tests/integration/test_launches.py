"""A layer takes as many operations for many arms as for few, and a step waits for the GPU only where it is allowed."""

from __future__ import annotations

import json

import pytest
from benchmarks import launches

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda', but CUDA is not available")

ALLOWED = {
    ("read by tolist", "training/step.py"): "losses and norms, once a step, after the update has been queued",
}


@pytest.mark.parametrize(
    ("dropout", "checkpointing", "most"), [(False, False, 200), (True, False, 240), (True, True, 310)]
)
def test_operations_of_a_layer_do_not_depend_on_the_number_of_arms(dropout, checkpointing, most):
    two, eight = (
        launches.figures(arms, dropout=dropout, checkpointing=checkpointing)["operations_per_layer"] for arms in (2, 8)
    )
    assert eight <= most
    assert eight == pytest.approx(two, rel=0.1)


@pytest.mark.parametrize("shortest", [12, 2], ids=["rows of their own", "shared sequences"])
def test_a_step_waits_for_the_gpu_only_where_it_is_allowed(shortest):
    count = launches.count_step(3, 2, dropout=True, checkpointing=False, rows=4, shortest=shortest)
    found = {(name, place.partition(":")[0]): times for (name, place), times in count.synchronizations.items()}
    assert found == dict.fromkeys(ALLOWED, 1)


def test_the_figures_are_printed_as_json(capsys):
    launches.main(["--json", "--arms", "1"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["dropout"], row["checkpointing"]) for row in rows] == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]
    assert all(row["operations_per_layer"] > 100 and row["synchronizations_per_step"] >= 1 for row in rows)
