"""`rankwise init-team`: write a team's secrets and choices to the `.env` that compose.yaml reads."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import click

from rankwise.cli.output import note
from rankwise.exceptions import ConfigError
from rankwise.files import fsync_directory, storage_errors
from rankwise.settings import child_environment

SECRETS = {
    "POSTGRES_PASSWORD": "PostgreSQL's administrator, for repairs only",
    "RANKWISE_DB_PASSWORD": "the queue's user of PostgreSQL",
    "MLFLOW_DB_PASSWORD": "MLflow's user of PostgreSQL",
    "OBJECT_STORE_SECRET_KEY": "MLflow's key to its bucket in the object store",
    "OBJECT_STORE_ADMIN_KEY": "the object store's administrator, who creates the bucket and its backups",
    "MLFLOW_ADMIN_PASSWORD": "MLflow's account `admin`, for the first start and for `accounts`",
    "MLFLOW_WORKER_PASSWORD": "MLflow's account `worker`",
    "MLFLOW_SECRET_KEY": "signs MLflow's forms",
    "RAY_AUTH_TOKEN": "token of the Ray cluster",
}
"""Secrets that compose.yaml requires, and what each is for."""

_BYTES = 24
# Hex digits need no escaping in env files, URLs, JSON and SQL.
_FILE = ".env"
_NEXT = """\
next, in {directory}:
  docker compose build
  docker compose up --detach --wait
  docker compose run --rm accounts add NAME --role editor    creates an account, prints its password
  docker compose run --rm rankwise submit experiments/diamonds-rank.yaml
MLflow is then at {url}; log in as `admin` with MLFLOW_ADMIN_PASSWORD from {file}.
Keep a copy of {file} separate from the backups: both together give access to everything."""


@click.command("init-team")
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Directory of compose.yaml. Default: the current one.",
)
@click.option(
    "--workers",
    type=click.Choice(["gpu", "cpu", "none"]),
    help="Workers on this host. Default: gpu if it has one, otherwise cpu.",
)
@click.option("--open", "without_accounts", is_flag=True, help="MLflow without accounts, only for a closed network.")
@click.option("--bind", default="127.0.0.1", show_default=True, help="Address to publish MLflow's port on.")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="MLflow's port.")
@click.option("--host", metavar="NAME", help="Public host name of MLflow, behind an https proxy.")
def init_team(
    directory: Path, workers: str | None, without_accounts: bool, bind: str, port: int, host: str | None
) -> None:
    """Write the secrets of a new team to .env, for `docker compose up`.

    All passwords are random. An existing file is never changed, because databases keep the passwords that they were
    created with.
    """
    compose, target = directory / "compose.yaml", directory / _FILE
    if not compose.is_file():
        raise ConfigError(f"{compose} not found: set --dir to a clone of rankwise")
    chosen = workers or _workers_here()
    profiles = ["open" if without_accounts else "auth", *([] if chosen == "none" else [chosen])]
    if not _write_new(target, _text(profiles, "cuda" if chosen == "gpu" else "cpu", bind, port, host)):
        raise ConfigError(
            f"{target} already exists and was not changed: this team's databases use its passwords; for a new team, "
            "move it away and remove the old volumes (docker compose down --volumes)"
        )
    note(f"wrote {target}, readable only by you")
    url = f"https://{host}" if host else f"http://{'127.0.0.1' if bind == '0.0.0.0' else bind}:{port}"
    click.echo(_NEXT.format(directory=directory.absolute(), url=url, file=_FILE))


def _workers_here() -> str:
    from rankwise.worker.local_placer import visible_gpus

    return "gpu" if visible_gpus(child_environment({})) else "cpu"


def _text(profiles: list[str], device: str, bind: str, port: int, host: str | None) -> str:
    lines = [
        "# A team's secrets and choices, read by compose.yaml. Written by `rankwise init-team`; keep it private.",
        "",
        "# Services on this host: auth or open; gpu, cpu, ray, ray-gpu (described in compose.yaml).",
        f"COMPOSE_PROFILES={','.join(profiles)}",
        f"RANKWISE_DEVICE={device}",
        "# Where MLflow's port is published. Use TLS for any address but loopback.",
        f"RANKWISE_BIND={bind}",
        f"RANKWISE_PORT={port}",
    ]
    if host:
        lines += [
            "# Host names that reach MLflow, and origins that may write.",
            f"RANKWISE_ALLOWED_HOSTS={host}",
            f"RANKWISE_ALLOWED_ORIGINS=https://{host}",
        ]
    for name, meaning in SECRETS.items():
        lines += [f"# {meaning}", f"{name}={secrets.token_hex(_BYTES)}"]
    return "\n".join(lines) + "\n"


def _write_new(target: Path, text: str) -> bool:
    """Write a file that only its owner can read; False if it already exists."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    with storage_errors(target, "writing the secrets"):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            # Unlike a rename, a link does not replace an existing file.
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(target.parent)
    return True
