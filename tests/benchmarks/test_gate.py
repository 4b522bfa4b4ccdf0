import math

from benchmarks.gate import Gate, difference
from benchmarks.report import invalid


def test_ways_with_the_same_losses_are_valid():
    gate = Gate(tolerance=1e-5)
    gate.add("plain peft loop", {"r=2": [2.0, 1.0]})
    gate.add("pack of 2", {"r=2": [2.0, 1.000001], "r=4": [3.0, 3.0]})
    verdicts = gate.verdicts()
    assert verdicts["pack of 2"]["valid"]
    assert (verdicts["pack of 2"]["losses"], verdicts["pack of 2"]["arms"]) == (2, 1)


def test_a_loss_that_differs_makes_both_ways_of_a_pair_invalid():
    gate = Gate(tolerance=1e-5)
    gate.add("plain peft loop", {"r=2": [2.0, 1.0]})
    gate.add("pack of 2", {"r=2": [2.0, 1.0001]})
    unit = {"gate": gate.verdicts(), "tolerance": 1e-5, "rounding": 0.0}
    assert [line.partition(":")[0] for line in invalid({"throughput-1": unit})] == ["throughput-1", "throughput-1"]


def test_a_later_block_that_differs_is_not_hidden_by_an_earlier_one_that_agrees():
    gate = Gate(tolerance=1e-5)
    gate.add("plain peft loop", {"r=2": [2.0]})
    gate.add("pack of 1", {"r=2": [2.0]})
    gate.add("pack of 1", {"r=2": [2.1]})
    assert not gate.verdicts()["pack of 1"]["valid"]


def test_a_way_that_can_be_compared_with_nobody_is_invalid():
    gate = Gate(tolerance=1e-5)
    gate.add("pack of 1", {"r=2": [2.0]})
    gate.add("plain peft loop", {"r=4": [2.0]})
    assert not any(verdict["valid"] for verdict in gate.verdicts().values())


def test_the_rounding_of_the_loss_is_allowed_for_pairs_with_trl_only():
    gate = Gate(tolerance=1e-5, rounding=1e-3)
    gate.add("plain peft loop", {"r=2": [2.0], "r=4": [2.0]})
    gate.add("P2: SFTTrainer, one base", {"r=2": [2.0005]})
    gate.add("pack of 1", {"r=2": [2.0], "r=4": [2.0005]})
    verdicts = gate.verdicts()
    assert verdicts["P2: SFTTrainer, one base"]["valid"]
    assert not verdicts["pack of 1"]["valid"]


def test_a_loss_that_is_not_a_number_differs_from_everything():
    assert difference([math.nan], [1.0]) == math.inf
    assert difference([1.0], [math.nan]) == math.inf


def test_of_a_pair_with_trl_the_first_steps_count_and_the_largest_difference_is_told():
    gate = Gate(tolerance=1e-5)
    gate.add("P1: SFTTrainer, a process an arm", {"r=2": [3.0, 2.0, 1.0, 0.9], "r=4": [3.0, 2.0, 1.0]})
    gate.add("pack of 8", {"r=2": [3.0, 2.0, 1.0, 0.8], "r=4": [3.0, 2.0, 1.0]})
    verdict = gate.verdicts()["pack of 8"]
    assert verdict["valid"]
    assert 0.1 < verdict["difference"] < 0.13
    gate.add("pack of 8", {"r=4": [3.0, 2.1, 1.0]})
    assert not gate.verdicts()["pack of 8"]["valid"]
