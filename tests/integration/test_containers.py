"""The team of compose.yaml in real containers: built, started, used, looked into, cut off, saved and restored.

`make proofs` runs this where an engine with Compose and BuildKit is: 15 minutes, 10 GB. Base images that cannot be
fetched are replaced by ones with the same contract, built of Debian and of the packages that other tests use
(`helpers.containers`); that needs root and debootstrap.
"""

from __future__ import annotations

import json
import subprocess
import time

import pytest
import requests
from helpers.containers import Containers, missing
from helpers.project import make_project
from helpers.waiting import until

pytestmark = pytest.mark.proof
DEFINITION = "experiments/tiny/tiny.yaml"
CLI = ("run", "--rm", "-T", "rankwise")


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    if lacks := missing():
        pytest.skip(f"no container engine: {lacks}")
    team = Containers.make(tmp_path_factory.mktemp("containers"), "--workers", "cpu")
    project = make_project(team.directory / "experiments" / "tiny", fresh=True)
    for path in project.directory.rglob("*"):
        # Only their owner, who runs the tests, may read what safetensors writes; the container has a user of its own.
        path.chmod(0o755 if path.is_dir() else 0o644)
    team.down(volumes=True)
    try:
        team.succeed("build", timeout=1800)
        team.succeed("up", "--detach", "--wait", timeout=900)
        yield team
    finally:
        team.down(volumes=True)


def jobs(team):
    return json.loads(team.succeed(*CLI, "jobs", "list", "--json"))["jobs"]


def ended(team):
    states = {job["state"] for job in jobs(team)}
    assert "failed" not in states, team.succeed("logs", "worker-cpu")
    return states == {"succeeded"}


def started(team, service):
    return team.inspect(service, "{{.Id}} {{.State.StartedAt}}")


@pytest.fixture(scope="module")
def compared(team):
    """What `compare` says after the sweep, and what ran meanwhile was not started again."""
    before = started(team, "mlflow") + started(team, "worker-cpu")
    team.succeed(*CLI, "submit", DEFINITION)
    until(lambda: ended(team), timeout=400, what="the sweep")

    def told():
        arms = json.loads(team.succeed(*CLI, "compare", "tiny", "--json"))
        return arms if {arm["status"] for arm in arms["arms"]} == {"FINISHED"} else None

    until(told, timeout=120, what="the end of all runs")
    assert started(team, "mlflow") + started(team, "worker-cpu") == before, "commands restart nothing"
    return told()


def test_a_sweep_submitted_in_one_container_is_done_in_another(team, compared):
    assert [arm["status"] for arm in compared["arms"]] == ["FINISHED", "FINISHED"]
    shown = json.loads(team.succeed(*CLI, "inspect", "models:/tiny-adder@best", "--json"))
    assert all(check["ok"] for check in shown["checks"])
    predicted = team.succeed(
        *CLI, "predict", "--submit", "--watch", "--model", "models:/tiny-adder@best",
        "--prompt", "{a} plus {b}", "--max-new-tokens", "3", "experiments/tiny/rows.jsonl", "predictions/out.jsonl",
    )  # fmt: skip
    assert "Traceback" not in predicted
    out = team.succeed("run", "--rm", "-T", "--entrypoint", "cat", "rankwise", "predictions/out.jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 80
    assert {row["model"] for row in rows} == {
        next(arm["model_uri"] for arm in compared["arms"] if arm["spec_hash"] == compared["best"])
    }


def test_processes_in_containers_have_no_rights_that_they_do_not_need(team, compared):
    users = {"worker-cpu": "10001", "mlflow": "10001", "postgres": "999", "object-store": "1000"}
    for service, user in users.items():
        status = team.succeed("exec", "-T", service, "cat", "/proc/1/status")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == [user] * 4, service
        assert {fields[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}, service
        assert fields["NoNewPrivs"] == "1", service
        written = team.compose("exec", "-T", service, "sh", "-c", "echo x > /etc/x")
        assert written.returncode != 0, service
        assert "Read-only file system" in written.stderr, service


def test_only_mlflow_is_reached_from_the_host_and_no_worker_reaches_the_object_store(team, compared):
    ports = {
        service: team.inspect(service, "{{json .NetworkSettings.Ports}}")
        for service in ("mlflow", "postgres", "object-store", "worker-cpu")
    }
    published = {
        service: [binding for text in texts for bindings in json.loads(text).values() for binding in bindings or []]
        for service, texts in ports.items()
    }
    (binding,) = published.pop("mlflow")
    assert binding["HostIp"] == "127.0.0.1"
    assert not any(published.values())
    assert requests.get(f"{team.url}/health", timeout=30).status_code == 200
    assert requests.get(f"{team.url}/api/2.0/mlflow/experiments/search?max_results=1", timeout=30).status_code == 401
    seen = team.compose("exec", "-T", "worker-cpu", "getent", "hosts", "postgres", "mlflow", "object-store")
    assert {line.split()[1] for line in seen.stdout.splitlines()} == {"postgres", "mlflow"}
    # Stores have no way out: their networks are internal.
    outside = "import socket; socket.create_connection(('1.1.1.1', 53), 3)"
    assert (
        team.compose(
            "run", "--rm", "-T", "--no-deps", "--entrypoint", "python", "bucket-copy", "-c", outside
        ).returncode
        != 0
    )


def test_no_secret_is_in_a_log_of_a_container(team, compared):
    logs = team.succeed("--profile", "*", "logs", "--no-color")
    assert "mlflow" in logs
    secrets = [value for value in team.secrets.values() if len(value) == 48]
    assert len(secrets) == 9
    assert not [value for value in secrets if value in logs]


def test_doctor_finds_nothing_wrong_with_the_team(team, compared):
    done = team.compose(*CLI, "doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert not [name for name, finding in findings.items() if finding["state"] == "problem"], done.stdout
    for name in (
        "queue.database",
        "queue.clock",
        "mlflow.store",
        "mlflow.hosts",
        "mlflow.authentication",
        "mlflow.jobs",
    ):
        assert findings[name]["state"] == "ok", findings[name]


def test_a_worker_s_container_that_is_killed_comes_back_and_its_jobs_are_done(team, compared):
    steps = [
        "--set",
        "training.max_steps=400",
        "--set",
        "training.save_steps=20",
        "--set",
        "seed=7",
        "--set",
        "name=killed",
    ]
    team.succeed(*CLI, "submit", DEFINITION, *steps)
    until(lambda: any(job["state"] == "running" for job in jobs(team)), timeout=200, what="a job that runs")
    time.sleep(3)
    (container,) = team.containers("worker-cpu")
    before = started(team, "worker-cpu")
    (pid,) = team.inspect("worker-cpu", "{{.State.Pid}}")
    # As the machine's own end of memory would, and not by the engine, which would leave it down.
    subprocess.run(["kill", "-9", pid], check=True)
    until(lambda: started(team, "worker-cpu") != before, timeout=60, what="another start")
    assert team.containers("worker-cpu") == [container]
    until(lambda: ended(team), timeout=400, what="the sweep")
    assert any(job["attempts"] > 1 for job in jobs(team)), "it was cut off"
    best = json.loads(team.succeed(*CLI, "compare", "killed", "--json"))
    assert [arm["status"] for arm in best["arms"]] == ["FINISHED", "FINISHED"]


def test_a_stop_is_gentle_and_another_start_finds_all_of_it(team, compared):
    began = time.monotonic()
    team.succeed("stop", timeout=300)
    assert time.monotonic() - began < 60
    assert set(team.inspect("worker-cpu", "{{.State.ExitCode}}")) == {"0"}
    team.succeed("up", "--detach", "--wait", timeout=600)
    assert json.loads(team.succeed(*CLI, "compare", "tiny", "--json")) == compared


def test_a_backup_comes_back_in_fresh_volumes(team, compared):
    scripts = team.directory / "platform" / "deploy"

    def script(name):
        return subprocess.run(
            [scripts / name, team.work / "saved"],
            cwd=team.directory,
            env={**team.environment, "COMPOSE": "docker compose"},
            capture_output=True,
            text=True,
            check=False,
        )

    saved = script("backup.sh")
    assert saved.returncode == 0, saved.stderr
    team.down(volumes=True)
    team.succeed("up", "--detach", "--wait", "postgres", "object-store", timeout=300)
    team.succeed("run", "--rm", "-T", "bucket")
    restored = script("restore.sh")
    assert restored.returncode == 0, restored.stderr
    team.succeed("up", "--detach", "--wait", timeout=600)
    assert json.loads(team.succeed(*CLI, "compare", "tiny", "--json")) == compared
    shown = json.loads(team.succeed(*CLI, "inspect", "models:/tiny-adder@best", "--json"))
    assert all(check["ok"] for check in shown["checks"])


def test_jobs_are_done_by_the_nodes_of_a_ray_cluster(team, compared):
    team.succeed("stop", "worker-cpu")
    try:
        team.succeed("--profile", "ray", "up", "--detach", "--wait", "ray-head", "ray-node", timeout=600)
        team.succeed(*CLI, "submit", DEFINITION, "--set", "seed=8", "--set", "name=on-ray")
        begun = team.compose(
            "exec", "-T", "ray-head", "rankwise", "cluster", "start", "--gpus-per-worker", "0", "--drain"
        )
        assert begun.returncode == 0, begun.stderr
        until(lambda: ended(team), timeout=400, what="the sweep")
        assert [arm["status"] for arm in json.loads(team.succeed(*CLI, "compare", "on-ray", "--json"))["arms"]] == [
            "FINISHED",
            "FINISHED",
        ]
    finally:
        team.compose("--profile", "ray", "rm", "--stop", "--force", "ray-head", "ray-node")
