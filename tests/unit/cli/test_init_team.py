from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from rankwise.cli import init_team
from rankwise.exceptions import ConfigError, StorageError


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "compose.yaml").write_text("name: rankwise\n")
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(init_team.init_team, arguments, catch_exceptions=False)


def values(directory):
    lines = (directory / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_every_secret_is_random_and_only_its_owner_reads_them(clone, tmp_path):
    result = call("--dir", str(clone))
    assert result.exit_code == 0
    assert stat.S_IMODE((clone / ".env").stat().st_mode) == 0o600
    other = tmp_path / "other"
    other.mkdir()
    (other / "compose.yaml").touch()
    call("--dir", str(other))
    secrets = [values(directory)[name] for directory in (clone, other) for name in init_team.SECRETS]
    assert len(set(secrets)) == 2 * len(init_team.SECRETS)
    assert all(re.fullmatch("[0-9a-f]{48}", secret) for secret in secrets)
    assert not any(secret in result.output for secret in secrets)
    assert "docker compose up --detach --wait" in result.stdout
    assert sorted(path.name for path in clone.iterdir()) == [".env", "compose.yaml", "other"]


def test_a_file_that_is_there_is_left_alone(clone):
    call("--dir", str(clone))
    before = (clone / ".env").read_bytes()
    with pytest.raises(ConfigError, match=r"\.env already exists and was not changed: .*docker compose down"):
        call("--dir", str(clone))
    assert (clone / ".env").read_bytes() == before
    assert sorted(path.name for path in clone.iterdir()) == [".env", "compose.yaml"]


def test_it_wants_a_clone(tmp_path):
    with pytest.raises(ConfigError, match=r"compose.yaml not found: set --dir to a clone"):
        call("--dir", str(tmp_path))


def test_a_directory_that_cannot_be_written_is_said(clone, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(StorageError, match="writing the secrets: cannot write"):
        call("--dir", str(clone))
    assert [path.name for path in clone.iterdir()] == ["compose.yaml"]


@pytest.mark.parametrize(
    ("arguments", "profiles", "device"),
    [
        (["--workers", "gpu"], "auth,gpu", "cuda"),
        (["--workers", "cpu"], "auth,cpu", "cpu"),
        (["--workers", "none", "--open"], "open", "cpu"),
        ([], "auth,gpu", "cuda"),
    ],
)
def test_the_profiles_follow_what_was_asked_for_and_the_machine(clone, monkeypatch, arguments, profiles, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    call("--dir", str(clone), *arguments)
    found = values(clone)
    assert (found["COMPOSE_PROFILES"], found["RANKWISE_DEVICE"]) == (profiles, device)


def test_a_machine_without_a_gpu_gets_a_cpu_worker(clone, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    call("--dir", str(clone))
    assert values(clone)["COMPOSE_PROFILES"] == "auth,cpu"


def test_a_name_behind_a_proxy_is_admitted(clone):
    result = call("--dir", str(clone), "--host", "mlflow.example.org", "--bind", "0.0.0.0", "--port", "8443")
    found = values(clone)
    assert found["RANKWISE_ALLOWED_HOSTS"] == "mlflow.example.org"
    assert found["RANKWISE_ALLOWED_ORIGINS"] == "https://mlflow.example.org"
    assert (found["RANKWISE_BIND"], found["RANKWISE_PORT"]) == ("0.0.0.0", "8443")
    assert "https://mlflow.example.org" in result.stdout


def test_the_secrets_are_those_that_compose_needs():
    text = (Path(__file__).parents[3] / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?", text)) == set(init_team.SECRETS)
