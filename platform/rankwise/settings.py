"""Paths, URIs and secrets from environment variables, which no other module reads.

| variable | meaning | default |
|---|---|---|
| `RANKWISE_HOME` | all local data: MLflow database and artifacts, queue, checkpoints, logs | `./mlruns` |
| `RANKWISE_CACHE` | bases, quantized bases, tokens, wheels; can be deleted | the user's cache directory |
| `RANKWISE_DATABASE_URL` | the queue's database | SQLite in the home |
| `RANKWISE_BASES` | directories with bases, for machines without a network, separated as in `PATH` | none |
| `MLFLOW_TRACKING_URI` | the MLflow store | SQLite in the home |
| `RANKWISE_LOG_LEVEL` | the lowest level of logs on stderr: DEBUG, INFO, WARNING or ERROR | WARNING |
| `RANKWISE_COMPUTE_DTYPE` | the dtype for `compute_dtype: auto`: float32, bfloat16 or float16 | by hardware |
| `RANKWISE_DATA_ROOT` | directories as in `PATH`, the only ones that definitions and predictions may read | none |
| `RANKWISE_SIGNING_KEY` | file with the Ed25519 private key that signs adapters when they are logged | none |
| `RANKWISE_TRUSTED_KEYS` | public keys, files or directories as in `PATH`; adapters signed by none are refused | none |
| `VLLM_API_KEY` | vLLM's own; its plugin updates moved aliases in the server | none |
| `RAY_ADDRESS`, `RAY_AUTH_MODE` | Ray's own; `rankwise doctor` checks them | none |
| `HF_HUB_OFFLINE` and other variables of Hugging Face and MLflow | as their documentation says | |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from rankwise.exceptions import ConfigError
from rankwise.redact import remember_secrets

_WORK = "RANKWISE_WORK"
_UMASK = "RANKWISE_UMASK"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of this process. Paths are absolute; reading them creates nothing."""

    home: Path
    cache: Path
    tracking_uri: str
    database_url: str
    bases: tuple[Path, ...] = ()
    offline: bool = False
    log_level: str = "WARNING"
    data_roots: tuple[Path, ...] = ()
    signing_key: Path | None = None
    trusted_keys: tuple[Path, ...] = ()
    hub: str = "https://huggingface.co"
    ray_address: str | None = None
    ray_token: bool = False
    vllm_api_key: str | None = field(default=None, repr=False)

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the environment (`os.environ` by default). Raises `ConfigError` for an invalid value."""
        env = os.environ if environ is None else environ
        home = _path("RANKWISE_HOME", env.get("RANKWISE_HOME") or "mlruns")
        return cls(
            home=home,
            cache=_path("RANKWISE_CACHE", env.get("RANKWISE_CACHE") or platformdirs.user_cache_dir("rankwise")),
            tracking_uri=env.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}",
            database_url=env.get("RANKWISE_DATABASE_URL") or f"sqlite:///{home / 'rankwise.db'}",
            bases=_paths(env, "RANKWISE_BASES"),
            offline=env.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"},
            log_level=_level(env.get("RANKWISE_LOG_LEVEL") or "WARNING"),
            data_roots=_paths(env, "RANKWISE_DATA_ROOT"),
            signing_key=next(iter(_paths(env, "RANKWISE_SIGNING_KEY", several=False)), None),
            trusted_keys=_paths(env, "RANKWISE_TRUSTED_KEYS"),
            hub=(env.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
            ray_address=env.get("RAY_ADDRESS") or None,
            ray_token=env.get("RAY_AUTH_MODE", "").lower() == "token",
            vllm_api_key=env.get("VLLM_API_KEY") or None,
        )

    @property
    def local_store(self) -> bool:
        """Whether MLflow's store is the SQLite file in the home."""
        return self.tracking_uri == f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        """Artifacts of a local MLflow store."""
        return self.home / "artifacts"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of running arms."""
        return self.home / "checkpoints"

    @property
    def outbox(self) -> Path:
        """Metrics and files not yet sent to the tracking server."""
        return self.home / "outbox"


def compute_dtype(environ: Mapping[str, str] | None = None) -> str:
    """The dtype for `compute_dtype: auto` (`RANKWISE_COMPUTE_DTYPE`), or `auto` if the hardware decides.

    Different workers would otherwise train the arms of one sweep in different dtypes. Raises `ConfigError`.
    """
    env = os.environ if environ is None else environ
    name = env.get("RANKWISE_COMPUTE_DTYPE") or "auto"
    if name not in _DTYPES:
        raise ConfigError(f"RANKWISE_COMPUTE_DTYPE must be one of {', '.join(_DTYPES)}, got {name!r}")
    return name


def set_log_level(level: str) -> None:
    """Set `RANKWISE_LOG_LEVEL` for this process and its children."""
    os.environ["RANKWISE_LOG_LEVEL"] = _level(level)


def _paths(env: Mapping[str, str], variable: str, *, several: bool = True) -> tuple[Path, ...]:
    text = env.get(variable, "")
    parts = text.split(os.pathsep) if several else [text]
    return tuple(_path(variable, part) for part in parts if part)


def _path(variable: str, text: str) -> Path:
    """An absolute path. In a container, a numeric user may have no home directory to expand `~`."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{variable}: this user has no home directory to expand {text!r}; set {variable} to an absolute path"
        )
    return Path(expanded).absolute()


def _level(text: str) -> str:
    if text.upper() not in _LEVELS:
        raise ConfigError(f"RANKWISE_LOG_LEVEL must be one of {', '.join(_LEVELS)}, got {text!r}")
    return text.upper()


def set_data_roots(paths: Sequence[Path]) -> None:
    """Set `RANKWISE_DATA_ROOT` for this process and its children."""
    os.environ["RANKWISE_DATA_ROOT"] = os.pathsep.join(str(path.expanduser().absolute()) for path in paths)


@contextmanager
def current_work(work: Mapping[str, str]) -> Iterator[None]:
    """Within the block, publish what this process works on, to itself and to programs that it starts."""
    os.environ[_WORK] = json.dumps(dict(work))
    try:
        yield
    finally:
        os.environ.pop(_WORK, None)


def work_context() -> dict[str, str]:
    """What `current_work` published here or in a parent (`job`, `attempt`, `worker`), and the `device`; or nothing."""
    try:
        stored = json.loads(os.environ.get(_WORK, "{}"))
    except ValueError:
        return {}
    work = {str(key): str(value) for key, value in stored.items()} if isinstance(stored, dict) else {}
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {**work, "device": devices} if work and devices else work


def set_process_defaults() -> None:
    """Set defaults of other libraries for this process and its children; remember secrets of the environment.

    No telemetry, no progress bars of MLflow, no tokenizer threads before a fork. OpenMP threads sleep while they wait:
    spinning makes a training step ten times as long on a machine that does anything else.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
    }.items():
        os.environ.setdefault(name, value)
    remember_secrets(os.environ)


def close_new_files() -> None:
    """Make what this process and its children create private: files get mode 600, directories 700.

    Homes hold the rows, the answers and the adapters. `user_umask` tells what the user's own umask is, for files that
    are meant for others.
    """
    before = os.umask(0o077)
    # A parent may have done so already.
    os.environ.setdefault(_UMASK, f"{before:03o}")


def user_umask() -> int | None:
    """The umask before `close_new_files`, here or in a parent; None if this process creates files by it anyway."""
    text = os.environ.get(_UMASK, "")
    return int(text, 8) & 0o777 if text and all(digit in "01234567" for digit in text) else None


def child_environment(changes: Mapping[str, str], defaults: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child process: `defaults`, overridden by this process's, overridden by `changes`."""
    return {**(defaults or {}), **os.environ, **changes}
