"""The stored adapter as MLflow's Python function: any form of prompt in, a list of texts out.

`mlflow.pyfunc.load_model(uri)`, `mlflow models serve` and `mlflow.models.evaluate` come through `_load_pyfunc`. What
may be said at load is `model_config={"base_model": ..., "device": ..., "allow_base_mismatch": True}`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.assets.bounded_yaml import read_yaml
from rankwise.data.renderer import Renderer
from rankwise.exceptions import AdapterIntegrityError, ConfigError, TrackingError
from rankwise.flavor.fetch import Origin, read_mlmodel, resolve_uri
from rankwise.flavor.inputs import read_input
from rankwise.flavor.loading import LoadedAdapter, load_directory
from rankwise.flavor.options import LoadOptions
from rankwise.flavor.package import MODEL_CONFIG
from rankwise.flavor.signature import read_params
from rankwise.flavor.signing import NAME_TAG
from rankwise.modeling.dequantized import keep_dequantized
from rankwise.modeling.generation import row_seed
from rankwise.modeling.mixed_batch import Prompt, generate
from rankwise.modeling.pass_lock import pass_lock
from rankwise.settings import Settings
from rankwise.tracking.errors import is_final

logger = logging.getLogger(__name__)


class QloraModel:
    """What `mlflow.pyfunc` wraps: one adapter, decoded as batch inference does it (`modeling.mixed_batch`)."""

    def __init__(self, adapter: LoadedAdapter) -> None:
        self.adapter = adapter
        self.renderer = Renderer.create(adapter.tokenizer, base=adapter.base.path)
        # For as long as this object lives, which MLflow never closes; no attribute, since it cannot be pickled.
        kept = ExitStack()
        kept.enter_context(keep_dequantized(adapter.model))
        weakref.finalize(self, kept.close).atexit = False

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Answer prompts; several threads take turns.

        Args:
            data: Any form of the table in `rankwise.flavor.inputs`: a text, a list of texts, one chat, a list of
                chats, a dict, an array, or a DataFrame.
            params: `max_new_tokens` (64), `temperature` (0: the likeliest token), `top_k` (0: all tokens), `top_p`
                (1), `stop` (texts that end an answer), `seed` (0; of sampling: row i draws from (seed, i)),
                `batch_size` (8).

        Returns:
            One text per prompt, in order.

        Raises:
            ConfigError: The input has none of the forms, or a parameter is out of its range.
        """
        decoding, seed, batch_size = read_params(params)
        chats = read_input(data, self.adapter.metadata.system)
        with pass_lock(self.adapter.model):
            texts = self.renderer.texts(chats, add_generation_prompt=True)
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
    """JSON may hold half of a character, which is no text that a tokenizer takes."""
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"row {index}: the prompt has half of a character: {error}") from error


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> QloraModel:
    """Load a downloaded model directory; MLflow calls this.

    Args:
        path: The directory.
        model_config: `base_model`, `device`, `allow_base_mismatch`.

    Raises:
        RankwiseError: As `rankwise.flavor.load_model`.
    """
    values = {**MODEL_CONFIG, **(model_config or {})}
    unknown = sorted(set(values) - set(MODEL_CONFIG))
    if unknown:
        raise ConfigError(f"model_config: not known: {', '.join(unknown)}; there are {', '.join(MODEL_CONFIG)}")
    adapter = load_directory(
        Path(path),
        _origin(Path(path)),
        LoadOptions(
            settings=Settings.load(),
            base_model=values["base_model"],
            device=values["device"],
            allow_base_mismatch=bool(values["allow_base_mismatch"]),
        ),
    )
    return QloraModel(adapter)


def _origin(directory: Path) -> Origin:
    """Which stored model MLflow downloaded, where it left a note that it did: then the tags take part in the check.

    A directory that was carried elsewhere (an image of `mlflow models build-docker`) keeps the note, and its store may
    not be reachable from there: that is said, and the files are checked against their own manifest. The name in the
    note is that of the registered model: a signature may be for another one.
    """
    note = directory / "registered_model_meta"
    if not note.is_file():
        return resolve_uri(directory)
    name, number = _noted(note)
    model_id = read_mlmodel(directory).get("model_id")
    logged, version, problem, away = None, None, "", False
    try:
        logged = resolve_uri(f"models:/{model_id}")
    except (TrackingError, ConfigError) as error:
        problem, away = str(error), isinstance(error, TrackingError) and not is_final(error.__cause__ or error)
    if name is not None and not away:
        with suppress(TrackingError, ConfigError):  # Deleted, or of another store: the LoggedModel's tags are left.
            version = resolve_uri(f"models:/{name}/{number}")
    if version is not None and version.model_id == model_id:
        return version
    if logged is None:
        logger.warning("the tags of %s are not checked: %s", directory, problem)
        return replace(resolve_uri(directory), name=name)
    # Of a copy, which has the LoggedModel's files: its own name and signature count.
    own = {key: value for key, value in (version.tags if version else {}).items() if key == NAME_TAG}
    return replace(logged, name=name, tags={**logged.tags, **own})


def _noted(note: Path) -> tuple[str | None, str]:
    """Name and version of the registered model; no name where MLflow was given a LoggedModel."""
    try:
        noted: Any = read_yaml(note.read_text(encoding="utf-8"))
        return noted["model_name"], str(noted["model_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterIntegrityError(
            f"MLflow's note {note} cannot be read ({error!r}): fetch the model again"
        ) from error
