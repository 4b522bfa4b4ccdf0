"""A whole team by compose.yaml: servers, accounts and two workers by its own commands, a sweep through them, a backup.

Everything runs as processes on loopback (`helpers.team`). `make proofs` runs this; about four minutes.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import boto3
import psutil
import psycopg
import pytest
import requests
from helpers.project import Project, make_project
from helpers.team import Team, compose_command, new_team
from helpers.waiting import until

pytestmark = pytest.mark.proof
PROMOTION = "promotion={min_examples: 5, max_overlap: 1}"
CLIENT = ("RANKWISE_DATABASE_URL", "PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "MLFLOW_TRACKING_URI")


@dataclass(frozen=True)
class Person:
    """Somebody at the command line, with an account of their own."""

    project: Project
    team: Team
    name: str | None
    password: str | None

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = self.team.environment("rankwise")
        account = {"MLFLOW_TRACKING_USERNAME": self.name, "MLFLOW_TRACKING_PASSWORD": self.password}
        given = {name: environment[name] for name in CLIENT} | {key: text for key, text in account.items() if text}
        return self.project.run(*arguments, env=given)

    def succeed(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def ask(self, method: str, path: str, **named) -> requests.Response:
        account = (self.name, self.password) if self.name else None
        return requests.request(method, self.team.url + path, auth=account, timeout=60, **named)


@pytest.fixture(scope="module")
def directory():
    with new_team("--workers", "cpu") as directory:
        yield directory


@pytest.fixture(scope="module")
def team(directory):
    team = Team(directory, directory.parent / "data", ("auth", "cpu", "tools"))
    try:
        team.up("worker-cpu", workers=2)
        team.wait_healthy("worker-cpu")
        yield team
    finally:
        team.down()


@pytest.fixture(scope="module")
def project(directory):
    # Where the workers' containers see it.
    return make_project(directory / "experiments" / "tiny", fresh=True)


@pytest.fixture(scope="module")
def passwords(team):
    return {
        name: team.run("accounts", "add", name, "--role", role).strip()
        for name, role in {"anna": "editor", "rita": "reader"}.items()
    }


@pytest.fixture(scope="module")
def anna(project, team, passwords):
    """An editor."""
    return Person(project, team, "anna", passwords["anna"])


@pytest.fixture(scope="module")
def rita(project, team, passwords):
    """A reader."""
    return Person(project, team, "rita", passwords["rita"])


@pytest.fixture(scope="module")
def nobody(project, team):
    return Person(project, team, None, None)


@pytest.fixture(scope="module")
def compared(anna):
    """What `compare` says after the sweep."""
    anna.succeed("submit", "tiny.yaml", "--set", PROMOTION)

    def done() -> bool:
        states = [job["state"] for job in json.loads(anna.succeed("jobs", "list", "--json"))["jobs"]]
        assert "failed" not in states, anna.succeed("jobs", "list")
        return set(states) == {"succeeded"}

    until(done, timeout=240, what="the sweep")
    # Runs are told of it by what the workers' outboxes send, every few seconds.
    until(lambda: set(statuses(anna.team).values()) == {"FINISHED"}, timeout=60, what="the end of all runs")
    return json.loads(anna.succeed("compare", "tiny", "--json"))


def bucket(team):
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{team.ports['8333']}",
        aws_access_key_id="admin",
        aws_secret_access_key=team.secrets["OBJECT_STORE_ADMIN_KEY"],
        region_name="us-east-1",
    )


def objects(team):
    pages = bucket(team).get_paginator("list_objects_v2").paginate(Bucket="mlflow")
    return {each["Key"]: each["Size"] for page in pages for each in page.get("Contents", [])}


def database(team, name, user, password):
    return psycopg.connect(host="127.0.0.1", port=team.ports["5432"], dbname=name, user=user, password=password)


def statuses(team):
    with database(team, "mlflow", "mlflow", team.secrets["MLFLOW_DB_PASSWORD"]) as connection:
        return dict(connection.execute("SELECT run_uuid, status FROM runs").fetchall())


def champion(anna):
    answer = anna.ask("GET", "/api/2.0/mlflow/registered-models/alias?name=tiny-adder&alias=champion")
    return answer.json()["model_version"]["version"] if answer.ok else None


def test_a_sweep_ends_in_postgresql_in_the_bucket_and_in_the_registry(team, anna, compared, tmp_path):
    arms = compared["arms"]
    assert [arm["status"] for arm in arms] == ["FINISHED", "FINISHED"]
    with database(team, "mlflow", "mlflow", team.secrets["MLFLOW_DB_PASSWORD"]) as connection:
        runs = dict(connection.execute("SELECT run_uuid, artifact_uri FROM runs").fetchall())
    assert {arm["run_id"] for arm in arms} < set(runs)
    assert all(uri.startswith("mlflow-artifacts:/") for uri in runs.values())
    with database(team, "rankwise", "rankwise", team.secrets["RANKWISE_DB_PASSWORD"]) as connection:
        trained = connection.execute("SELECT state FROM job WHERE kind = 'train'").fetchall()
        workers = connection.execute("SELECT DISTINCT worker FROM attempt").fetchall()
    assert trained == [("succeeded",), ("succeeded",)]
    assert len(workers) == 2, "both took their share"
    weights = [key for key in objects(team) if key.endswith("adapter_model.safetensors")]
    assert len(weights) == 2
    assert all(key.startswith("artifacts/") for key in weights)
    best = next(arm for arm in arms if arm["spec_hash"] == compared["best"])
    target = tmp_path / "pulled"
    anna.succeed("pull", "models:/tiny-adder@best", str(target))
    (key,) = [key for key in weights if objects(team)[key] == (target / "adapter_model.safetensors").stat().st_size]
    stored = bucket(team).get_object(Bucket="mlflow", Key=key)["Body"].read()
    assert stored == (target / "adapter_model.safetensors").read_bytes()
    # Files go through the server: nobody but it reaches the object store.
    assert "/mlflow-artifacts/artifacts/" in team.log("mlflow")
    assert "presigned" not in team.log("mlflow")
    answer = anna.ask("GET", "/api/2.0/mlflow/registered-models/alias?name=tiny-adder&alias=best").json()
    assert f"models:/tiny-adder/{answer['model_version']['version']}" == best["model_uri"]


def test_nobody_gets_anything_without_a_password(team, nobody, anna, compared):
    run = compared["arms"][0]["run_id"]
    paths = [
        "/",
        "/api/2.0/mlflow/experiments/search?max_results=1",
        f"/api/2.0/mlflow/runs/get?run_id={run}",
        "/api/2.0/mlflow-artifacts/artifacts",
        "/ajax-api/2.0/mlflow/users/list",
        "/signup",
    ]
    for path in paths:
        assert nobody.ask("GET", path).status_code == 401, path
        wrong = Person(nobody.project, team, "anna", "not her password")
        assert wrong.ask("GET", path).status_code == 401, path
    assert anna.ask("GET", paths[1]).status_code == 200
    done = nobody.run("compare", "tiny")
    assert done.returncode == 3
    assert "check MLFLOW_TRACKING_USERNAME and _PASSWORD" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_foreign_host_and_a_foreign_page_are_refused(team, anna):
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    for host in ("attacker.example", "10.attacker.example", "127.0.0.1", f"localhost:{team.ports['5000'] + 1}"):
        answer = anna.ask("GET", path, headers={"Host": host})
        assert (answer.status_code, "Invalid Host" in answer.text) == (403, True), host
    # As the workers of the containers call it.
    assert anna.ask("GET", path, headers={"Host": "mlflow:5000"}).status_code == 200
    foreign = {"Origin": "https://attacker.example"}
    answer = anna.ask("POST", "/api/2.0/mlflow/experiments/create", json={"name": "theirs"}, headers=foreign)
    assert (answer.status_code, answer.text) == (403, "Cross-origin request blocked")


def test_a_reader_reads_and_moves_no_alias(rita, anna, compared, tmp_path):
    assert json.loads(rita.succeed("compare", "tiny", "--json"))["best"] == compared["best"]
    rita.succeed("pull", "models:/tiny-adder/1", str(tmp_path / "pulled"))
    before = champion(anna)
    done = rita.run("promote", "tiny-adder", "--candidate", "1", "--force", "--reason", "mine")
    assert done.returncode == 3
    assert "marking models:/tiny-adder/1 as a candidate for the alias 'champion': permission denied" in done.stderr
    assert "the account 'rita' may not do this: ask an administrator" in done.stderr
    assert "Traceback" not in done.stderr
    run = compared["arms"][0]["run_id"]
    refused = {
        "/api/2.0/mlflow/registered-models/alias": {"name": "tiny-adder", "alias": "champion", "version": "1"},
        "/api/2.0/mlflow/runs/log-metric": {"run_id": run, "key": "eval.loss", "value": 0, "timestamp": 1},
        "/api/2.0/mlflow/runs/delete": {"run_id": run},
        "/api/2.0/mlflow/users/update-admin": {"username": "rita", "is_admin": True},
    }
    for path, body in refused.items():
        method = "PATCH" if path.endswith("admin") else "POST"
        assert rita.ask(method, path, json=body).status_code == 403, path
    assert champion(anna) == before


def test_an_editor_moves_the_alias_through_the_gate_and_back(anna, compared):
    done = anna.run("promote", "tiny-adder", "--candidate", "1", "--force", "--reason", "somebody must begin")
    assert done.returncode == 0, done.stderr
    assert champion(anna) == "1"
    # No rights beyond that.
    assert anna.ask("GET", "/api/2.0/mlflow/users/get?username=rita").status_code == 403
    assert anna.ask("DELETE", "/api/2.0/mlflow/users/delete", json={"username": "rita"}).status_code == 403


def test_workers_are_healthy_and_hold_no_key_of_the_object_store(team, compared):
    team.wait_healthy("worker-cpu")
    hidden = [
        team.secrets[name] for name in ("OBJECT_STORE_SECRET_KEY", "OBJECT_STORE_ADMIN_KEY", "MLFLOW_DB_PASSWORD")
    ]
    seen = 0
    for process in psutil.process_iter():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
        except OSError:
            continue
        if f"RANKWISE_HOME={team.data}" in environment and "RANKWISE_DATABASE_URL" in environment:
            seen += 1
            assert not [secret for secret in hidden if secret in environment]
            assert "AWS_" not in environment
    assert seen >= 2


def test_no_secret_is_in_any_log_run_object_or_table(team, anna, project, passwords, compared):
    secrets = {name: text for name, text in team.secrets.items() if len(text) == 48} | passwords
    assert len(secrets) == 11
    texts = {}
    # The files of the servers, of the workers' homes, of people.
    for root in (team.data / "logs", team.data / "volumes" / "home", project.directory):
        for path in root.rglob("*"):
            if path.is_file():
                texts[str(path)] = path.read_bytes()
    for name in ("rankwise", "mlflow", "mlflow_auth"):
        dumped = team.execute("postgres", "pg_dump", "--username=postgres", name, text=False)
        assert dumped.returncode == 0, dumped.stderr
        texts[name] = dumped.stdout
    for key in objects(team):
        texts[key] = bucket(team).get_object(Bucket="mlflow", Key=key)["Body"].read()
    assert len(texts) > 50
    assert b"tiny-adder" in texts["mlflow"]
    found = [
        (name, where) for where, text in texts.items() for name, secret in secrets.items() if secret.encode() in text
    ]
    assert found == []


def test_a_backup_comes_back_in_a_new_team(team, directory, anna, compared, tmp_path, tmp_path_factory):
    before = {key: bucket(team).get_object(Bucket="mlflow", Key=key)["ETag"] for key in objects(team)}
    saved, scripts = tmp_path / "saved", directory / "platform" / "deploy"

    def script(name, of, target):
        command = compose_command(of, tmp_path_factory.mktemp("shim"))
        return subprocess.run([scripts / name, target], env=command, capture_output=True, text=True, check=False)

    done = script("backup.sh", team, saved)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in saved.iterdir()) == [
        "SHA256SUMS", "bucket.tar", "mlflow.dump", "mlflow_auth.dump", "rankwise.dump"
    ]  # fmt: skip
    assert {path.stat().st_mode & 0o077 for path in saved.iterdir()} == {0}
    assert "is not empty" in script("backup.sh", team, saved).stderr
    refused = script("restore.sh", team, saved)
    assert refused.returncode == 2
    assert "the database rankwise has tables" in refused.stderr
    team.down(gently=True)

    fresh = Team(directory, directory.parent / "restored", ("auth", "cpu", "tools"))
    try:
        fresh.up("bucket", "postgres")
        fresh.wait_finished("bucket")
        fresh.wait_healthy("postgres")
        done = script("restore.sh", fresh, saved)
        assert done.returncode == 0, done.stderr
        fresh.up("worker-cpu")
        again = Person(anna.project, fresh, anna.name, anna.password)
        assert json.loads(again.succeed("compare", "tiny", "--json")) == compared
        after = {key: bucket(fresh).get_object(Bucket="mlflow", Key=key)["ETag"] for key in objects(fresh)}
        assert after == before
        assert champion(again) == "1"
        again.succeed("pull", "models:/tiny-adder@champion", str(tmp_path / "pulled"))
        # What was trained is not trained again.
        attempts = "SELECT count(*) FROM attempt"
        with database(fresh, "rankwise", "rankwise", fresh.secrets["RANKWISE_DB_PASSWORD"]) as connection:
            count = connection.execute(attempts).fetchone()
            again.succeed("submit", "tiny.yaml", "--set", PROMOTION)
            assert connection.execute(attempts).fetchone() == count
    finally:
        fresh.down()


def test_a_damaged_backup_is_not_loaded(directory, tmp_path):
    (tmp_path / "rankwise.dump").write_bytes(b"x")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  rankwise.dump\n")
    script = directory / "platform" / "deploy" / "restore.sh"
    done = subprocess.run([script, tmp_path], env={"PATH": "/usr/bin:/bin", "COMPOSE": "false"}, capture_output=True)
    assert done.returncode != 0
    assert b"rankwise.dump: FAILED" in done.stdout
