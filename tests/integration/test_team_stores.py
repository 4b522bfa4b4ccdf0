"""The stores of compose.yaml, started by its own commands: who may do what in them."""

from __future__ import annotations

import boto3
import psycopg
import pytest
import requests
from botocore.config import Config
from botocore.exceptions import ClientError
from helpers.team import Team, new_team


@pytest.fixture(scope="module")
def team():
    with new_team("--workers", "none") as directory:
        team = Team(directory, directory.parent / "data")
        try:
            # What has to be there before MLflow starts.
            team.up("bucket", "postgres")
            team.wait_finished("bucket")
            team.wait_healthy("postgres")
            yield team
        finally:
            team.down()


def enter(team, user, password, database):
    return psycopg.connect(
        host="127.0.0.1", port=team.ports["5432"], user=user, password=password, dbname=database, autocommit=True
    )


def test_each_user_of_postgresql_enters_its_own_databases_only(team):
    own = {"rankwise": ["rankwise"], "mlflow": ["mlflow", "mlflow_auth"]}
    for user, name in {"rankwise": "RANKWISE_DB_PASSWORD", "mlflow": "MLFLOW_DB_PASSWORD"}.items():
        for database in ("rankwise", "mlflow", "mlflow_auth", "postgres", "template1"):
            if database in own[user]:
                with enter(team, user, team.secrets[name], database) as connection:
                    connection.execute("CREATE TABLE tried (x int)")
                    connection.execute("DROP TABLE tried")
            else:
                with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
                    enter(team, user, team.secrets[name], database)
        with enter(team, user, team.secrets[name], own[user][0]) as connection:
            for statement in ("CREATE DATABASE more", "CREATE ROLE more", "COPY (SELECT 1) TO PROGRAM 'true'"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement)


def test_nobody_enters_postgresql_without_the_password(team):
    for password in (None, "", "wrong", team.secrets["MLFLOW_DB_PASSWORD"]):
        with pytest.raises(psycopg.OperationalError):
            enter(team, "rankwise", password, "rankwise")


def test_passwords_change_with_the_environment_and_appear_in_no_log(team):
    probe = team.services["postgres"]["healthcheck"]["test"][1]
    again = ["psql", "-h", str(team.data / "containers" / "postgres"), "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-f"]
    script = "/docker-entrypoint-initdb.d/postgres.sql"
    changed = {"RANKWISE_DB_PASSWORD": "another one; 'quoted'"}
    done = team.execute("postgres", *again, script, environment=changed)
    assert done.returncode == 0, done.stderr
    assert team.execute("postgres", "sh", "-c", probe).returncode != 0
    enter(team, "rankwise", changed["RANKWISE_DB_PASSWORD"], "rankwise").close()
    done = team.execute("postgres", *again, script)
    assert done.returncode == 0, done.stderr
    assert team.execute("postgres", "sh", "-c", probe).returncode == 0
    for secret in (*changed.values(), *team.secrets.values()):
        assert len(secret) < 12 or secret not in team.log("postgres")


def store(team, key, secret):
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{team.ports['8333']}",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 0}),
    )


def test_mlflow_has_its_bucket_and_nothing_else(team):
    mlflow = store(team, "mlflow", team.secrets["OBJECT_STORE_SECRET_KEY"])
    admin = store(team, "admin", team.secrets["OBJECT_STORE_ADMIN_KEY"])
    mlflow.put_object(Bucket="mlflow", Key="artifacts/x", Body=b"adapter")
    assert mlflow.get_object(Bucket="mlflow", Key="artifacts/x")["Body"].read() == b"adapter"
    mlflow.delete_object(Bucket="mlflow", Key="artifacts/x")
    admin.create_bucket(Bucket="others")
    refused = [
        lambda: mlflow.put_object(Bucket="others", Key="x", Body=b""),
        lambda: mlflow.list_objects_v2(Bucket="others"),
        lambda: mlflow.create_bucket(Bucket="more"),
        lambda: mlflow.delete_bucket(Bucket="mlflow"),
        lambda: store(team, "mlflow", "wrong").list_objects_v2(Bucket="mlflow"),
        lambda: store(team, "admin", team.secrets["OBJECT_STORE_SECRET_KEY"]).list_buckets(),
    ]
    for number, ask in enumerate(refused):
        with pytest.raises(ClientError) as caught:
            ask()
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403, number
    assert requests.get(f"http://127.0.0.1:{team.ports['8333']}/mlflow", timeout=10).status_code == 403


def test_only_s3_of_the_object_store_can_be_reached_from_outside(team):
    command = team.services["object-store"]["command"]
    # Master, volumes and filer ask for no password.
    assert {"-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0"} <= set(command)
    assert {"-s3.port.iceberg=0", "-s3.port.lance=0", "-metricsPort=0", "-master.telemetry=false"} <= set(command)


def test_the_bucket_is_made_once(team):
    assert "created the bucket" in team.log("bucket")
    done = team.execute("bucket", *team.services["bucket"]["command"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
