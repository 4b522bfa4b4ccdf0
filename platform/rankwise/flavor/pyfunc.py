"""The stored adapter as MLflow's Python function: any form of prompt in, a list of texts out.

`mlflow.pyfunc.load_model(uri)`, `mlflow models serve` and `mlflow.models.evaluate` call `_load_pyfunc`. At load, they
accept `model_config={"base_model": ..., "device": ..., "allow_base_mismatch": True, "attn_implementation": ...,
"kernels": "library"}`.

Over HTTP, send chats of different lengths as `{"inputs": [{"messages": [...]}, ...]}` or as a table: MLflow's server
converts a bare list of them to an array, and refuses it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow

from rankwise.assets.input_checks import read_yaml
from rankwise.compat.mlflow import DOWNLOAD_NOTE, RequestedModel, requested_model, requested_uri
from rankwise.data.template import Renderer
from rankwise.exceptions import AdapterIntegrityError, ConfigError, RankwiseError, TrackingError
from rankwise.flavor.fetch import Origin, read_mlmodel, resolve_uri, resolve_version
from rankwise.flavor.inputs import read_input
from rankwise.flavor.load import LoadedAdapter, load_directory
from rankwise.flavor.metadata import read_params
from rankwise.flavor.package import MODEL_CONFIG, LoadOptions
from rankwise.flavor.signing import NAME_TAG
from rankwise.modeling.decoding.generation import row_seed
from rankwise.modeling.decoding.scheduler import Prompt, generate
from rankwise.modeling.lora.lean import keep_dequantized
from rankwise.modeling.lora.packed import pass_lock
from rankwise.settings import Settings
from rankwise.tracking.connection import is_final, tracking_errors

logger = logging.getLogger(__name__)


class QloraModel:
    """The model behind `mlflow.pyfunc`: one adapter, decoded as in batch inference (`modeling.decoding.scheduler`)."""

    def __init__(self, adapter: LoadedAdapter) -> None:
        self.adapter = adapter
        self.renderer = Renderer.create(
            adapter.tokenizer,
            base=adapter.base.path,
            chat_template_kwargs=adapter.metadata.reading.chat_template_kwargs,
            required=False,
        )
        # Until this object is collected: MLflow never closes it. Not an attribute, because it cannot be pickled.
        kept = ExitStack()
        kept.enter_context(keep_dequantized(adapter.model))
        weakref.finalize(self, kept.close).atexit = False

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Answer prompts (a form of the table in `rankwise.flavor.inputs`), one text each. Several threads take turns.

        `params`: `max_new_tokens` (64), `temperature` (0: the most likely token), `top_k` (0: all tokens), `top_p` (1),
        `stop` (texts that end an answer), `seed` (0; row i samples with (seed, i)), `batch_size` (8).

        Raises:
            ConfigError: The input has none of the forms, or a parameter is out of its range.
        """
        decoding, seed, batch_size = read_params(params)
        chats = read_input(data, self.adapter.metadata.system, self.adapter.metadata.reading)
        with pass_lock(self.adapter.model):
            texts = self.renderer.prompts(chats)
            _check_whole(texts)
            rows = self.renderer.tokens(texts)
        prompts = [
            Prompt(token_ids=tuple(ids), adapter=self.adapter.adapter_name, seed=row_seed(seed, index))
            for index, ids in enumerate(rows)
        ]
        made = generate(self.adapter.base, prompts, decoding, tokenizer=self.adapter.tokenizer, batch_size=batch_size)
        return [row.text for row in made]

    def get_raw_model(self) -> LoadedAdapter:
        """The loaded adapter, for `PyFuncModel.get_raw_model`."""
        return self.adapter


def _check_whole(texts: Sequence[str]) -> None:
    """Refuse unpaired surrogates: JSON may contain them, but tokenizers accept only whole characters."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"row {index}: the prompt has half of a character: {error}") from error


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> QloraModel:
    """Load a downloaded model directory; MLflow calls this. `model_config` has the keys of `MODEL_CONFIG`.

    Raises:
        RankwiseError: As `rankwise.flavor.load_model`.
    """
    values = {**MODEL_CONFIG, **(model_config or {})}
    unknown = sorted(set(values) - set(MODEL_CONFIG))
    if unknown:
        raise ConfigError(f"model_config: not known: {', '.join(unknown)}; allowed are {', '.join(MODEL_CONFIG)}")
    adapter = load_directory(
        Path(path),
        _origin(Path(path)),
        LoadOptions(
            settings=Settings.load(),
            base_model=values["base_model"],
            device=values["device"],
            allow_base_mismatch=bool(values["allow_base_mismatch"]),
            attn_implementation=values["attn_implementation"],
            kernels=values["kernels"],
        ),
    )
    return QloraModel(adapter)


def _origin(directory: Path) -> Origin:
    """The stored model that MLflow is loading, whose tags take part in the check.

    1. The version or LoggedModel that the URI given to `mlflow.pyfunc.load_model` names.
    2. The version in MLflow's note in the directory. A directory that was copied elsewhere (an image of `mlflow models
       build-docker`) keeps its note, and the store there may have another model of that name.
    3. The LoggedModel that `MLmodel` names. The registered name is not known then.
    """
    uri = requested_uri(directory)
    with tracking_errors(f"looking up {uri}"):
        requested = None if uri is None else requested_model(uri)
    model_id = read_mlmodel(directory).get("model_id")
    if requested is not None:
        return _requested_origin(requested, model_id)
    note = directory / DOWNLOAD_NOTE
    if note.is_file():
        return _noted_origin(directory, model_id, *_noted(note))
    if model_id is None:
        return resolve_uri(directory)
    logged, problem = _logged_origin(model_id)
    if logged is None:
        logger.warning("the tags of %s are not checked: %s", directory, problem)
        return resolve_uri(directory)
    if uri is None or not uri.startswith("runs:"):
        logger.warning(
            "%s: the registered name was not checked, because MLflow passes on the directory alone; the files were "
            "checked against the tags of %s. To check the name and its signature too, use "
            "rankwise.flavor.load_model('models:/NAME/VERSION'), or rankwise.flavor.read_metadata(...) before you "
            "serve the model",
            directory,
            logged.uri,
        )
    return logged


def _requested_origin(requested: RequestedModel, model_id: Any) -> Origin:
    """The model that the caller named, in the store that MLflow has just downloaded it from."""
    if requested.name is None or requested.version is None:
        return resolve_uri(f"models:/{requested.model_id}")
    version = resolve_version(requested.name, requested.version)
    if version.model_id is not None or model_id is None:
        return version
    # A copy has the files of the LoggedModel; its own tags count first.
    logged, _ = _logged_origin(model_id)
    return version if logged is None else replace(version, tags={**logged.tags, **version.tags})


def _noted_origin(directory: Path, model_id: Any, name: str | None, number: str) -> Origin:
    """The version in MLflow's note, or its LoggedModel where the store here has another version of that name."""
    logged, problem = _logged_origin(model_id)
    unavailable = isinstance(problem, TrackingError) and not is_final(problem.__cause__ or problem)
    version = None
    if name is not None and not unavailable:
        with suppress(TrackingError, ConfigError):  # Deleted, or of another store: the LoggedModel's tags remain.
            version = resolve_uri(f"models:/{name}/{number}")
    if version is not None and version.model_id == model_id:
        return version
    if logged is None:
        logger.warning("the tags of %s are not checked: %s", directory, problem)
        return replace(resolve_uri(directory), name=name)
    # A copy has the files of the LoggedModel; its own name and signature count.
    own = {key: value for key, value in (version.tags if version else {}).items() if key == NAME_TAG}
    return replace(logged, name=name, tags={**logged.tags, **own})


def _logged_origin(model_id: Any) -> tuple[Origin | None, RankwiseError | None]:
    """The LoggedModel that `MLmodel` names, or why it was not found."""
    store = mlflow.get_tracking_uri()
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        # MLflow would create an empty database, in the current directory by default.
        return None, TrackingError(f"there is no store {store}; set MLFLOW_TRACKING_URI to check the tags")
    try:
        return resolve_uri(f"models:/{model_id}"), None
    except (TrackingError, ConfigError) as error:
        return None, error


def _noted(note: Path) -> tuple[str | None, str]:
    """Name and version of the registered model; no name if MLflow was given a LoggedModel."""
    try:
        noted: Any = read_yaml(note.read_text(encoding="utf-8"))
        return noted["model_name"], str(noted["model_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterIntegrityError(
            f"MLflow's note {note} cannot be read ({error!r}): fetch the model again"
        ) from error
