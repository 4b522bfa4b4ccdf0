"""All checks, in the order in which their findings are shown."""

from __future__ import annotations

from rankwise.tasks.doctor import gpu, machine, network, queue, software, tracking
from rankwise.tasks.doctor.finding import Check

CHECKS = (
    Check(name="python", look=software.python),
    Check(name="libraries", look=software.libraries),
    Check(name="memory", look=machine.memory),
    Check(name="disk", look=machine.disks, slow="a disk hangs: see `df` and the kernel's log"),
    Check(name="disk.sqlite", look=machine.file_systems, slow="a mount hangs: see `df` and `mount`"),
    Check(name="gpu.driver", look=gpu.driver, timeout=20.0, slow="the driver hangs: see `nvidia-smi`"),
    Check(name="compute", look=gpu.compute, timeout=gpu.COMPUTE_S + 5),
    Check(name="queue.database", look=queue.queue, timeout=30.0, slow="the database hangs: see its log and its locks"),
    Check(name="mlflow.store", look=tracking.mlflow, timeout=tracking.MLFLOW_S + 5),
    Check(name="hub", look=network.hub, timeout=15.0, slow="set HF_HUB_OFFLINE=1 where there is no network"),
    Check(name="ray", look=network.ray),
    Check(name="signing", look=machine.keys),
)
