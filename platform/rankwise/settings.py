"""Paths, URIs and secrets. The only reader of the process's environment.

| variable | meaning | default |
|---|---|---|
| `RANKWISE_HOME` | all local data: MLflow database and artifacts, queue, checkpoints, logs | `./mlruns` |
| `RANKWISE_CACHE` | bases, quantized bases, tokens, wheels; can be thrown away | the user's cache directory |
| `RANKWISE_DATABASE_URL` | the queue's database | SQLite in the home |
| `RANKWISE_BASES` | directories with bases, for machines without a network, separated as in `PATH` | none |
| `MLFLOW_TRACKING_URI` | the MLflow store | SQLite in the home |
| `RANKWISE_LOG_LEVEL` | the lowest level of logs on stderr: DEBUG, INFO, WARNING or ERROR | WARNING |
| `RANKWISE_COMPUTE_DTYPE` | what `compute_dtype: auto` is on this machine: float32, bfloat16 or float16 | by hardware |
| `RANKWISE_DATA_ROOT` | directories as in `PATH`: definitions and predictions name files below them, no others | none |
| `RANKWISE_SIGNING_KEY` | file with the Ed25519 private key that signs adapters when they are logged | none |
| `RANKWISE_TRUSTED_KEYS` | public keys, files or directories as in `PATH`; adapters signed by none are refused | none |
| `VLLM_API_KEY` | vLLM's own; its plugin tells the server of aliases that have moved | none |
| `RAY_ADDRESS`, `RAY_AUTH_MODE` | Ray's own; `rankwise doctor` looks at them | none |
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
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where this process keeps its data. Paths are absolute; nothing is created by reading them."""

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
        """Read the environment (`os.environ` when none is given).

        Raises:
            ConfigError: A variable has a value that it cannot have.
        """
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
        """Whether MLflow's store is the SQLite file in the home, so that artifacts lie there too."""
        return self.tracking_uri == f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def artifacts(self) -> Path:
        """Where a local MLflow store keeps artifacts."""
        return self.home / "artifacts"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of running arms."""
        return self.home / "checkpoints"

    @property
    def outbox(self) -> Path:
        """Points and files that wait for the tracking server."""
        return self.home / "outbox"


def compute_dtype(environ: Mapping[str, str] | None = None) -> str:
    """What `compute_dtype: auto` is on this machine: the name of a dtype, or `auto` where the hardware decides.

    Workers on unlike machines would train the arms of one sweep in unlike dtypes; so can all be held to one.

    Raises:
        ConfigError: `RANKWISE_COMPUTE_DTYPE` names none that a base can compute in.
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
    """An absolute path. A user without a home directory (any number in a container) has no `~` to expand."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(f"{variable}: there is no home directory for {text!r}; set {variable} to an absolute path")
    return Path(expanded).absolute()


def _level(text: str) -> str:
    if text.upper() not in _LEVELS:
        raise ConfigError(f"RANKWISE_LOG_LEVEL must be one of {', '.join(_LEVELS)}, got {text!r}")
    return text.upper()


def set_data_roots(paths: Sequence[Path]) -> None:
    """Set `RANKWISE_DATA_ROOT` for this process and its children."""
    os.environ["RANKWISE_DATA_ROOT"] = os.pathsep.join(str(path.expanduser().absolute()) for path in paths)


@contextmanager
def at_work(work: Mapping[str, str]) -> Iterator[None]:
    """Say within the block what this process works on, to itself and to the programs that it starts."""
    os.environ[_WORK] = json.dumps(dict(work))
    try:
        yield
    finally:
        os.environ.pop(_WORK, None)


def work_context() -> dict[str, str]:
    """What `at_work` said in this process or in one that started it (`job`, `attempt`, `worker`), and the `device`.

    Empty where nobody is at work.
    """
    try:
        found = json.loads(os.environ.get(_WORK, "{}"))
    except ValueError:
        return {}
    work = {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {**work, "device": devices} if work and devices else work


def set_process_defaults() -> None:
    """Defaults of other libraries for this process and its children, where the environment does not say otherwise.

    The environment's secrets are remembered, so that they are taken out of what is stored or shown. Nothing is told to
    anybody about what a user does, MLflow draws no bars between rankwise's own, tokenizers start no threads of their
    own before a fork, and OpenMP's threads sleep while they wait for one another. By default they spin, which on a
    machine that does anything else made a training step ten times as long (SmolLM2 on 2 cores under load: 38 s in place
    of 3.7 s).
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


def child_environment(changes: Mapping[str, str], defaults: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a child process: this one's with changes, and defaults for what it does not set."""
    return {**(defaults or {}), **os.environ, **changes}
