from __future__ import annotations

import threading
import time

import pytest

from rankwise.exceptions import StorageError
from rankwise.tracking.run import SystemMonitor, SystemSampler, parse_nvidia_smi


class FakeRun:
    """Collects samples where a Run would write them."""

    def __init__(self, run_id, started_ms=0):
        self.run_id = run_id
        self.started_ms = started_ms
        self.samples = []
        self.arrived = threading.Event()
        self.error = None

    def metrics(self, values, step, timestamp_ms):
        self.samples.append((values, step, timestamp_ms))
        self.arrived.set()
        if self.error is not None:
            raise self.error


@pytest.fixture
def monitor():
    made = SystemMonitor(interval=0.02, sample=lambda: {"cpu_utilization_percentage": 5.0})
    yield made
    made.close()


def test_one_thread_writes_to_all_attached_runs(monitor):
    runs = [FakeRun("a"), FakeRun("b")]
    for run in runs:
        monitor.attach(run)
    assert all(run.arrived.wait(5) for run in runs)
    assert runs[1].samples[0][0] == {"system/cpu_utilization_percentage": 5.0}
    assert sum(thread.name == "rankwise-system-metrics" for thread in threading.enumerate()) == 1


def test_a_detached_run_gets_nothing_more(monitor):
    run = FakeRun("a")
    monitor.attach(run)
    assert run.arrived.wait(5)
    monitor.detach(run)
    count = len(run.samples)
    time.sleep(0.1)
    assert len(run.samples) == count


def test_steps_count_intervals_since_the_run_began_so_that_a_resumed_run_goes_on(monitor):
    now = time.time_ns() // 1_000_000
    run = FakeRun("a", started_ms=now - 1000)
    monitor.attach(run)
    assert run.arrived.wait(5)
    assert run.samples[0][1] >= 50


def test_a_full_disk_does_not_end_the_thread(monitor, caplog):
    run = FakeRun("a")
    run.error = StorageError("disk full")
    monitor.attach(run)
    assert run.arrived.wait(5)
    run.arrived.clear()
    assert run.arrived.wait(5)
    assert "lost a sample of system metrics: disk full" in caplog.text


def test_the_thread_ends_with_the_monitor(monitor):
    monitor.attach(FakeRun("a"))
    monitor.close()
    monitor._thread.join(5)
    assert not monitor._thread.is_alive()


def test_a_sample_has_mlflows_names_and_sane_values():
    values = SystemSampler().sample()
    assert {
        "cpu_utilization_percentage",
        "system_memory_usage_megabytes",
        "system_memory_usage_percentage",
        "disk_usage_percentage",
        "disk_usage_megabytes",
        "disk_available_megabytes",
    } <= set(values)
    assert 0 < values["system_memory_usage_percentage"] <= 100
    assert values["process_memory_usage_megabytes"] > 1


def test_gpu_figures_come_out_of_nvidia_smi():
    text = "0, 97, 40000, 80000, 350.5, 700.00\n1, 3, 100, 80000, 50, 700\n"
    metrics = parse_nvidia_smi(text)
    assert metrics["gpu_0_utilization_percentage"] == 97
    assert metrics["gpu_0_memory_usage_megabytes"] == pytest.approx(41943.04)
    assert metrics["gpu_0_memory_usage_percentage"] == 50
    assert metrics["gpu_0_power_usage_watts"] == 350.5
    assert metrics["gpu_1_power_usage_percentage"] == pytest.approx(100 * 50 / 700)


def test_what_a_card_does_not_report_is_left_out():
    assert parse_nvidia_smi("0, [N/A], 40000, 80000, [N/A], [N/A]") == {
        "gpu_0_memory_usage_megabytes": pytest.approx(41943.04),
        "gpu_0_memory_usage_percentage": 50,
    }
