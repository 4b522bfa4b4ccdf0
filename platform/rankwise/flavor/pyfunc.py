"""The stored adapter as MLflow's Python function: any form of prompt in, a list of texts out.

`mlflow.pyfunc.load_model(uri)`, `mlflow models serve` and `mlflow.models.evaluate` come through `_load_pyfunc`. What
may be said at load is `model_config={"base_model": ..., "device": ..., "allow_base_mismatch": True}`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.assets.bounded_yaml import read_yaml
from rankwise.data.renderer import Renderer
from rankwise.exceptions import ConfigError, TrackingError
from rankwise.flavor.fetch import Origin, read_mlmodel, resolve_uri
from rankwise.flavor.inputs import Chat, read_input
from rankwise.flavor.loading import LoadedAdapter, load_directory
from rankwise.flavor.options import LoadOptions
from rankwise.flavor.package import MODEL_CONFIG
from rankwise.flavor.signature import read_params
from rankwise.flavor.signing import NAME_TAG
from rankwise.modeling.generation import Decoding, generate_batch, length_batches, row_seed
from rankwise.modeling.pass_lock import pass_lock
from rankwise.settings import Settings

logger = logging.getLogger(__name__)


class QloraModel:
    """What `mlflow.pyfunc` wraps."""

    def __init__(self, adapter: LoadedAdapter) -> None:
        self.adapter = adapter
        self.renderer = Renderer.create(adapter.tokenizer, base=adapter.base.path)

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
        # Neither `generate` nor tokenizers are made for several threads at a time.
        with pass_lock(self.adapter.model):
            return self._answers(chats, decoding, seed, batch_size)

    def _answers(self, chats: Sequence[Chat], decoding: Decoding, seed: int, batch_size: int) -> list[str]:
        texts = self.renderer.texts(chats, add_generation_prompt=True)
        prompts = self.renderer.tokens(texts)
        answers: dict[int, str] = {}
        for batch in length_batches([len(prompt) for prompt in prompts], batch_size):
            made = generate_batch(
                self.adapter.model,
                self.adapter.tokenizer,
                [prompts[index] for index in batch],
                decoding,
                seeds=[row_seed(seed, index) for index in batch],
            )
            answers.update({index: row.text for index, row in zip(batch, made, strict=True)})
        return [answers[index] for index in range(len(prompts))]

    def get_raw_model(self) -> LoadedAdapter:
        """The loaded adapter, for `PyFuncModel.get_raw_model`."""
        return self.adapter


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
    noted: Any = read_yaml(note.read_text(encoding="utf-8")) or {}
    name, model_id = noted.get("model_name"), read_mlmodel(directory).get("model_id")
    version = None
    try:
        version = resolve_uri(f"models:/{name}/{noted.get('model_version')}") if name else None
        if version is not None and version.model_id == model_id:
            return version
        # A copy, whose own name and signature count.
        origin = resolve_uri(f"models:/{model_id}")
    except (TrackingError, ConfigError) as error:
        logger.warning("the tags of %s are not checked: %s", directory, error)
        origin = resolve_uri(directory)
    signature = {} if version is None else {key: value for key, value in version.tags.items() if key == NAME_TAG}
    return replace(origin, name=name, tags={**origin.tags, **signature})
