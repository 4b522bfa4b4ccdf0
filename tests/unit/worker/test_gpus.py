import pytest

from rankwise.worker import placers as gpus
from rankwise.worker.placers import listed_gpus, visible_gpus


@pytest.mark.parametrize(
    ("said", "names"),
    [("0,1", ("0", "1")), (" GPU-a , GPU-b", ("GPU-a", "GPU-b")), ("", ()), ("-1", ()), ("0,-1,1", ("0",))],
)
def test_what_the_environment_says_counts(said, names):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": said}) == names


def test_the_list_of_the_driver_is_read_with_divided_gpus():
    text = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)
  MIG 3g.40gb     Device  0: (UUID: MIG-a)
  MIG 3g.40gb     Device  1: (UUID: MIG-b)
"""
    assert listed_gpus(text) == ("GPU-1", "MIG-a", "MIG-b")
    assert listed_gpus("No devices found.\n") == ()


def test_a_machine_without_the_driver_has_none(monkeypatch):
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    assert visible_gpus({}) == ()
