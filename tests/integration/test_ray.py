"""Workers on a real Ray cluster, whose nodes and head are stopped under them. The queue is a real PostgreSQL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from helpers.databases import emptied
from helpers.fault_table import record
from helpers.waiting import until

from rankwise.cli.jobs import status
from rankwise.cli.worker import cluster as cluster_command
from rankwise.exceptions import ClusterError
from rankwise.jobs.job import JobKind, JobState, NewJob, Outcome
from rankwise.jobs.store import JobStore
from rankwise.worker.ray_placer import PYTHON, WorkerResources, connect

if find_spec("ray") is None:
    # `make faults` installs it; importing it takes seconds, which collecting tests should not.
    pytest.skip("needs the extra ray", allow_module_level=True)
pytestmark = [
    pytest.mark.faults,
    # What Ray's own processes leave open, and what its start says about its defaults.
    pytest.mark.filterwarnings("default"),
]
WORKER = Path(__file__).parents[1] / "helpers" / "queue_worker.py"
CPU = WorkerResources(cpus=1, gpus=0)
JOBS = 60


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    # The nodes of a dead head give up after so many seconds; by default after a minute.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    memory = 80 * 1024 * 1024
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": memory})
    cluster.add_node(num_cpus=1, object_store_memory=memory)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def store(postgresql, tmp_path, monkeypatch):
    emptied(postgresql)
    monkeypatch.setenv("RANKWISE_DATABASE_URL", postgresql)
    store = JobStore(postgresql, lock=tmp_path / "lock")
    store.submit([NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash=str(number), spec={}) for number in range(JOBS)])
    yield store
    store.close()
    emptied(postgresql)


@pytest.fixture
def command(postgresql, tmp_path):
    notes = str(tmp_path / "notes")
    own = [PYTHON, str(WORKER), "--url", postgresql, "--notes", notes, "--seconds", "0.5", "--lease", "5", "--drain"]
    yield own
    until(lambda: not workers(notes))


def workers(notes):
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if notes in (process.info["cmdline"] or []) and "rankwise.supervise" not in process.info["cmdline"]
    ]


def finish_with_a_local_worker(command):
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=120)


def assert_each_job_ended_once(store):
    assert store.counts()[JobState.SUCCEEDED] == JOBS
    outcomes = Counter()
    for job in store.jobs():
        attempts = store.attempts(job.id)
        outcomes.update(str(attempt.outcome) for attempt in attempts)
        assert [attempt.outcome for attempt in attempts].count(Outcome.SUCCEEDED) == 1
    return outcomes


def figure(outcomes):
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))


def test_workers_are_placed_listed_and_stopped(cluster, store, command):
    since = time.monotonic()
    with connect(cluster.address, {}, insecure=True) as placer:
        placed = placer.start(2, CPU, environment={}, command=command, grace=10)
        assert len({worker.node_id for worker in placed}) == 2, "spread over the nodes"
        until(lambda: store.counts()[JobState.SUCCEEDED] >= 4)
    # The workers go on without whoever placed them.
    before = store.counts()[JobState.SUCCEEDED]
    until(lambda: store.counts()[JobState.SUCCEEDED] >= before + 4)
    with connect(cluster.address, {}, insecure=True) as placer:
        assert [worker.name for worker in placer.workers()] == sorted(worker.name for worker in placed)
        with pytest.raises(
            ClusterError, match=r"1 of 1 workers were not placed within 3 s: each needs 0 GPU and 1 CPU"
        ):
            placer.start(1, CPU, environment={}, command=command, timeout=3)
        assert len(placer.workers()) == 2, "what found no place is not left behind"
        asked = time.monotonic()
        with pytest.raises(ClusterError, match="no node can run a worker that needs 1 GPU and 1 CPU"):
            placer.start(1, WorkerResources(), environment={}, command=command)
        assert time.monotonic() - asked < 2
        assert placer.stop(grace=20) == []
        assert placer.workers() == []
    finish_with_a_local_worker(command)
    outcomes = assert_each_job_ended_once(store)
    assert outcomes["lost"] == outcomes["failed"] == 0
    seconds = time.monotonic() - since
    record(
        "Ray: workers stopped by `cluster stop`",
        "preempted, none lost, each job once",
        f"{figure(outcomes)}, {seconds:.0f} s",
    )


def test_a_node_that_is_stopped_costs_a_worker_and_no_job(cluster, store, command):
    with connect(cluster.address, {}, insecure=True) as placer:
        placer.start(2, CPU, environment={}, command=command, grace=5)
        until(lambda: store.counts()[JobState.SUCCEEDED] >= 6)
        (node,) = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: len(placer.nodes()) == 1)
        until(lambda: store.counts()[JobState.SUCCEEDED] == JOBS)
    outcomes = assert_each_job_ended_once(store)
    record("Ray: a node stopped", "all jobs end exactly once", figure(outcomes))


def test_a_head_that_is_stopped_costs_workers_and_no_job(cluster, store, command):
    with connect(cluster.address, {}, insecure=True) as placer:
        placer.start(2, CPU, environment={}, command=command, grace=5)
        until(lambda: store.counts()[JobState.SUCCEEDED] >= 6)
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    before = store.counts()[JobState.SUCCEEDED]
    until(lambda: not workers(command[5]), timeout=90)
    after = store.counts()[JobState.SUCCEEDED]
    finish_with_a_local_worker(command)
    outcomes = assert_each_job_ended_once(store)
    record("Ray: the head stopped", "all jobs end exactly once", f"{figure(outcomes)}; {after - before} without a head")


def test_the_commands_place_real_workers(cluster, store):
    def call(command, *arguments):
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    where = ["--address", cluster.address, "--insecure"]
    # No job of these is for a real worker.
    store.cancel([job.id for job in store.jobs()])
    started = json.loads(
        call(cluster_command, "start", *where, "--workers", "2", "--gpus-per-worker", "0", "--json").stdout
    )
    shown = json.loads(call(cluster_command, "status", *where, "--json").stdout)
    assert [worker["name"] for worker in shown["workers"]] == sorted(worker["name"] for worker in started["workers"])
    assert [node["cpus"] for node in shown["nodes"]] == [1, 1]
    until(lambda: len(store.workers()) == 2)
    assert len(json.loads(call(status, "--json").stdout)["workers"]) == 2
    assert "all workers have stopped" in call(cluster_command, "stop", *where).stderr
    assert store.workers() == []
    assert json.loads(call(cluster_command, "status", *where, "--json").stdout)["workers"] == []


def test_a_cluster_with_a_token_refuses_who_has_none(monkeypatch, store, command, tmp_path):
    from ray.cluster_utils import Cluster

    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 40, "RAY_USAGE_STATS_ENABLED": "0"}
    code = (
        "import sys\nfrom ray.cluster_utils import Cluster\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1, 'object_store_memory': 80 * 1024**2})\n"
        "print(cluster.address, flush=True)\nsys.stdin.read()\ncluster.shutdown()\n"
    )
    assert Cluster
    head = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    address = head.stdout.readline().strip()
    ask = (
        "import os, sys\nfrom rankwise.worker.ray_placer import connect\n"
        "with connect(sys.argv[1], os.environ) as placer: print(len(placer.nodes()))\n"
    )

    def connected(**changes):
        own = {**environment, **changes}
        return subprocess.run([sys.executable, "-c", ask, address], env=own, capture_output=True, text=True)

    try:
        assert connected().stdout == "1\n"
        assert "no Ray cluster answers" in connected(RAY_AUTH_TOKEN="b" * 40).stderr
        assert "RAY_AUTH_MODE is not `token`" in connected(RAY_AUTH_MODE="disabled").stderr
    finally:
        head.communicate("", timeout=60)
