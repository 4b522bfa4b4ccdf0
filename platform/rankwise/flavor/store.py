"""Writes adapters: to a directory, or to MLflow as a LoggedModel and, with a name, as a registered version."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from mlflow.models import Model
from mlflow.models.model import ModelInfo

from rankwise.exceptions import ConfigError, StorageError
from rankwise.flavor.describe import BaseArgument, describe_base, facts_of
from rankwise.flavor.metadata import BaseFacts
from rankwise.flavor.options import LogOptions, PackageOptions
from rankwise.flavor.package import build, describe_into
from rankwise.flavor.upload import log_directory
from rankwise.modeling.adapter import read_adapter, save_adapter
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.embeddings import check_rows, embedding_rows
from rankwise.modeling.exact_layers import REPACKED, hold_exact, is_repacked
from rankwise.settings import Settings

logger = logging.getLogger(__name__)


def save_model(
    model: Any,
    path: str | Path,
    tokenizer: Any,
    base: BaseArgument = None,
    *,
    base_revision: str | None = None,
    adapter_name: str | None = None,
    mlflow_model: Model | None = None,
    settings: Settings | None = None,
    validate_serving_input: bool = False,
    **options: Any,
) -> None:
    """Save the adapter of a peft model, and what is needed to load it over exactly its base, into a directory.

    Args:
        model: A `PeftModel`, or a transformers model with adapters, over a quantized or plain base.
        path: A directory that is not there or is empty.
        tokenizer: The tokenizer to use with it, its chat template included.
        base: What the base is (`org/name`, a directory, `pypi:...`, a `LoadedBase`) where the model does not know.
        base_revision: Its commit or digest, where it is not known either.
        adapter_name: Which adapter, where the model has several; the active one by default.
        mlflow_model: MLflow's description to add to, as `Model.log` gives it.
        settings: Where the caches are; from the environment by default.
        validate_serving_input: Only False: checking would load a second base.
        **options: `system`, `signature`, `input_example`, `pip_requirements`, `extra_pip_requirements`, `metadata`, as
            in `rankwise.flavor.options.PackageOptions`.

    Raises:
        ConfigError: The model has no such adapter, or its base is not known.
        BaseMismatchError: The named base is not the one in memory, or its embedding was resized.
        AssetError: The base is not on this machine and cannot be fetched.
        StorageError: The directory is not empty, or cannot be written.
    """
    if validate_serving_input:
        raise ConfigError("validate_serving_input=True would load a second base into this process; leave it out")
    directory = Path(path)
    if directory.exists() and any(directory.iterdir()):
        raise StorageError(f"{directory} is not empty; save the model into a new directory")
    chosen, chosen_options = settings or Settings.load(), PackageOptions(**options)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        facts = _write_live(model, adapter_name, base, base_revision, Path(scratch), chosen)
        package = build(directory, Path(scratch), _check_tokenizer(tokenizer, model), facts, chosen_options)
    describe_into(package, mlflow_model if mlflow_model is not None else Model())


def log_model(
    model: Any,
    tokenizer: Any,
    name: str = "adapter",
    base: BaseArgument = None,
    registered_model_name: str | None = None,
    *,
    base_revision: str | None = None,
    adapter_name: str | None = None,
    settings: Settings | None = None,
    **arguments: Any,
) -> ModelInfo:
    """Log the adapter of a peft model to MLflow: three lines at the end of any training script.

        import rankwise.flavor
        with mlflow.start_run():
            rankwise.flavor.log_model(model, tokenizer, registered_model_name="my-model")

    Args:
        model: As in `save_model`.
        tokenizer: As in `save_model`.
        name: Of the LoggedModel.
        base: As in `save_model`.
        registered_model_name: Also makes a version of this registered model.
        base_revision: As in `save_model`.
        adapter_name: As in `save_model`.
        settings: As in `save_model`.
        **arguments: `run_id`, `tags`, `step`, `metrics`, `system`, ..., as in `rankwise.flavor.options.LogOptions`.

    Raises:
        RankwiseError: As in `save_model`; `TrackingError` where MLflow cannot be reached or refuses.
    """
    chosen, options = settings or Settings.load(), LogOptions(**arguments)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        facts = _write_live(model, adapter_name, base, base_revision, Path(scratch), chosen)
        checked = _check_tokenizer(tokenizer, model)
        return log_directory(Path(scratch), facts, checked, name, registered_model_name, options)


def log_adapter(
    directory: Path,
    base: LoadedBase,
    tokenizer: Any = None,
    name: str = "adapter",
    registered_model_name: str | None = None,
    **arguments: Any,
) -> ModelInfo:
    """Log an adapter that is saved already; the model in memory is not touched.

    Args:
        directory: A PEFT directory, as `modeling.adapter.save_adapter` writes it.
        base: The base it was trained on.
        tokenizer: The tokenizer with the chat template that was trained on; the base's own by default.
        name: Of the LoggedModel.
        registered_model_name: Also makes a version of this registered model.
        **arguments: `run_id`, `tags`, `step`, `metrics`, `system`, ..., as in `rankwise.flavor.options.LogOptions`.

    Raises:
        AdapterIntegrityError: The directory is not a whole plain LoRA adapter.
        BaseMismatchError: The base's embedding was resized.
        ConfigError: The tokenizer has more tokens than the base has rows.
        TrackingError: MLflow cannot be reached or refuses.
    """
    config, _ = read_adapter(directory)
    check_rows(base.model, config, base.path)
    chosen = _check_tokenizer(tokenizer if tokenizer is not None else base.tokenizer, base.model)
    return log_directory(directory, facts_of(base), chosen, name, registered_model_name, LogOptions(**arguments))


def _write_live(
    model: Any,
    adapter_name: str | None,
    base: BaseArgument,
    base_revision: str | None,
    directory: Path,
    settings: Settings,
) -> BaseFacts:
    """Write the adapter of a live model as a PEFT directory, and say what its base is."""
    name = _adapter_name(model, adapter_name)
    # The adapter will lie over the base as its files have it; so that this model goes on answering as that one does.
    hold_exact(model)
    if is_repacked(model):
        logger.warning(REPACKED)
    facts, path = describe_base(model, name, base, base_revision, settings)
    save_adapter(model, name, directory, base_source=facts.source, base_revision=facts.revision, base_path=path)
    return facts


def _adapter_name(model: Any, adapter_name: str | None) -> str:
    names = list(getattr(model, "peft_config", None) or {})
    if not names:
        raise ConfigError(f"the model ({type(model).__name__}) has no adapter; add one with peft.get_peft_model first")
    if adapter_name is None and len(names) > 1:
        active = getattr(model, "active_adapters", None)
        active = active() if callable(active) else active
        names = [active] if isinstance(active, str) else list(active or names)
    if adapter_name is None and len(names) == 1:
        return str(names[0])
    if adapter_name is not None and adapter_name in names:
        return adapter_name
    raise ConfigError(f"adapter_name: say which adapter; the model has {', '.join(names)}, got {adapter_name!r}")


def _check_tokenizer(tokenizer: Any, model: Any) -> Any:
    rows = embedding_rows(model)
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ConfigError(
            f"the tokenizer has token ids up to {highest}, the base's embedding has {rows} rows; a token without a row "
            "cannot be used: take the token out, or one of the base's reserved tokens in its place"
        )
    return tokenizer
