"""compose.yaml and the image's Dockerfile as files: valid, complete, and as closed as they claim to be."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources

import jsonschema
import pytest
from helpers.team import BIN, ROOT, clone, configuration, docker_compose, image_environment
from ruamel.yaml import YAML

PROFILES = ("auth", "open", "gpu", "cpu", "ray", "ray-gpu", "tools")
# Run once, or by hand.
ONCE = {"object-store-volume", "bucket", "bucket-copy", "accounts", "rankwise"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = clone(tmp_path_factory.mktemp("team") / "clone")
    command = [sys.executable, "-m", "rankwise", "init-team", "--dir", str(directory), "--workers", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def services(directory):
    """All services, as Docker Compose reads them."""
    return configuration(directory, *PROFILES)["services"]


def test_the_file_holds_to_the_schema_of_the_compose_specification():
    schema = json.loads(
        (resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text()
    )
    validator = jsonschema.validators.validator_for(schema)(schema)
    document = YAML(typ="safe").load(ROOT / "compose.yaml")
    assert [error.message for error in validator.iter_errors(document)] == []
    document["services"]["postgres"]["helthcheck"] = {}
    assert list(validator.iter_errors(document)), "the schema finds a misspelt key"


def test_without_its_secrets_nothing_starts(directory, tmp_path):
    bare = clone(tmp_path / "bare")
    done = docker_compose(bare, "config")
    assert done.returncode != 0
    assert "required variable MLFLOW_ADMIN_PASSWORD is missing a value: run rankwise init-team" in done.stderr
    # An empty value does not count.
    text = (directory / ".env").read_text()
    (bare / ".env").write_text("".join(f"{line.partition('=')[0]}=\n" for line in text.splitlines() if "=" in line))
    assert "required variable POSTGRES_PASSWORD" in docker_compose(bare, "config").stderr


@pytest.mark.parametrize(
    ("profiles", "added"),
    [
        ((), {"mlflow", "accounts", "worker-cpu"}),
        (("open", "gpu"), {"mlflow-open", "worker-gpu"}),
        (("auth", "ray"), {"mlflow", "accounts", "ray-head", "ray-node"}),
        (("auth", "ray-gpu"), {"mlflow", "accounts", "ray-head", "ray-node-gpu"}),
    ],
)
def test_profiles_choose_what_runs(directory, profiles, added):
    always = {"postgres", "object-store-volume", "object-store", "bucket"}
    assert set(configuration(directory, *profiles)["services"]) == always | added


def test_every_container_is_closed(services):
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("cap_add", []) == (["CHOWN"] if name == "object-store-volume" else []), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"], name
        assert not service.get("privileged"), name
        assert "restart" in service, name
        assert service["logging"]["options"]["max-size"], name
        for mount in service.get("volumes", []):
            assert mount["type"] == "volume" or mount.get("read_only"), (name, mount)
        # A copy into a read-only container fails: whatever is configured is mounted, or in the environment.
        assert not service.get("configs"), name
        assert not service.get("secrets"), name


def test_only_the_port_of_mlflow_is_published_and_on_loopback(services):
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert set(published) == {"mlflow", "mlflow-open"}
    for ports in published.values():
        assert [(port["host_ip"], port["published"], port["target"]) for port in ports] == [("127.0.0.1", "5000", 5000)]


def test_stores_have_no_way_out_and_workers_none_to_the_object_store(directory, services):
    networks = configuration(directory, *PROFILES)["networks"]
    assert {name for name, network in networks.items() if network.get("internal")} == {"queue", "store"}
    assert set(services["postgres"]["networks"]) == {"queue", "store"}
    assert set(services["object-store"]["networks"]) == {"store"}
    clients = [name for name in services if name.startswith(("worker", "ray", "rankwise"))]
    assert len(clients) == 6
    secret = {"OBJECT_STORE_SECRET_KEY", "OBJECT_STORE_ADMIN_KEY", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_DB_PASSWORD"}
    env = dict(line.split("=", 1) for line in (directory / ".env").read_text().splitlines() if "=" in line)
    hidden = {env[name] for name in secret}
    for name in clients:
        assert "store" not in services[name]["networks"]
        assert not hidden & set(services[name]["environment"].values())
        assert not [key for key in services[name]["environment"] if key.startswith("AWS_")]


def test_definitions_read_files_of_the_experiments_only(services):
    for name in ("worker-cpu", "worker-gpu", "ray-node", "rankwise"):
        rows, predictions = services[name]["environment"]["RANKWISE_DATA_ROOT"].split(":")
        (mount,) = [mount for mount in services[name]["volumes"] if mount["type"] == "bind"]
        assert (mount["target"], mount["read_only"]) == (rows, True)
        (mount,) = [mount for mount in services[name]["volumes"] if mount["target"] == predictions]
        assert (mount["type"], mount["source"]) == ("volume", "predictions")
        # A new volume belongs to whom the directory of the image belongs to.
        assert f" {predictions}\n" in (ROOT / "platform" / "Dockerfile").read_text()


def test_every_lasting_service_has_a_probe_that_allows_for_its_start(services):
    for name, service in services.items():
        if name in ONCE:
            assert service["restart"] in {"no", "on-failure:3", "on-failure:5", "unless-stopped"}
            continue
        assert service["restart"] == "unless-stopped", name
        health = service["healthcheck"]
        assert {"test", "interval", "timeout", "retries", "start_period"} <= set(health), name
        for other, need in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if other in ONCE else "service_healthy"
            assert need["condition"] == expected, (name, other)


def test_images_are_pinned(services):
    for name, service in services.items():
        tag = service["image"].partition(":")[2]
        assert any(character.isdigit() for character in tag), (name, tag)
    text = (ROOT / "platform" / "Dockerfile").read_text()
    assert text.count("FROM ${PYTHON_IMAGE}") == text.count("\nFROM ") == 2
    assert "PYTHON_IMAGE=python:3.11." in text


def test_the_image_is_built_by_one_service_and_never_fetched(directory, services):
    own = {name for name, service in services.items() if service["image"].startswith("rankwise:")}
    assert len(own) == 11
    assert {services[name]["pull_policy"] for name in own} == {"never"}
    assert {name for name, service in services.items() if "build" in service} == {"bucket"}
    assert "bucket" in configuration(directory, "open")["services"], "every team has it"


def test_the_command_line_starts_nothing_again(services):
    assert not services["rankwise"].get("depends_on")


def test_mlflow_runs_nothing_for_strangers(services):
    for name in ("mlflow", "mlflow-open"):
        command = [*services[name]["entrypoint"], *services[name]["command"]]
        assert "--allowed-hosts=mlflow:5000,localhost:5000,127.0.0.1:5000" in command
        assert "--serve-artifacts" in command
        assert not [part for part in command if "gunicorn" in part or "waitress" in part]
        environment = services[name]["environment"]
        assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
        assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert "--app-name=basic-auth" in services["mlflow"]["command"]


def test_gpus_are_reserved(services):
    for name in ("worker-gpu", "ray-node-gpu"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"], device["count"]) == ("nvidia", ["gpu"], -1)


def test_the_dockerfile_passes_its_linter():
    done = subprocess.run(
        [str(BIN / "hadolint"), str(ROOT / "platform" / "Dockerfile")], capture_output=True, text=True
    )
    assert done.stdout == ""
    assert done.returncode == 0


def test_what_the_image_keeps_lies_in_volumes(services):
    environment = image_environment()
    targets = {mount["target"] for mount in services["worker-cpu"]["volumes"]}
    assert {environment["RANKWISE_HOME"], environment["RANKWISE_CACHE"]} <= targets
    assert environment["HF_HOME"].startswith(environment["RANKWISE_CACHE"])
