"""The placer over a stand-in for Ray: what it refuses, what it says, what it leaves behind."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from rankwise.cli.worker import passed_on, refuse_unshared
from rankwise.exceptions import ClusterError
from rankwise.settings import Settings
from rankwise.worker.ray_placer import ClusterNode, RayPlacer, RayWorker, WorkerResources, connect


class RayError(Exception):
    pass


class Ray:
    """As much of Ray as the placer uses; places the first `room` actors."""

    exceptions = SimpleNamespace(RayError=RayError, RayActorError=RayError)

    def __init__(self, room=9, gpus=4.0, broken=()):
        self.room = room
        self.gpus = gpus
        self.broken = broken
        self.made = []
        self.killed = []
        self.util = SimpleNamespace(list_named_actors=self._names)

    def nodes(self):
        resources = {"CPU": 8.0, "GPU": self.gpus} if self.gpus else {"CPU": 8.0}
        common = {"NodeID": "n", "NodeManagerAddress": "10.0.0.1", "NodeManagerHostname": "one"}
        small = {**common, "NodeManagerHostname": "small", "Alive": True, "Resources": {"CPU": 1.0}}
        return [{**common, "Alive": True, "Resources": resources}, small, {**common, "Alive": False, "Resources": {}}]

    def available_resources(self):
        return {"CPU": 2.0}

    def remote(self, cls):
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda *given: self._make(options, given))
        )

    def _make(self, options, given):
        handle = SimpleNamespace(options=options, given=given, number=len(self.made))
        handle.where = SimpleNamespace(remote=lambda: f"where-{handle.number}")
        self.made.append(handle)
        return handle

    def wait(self, references, num_returns, timeout):
        return references[: self.room], references[self.room :]

    def get(self, reference):
        number = int(reference.partition("-")[2])
        if number in self.broken:
            raise RayError("Traceback\n  ModuleNotFoundError: No module named 'rankwise'\n")
        return {"host": "one", "node_id": "n", "pid": 100 + number}

    def kill(self, handle, no_restart):
        self.killed.append(handle.number)

    def get_actor(self, name, namespace):
        return next(handle for handle in self.made if handle.options["name"] == name)

    def _names(self):
        alive = [handle.options["name"] for handle in self.made if handle.number not in self.killed]
        return [*alive, "somebody else's"]


def test_workers_are_actors_that_ray_never_starts_again():
    ray = Ray()
    placed = RayPlacer(ray).start(2, WorkerResources(gpus=1, cpus=2), environment={"A": "b"}, command=["x"], grace=5)
    assert [(worker.state, worker.pid) for worker in placed] == [("running", 100), ("running", 101)]
    for handle in ray.made:
        assert handle.options.items() >= {
            "num_gpus": 1, "num_cpus": 2, "max_restarts": 0, "max_task_retries": 0, "lifetime": "detached"
        }.items()  # fmt: skip
        assert handle.given == (["x"], {"A": "b"}, 5)
    assert [worker.name for worker in RayPlacer(ray).workers()] == sorted(worker.name for worker in placed)


def test_a_worker_on_a_node_without_a_gpu_sees_none():
    ray = Ray(gpus=0)
    RayPlacer(ray).start(1, WorkerResources(gpus=0), environment={}, command=["x"])
    assert ray.made[0].given[1] == {"CUDA_VISIBLE_DEVICES": ""}


def test_what_no_node_can_hold_is_said_at_once():
    ray = Ray(gpus=0)
    with pytest.raises(
        ClusterError, match=r"no node can run a worker that needs 1 GPU and 1 CPU: the nodes are one \("
    ):
        RayPlacer(ray).start(2, WorkerResources(), environment={})
    assert ray.made == []


def test_what_has_no_place_in_time_is_said_and_given_up():
    ray = Ray(room=1)
    with pytest.raises(ClusterError) as raised:
        RayPlacer(ray).start(3, WorkerResources(), environment={}, timeout=60)
    first, second = str(raised.value).splitlines()
    assert first.startswith(
        "2 of 3 workers were not placed within 60 s: each needs 1 GPU and 1 CPU, free are 0 GPU and 2"
    )
    assert second == "1 workers were placed and keep running"
    assert ray.killed == [1, 2]


def test_a_node_without_rankwise_is_said():
    with pytest.raises(ClusterError, match="a worker could not be started: ModuleNotFoundError: No module named"):
        RayPlacer(Ray(broken=[0])).start(1, WorkerResources(), environment={})


def test_a_worker_that_does_not_answer_is_pending():
    ray = Ray()
    placer = RayPlacer(ray)
    placer.start(1, WorkerResources(), environment={})
    ray.room = 0
    assert placer.workers() == [RayWorker(name=ray.made[0].options["name"], state="pending")]


@pytest.mark.parametrize(
    ("address", "environment", "problem"),
    [
        ("ray://head:10001", {"RAY_AUTH_MODE": "token"}, "client protocol is not supported"),
        ("10.0.0.1:6379", {}, "RAY_AUTH_MODE is not `token`"),
        ("10.0.0.1:6379", {"RAY_AUTH_MODE": "disabled"}, "--insecure"),
    ],
)
def test_a_cluster_that_anybody_may_use_is_refused(address, environment, problem):
    with pytest.raises(ClusterError, match=problem), connect(address, environment):
        pass


@pytest.mark.parametrize(
    ("address", "environment", "insecure"),
    [("auto", {}, False), ("10.0.0.1:1", {"RAY_AUTH_MODE": "token"}, False), ("10.0.0.1:1", {}, True)],
)
def test_without_ray_the_extra_is_named(monkeypatch, address, environment, insecure):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"pip install 'rankwise\[ray\]'"), connect(
        address, environment, insecure=insecure
    ):  # fmt: skip
        pass


HERE = ClusterNode(node_id="a", address="127.0.0.1", host="here", cpus=1, gpus=0)
THERE = ClusterNode(node_id="b", address="203.0.113.9", host="there", cpus=1, gpus=0)
SHARED = {"RANKWISE_DATABASE_URL": "postgresql://me:secret@db/q", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}


def test_sqlite_across_nodes_is_refused(tmp_path):
    home = {"RANKWISE_HOME": str(tmp_path)}
    refuse_unshared(Settings.load(home), [HERE])
    refuse_unshared(Settings.load({**home, **SHARED}), [HERE, THERE])
    with pytest.raises(ClusterError, match=r"there \(203\.0\.113\.9\).* set RANKWISE_DATABASE_URL to a PostgreSQL"):
        refuse_unshared(Settings.load(home), [HERE, THERE])
    with pytest.raises(ClusterError, match="set MLFLOW_TRACKING_URI to an MLflow server"):
        refuse_unshared(Settings.load({**home, "RANKWISE_DATABASE_URL": "postgresql://db/q"}), [THERE])


def test_a_worker_elsewhere_gets_this_ones_stores_and_not_its_other_secrets(tmp_path):
    environment = {"RANKWISE_HOME": "here", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x", "PATH": "/bin", **SHARED}
    given = passed_on(Settings.load({**environment, "RANKWISE_HOME": str(tmp_path)}), environment)
    assert given == {**SHARED, "RANKWISE_HOME": str(tmp_path)}
