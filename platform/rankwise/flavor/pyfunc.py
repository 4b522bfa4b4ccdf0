"""The stored adapter as MLflow's Python function: any form of prompt in, a list of texts out.

`mlflow.pyfunc.load_model(uri)`, `mlflow models serve` and `mlflow.models.evaluate` come through `_load_pyfunc`. What
may be said at load is `model_config={"base_model": ..., "device": ..., "allow_base_mismatch": True}`.

| form | answers |
|---|---|
| a text | one |
| a list, tuple, Series or array of texts | one each |
| a message `{"role", "content"}` | one |
| one chat: a list of messages | one |
| a list, tuple, Series or array of chats (`{"messages": [...]}` or lists of messages) | one each |
| a dict with `messages` (one chat or a list of chats) or `prompt` (a text or a list of texts) | as many |
| a list of such dicts with one chat or one text | one each |
| a table with the column `messages` or `prompt`, or with one column only | one a row |

A text is the user's turn of a chat, after the system prompt that was recorded, if there is one. A message has a `role`
and a `content`, both texts; a chat has at least one. Anything else is a `ConfigError` that names the row.

Over HTTP, chats of different lengths go as `{"inputs": [{"messages": [...]}, ...]}` or as a table: MLflow's server
makes an array of a bare list of them, and refuses it.

- The forms of input that a stored adapter answers; each becomes a list of conversations, one per answer.
- Prompts to measure two models' agreement on: a few built-in ones, or a sample out of a file.
"""

from __future__ import annotations

import json
import logging
import random
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from rankwise.assets.input_checks import read_yaml
from rankwise.compat.mlflow import DOWNLOAD_NOTE, RequestedModel, requested_model, requested_uri
from rankwise.data.template import Message, Renderer
from rankwise.exceptions import AdapterIntegrityError, ConfigError, RankwiseError, TrackingError
from rankwise.flavor.fetch import Origin, read_mlmodel, resolve_uri, resolve_version
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

_FORMS = (
    "a text, a list of texts, a chat (a list of {'role', 'content'}), a list of chats, a dict with 'messages' or "
    "'prompt', an array, or a table with a column 'messages' or 'prompt' or with a single column"
)
Chat = list[Message]


def read_input(data: Any, system: str | None = None) -> list[Chat]:
    """Turn any form of the table above into conversations.

    Args:
        data: The input.
        system: A system prompt to put before bare texts.

    Raises:
        ConfigError: It has none of the forms; the message names the row and what it is.
    """
    if isinstance(data, pd.DataFrame):
        data = _column(data)
    if isinstance(data, pd.Series):
        data = data.tolist()
    data = _plain(data)
    if isinstance(data, Mapping) and not _is_message(data):
        data = _member(data)
    if isinstance(data, str) or _is_message(data):
        return [_chat(data, system, "the input")]
    if isinstance(data, list | tuple):
        if data and all(_is_message(entry) for entry in data):
            return [_chat(list(data), system, "the input")]
        return [_chat(entry, system, f"row {index}") for index, entry in enumerate(data)]
    raise ConfigError(f"the input must be {_FORMS}; got {type(data).__name__}")


def _column(table: pd.DataFrame) -> list[Any]:
    for name in ("messages", "prompt"):
        if name in table.columns:
            return list(table[name])
    if len(table.columns) == 1:
        return list(table.iloc[:, 0])
    if set(table.columns) == {"role", "content"}:
        # A chat that went through a table on its way (MLflow turns a list of dicts into one).
        return [{"messages": table.to_dict(orient="records")}]
    raise ConfigError(
        "a table needs a column 'messages' or 'prompt', or a single column; it has "
        f"{', '.join(map(str, table.columns)) or 'none'}"
    )


def _plain(value: Any) -> Any:
    """Arrays as lists and their elements as Python's own, at any depth: MLflow's server puts arrays everywhere."""
    if isinstance(value, np.ndarray):
        return _plain(_flat(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _flat(array: np.ndarray) -> Any:
    if array.ndim == 0:
        return array.item()
    if array.ndim == 2 and array.size and all(_is_message(entry) for entry in array.flat):
        return array.tolist()  # Chats of equal length, a row each.
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ConfigError(f"an array must have one dimension, or one column; got the shape {array.shape}")
    return array.tolist()


def _member(data: Mapping[str, Any]) -> Any:
    named = [name for name in ("messages", "prompt") if name in data]
    if len(named) != 1 or len(data) != 1:
        raise ConfigError(
            f"a dict must have the key 'messages' or 'prompt' and no other; got {', '.join(map(str, data)) or 'none'}; "
            "parameters such as max_new_tokens go into params"
        )
    return data[named[0]]


def _chat(entry: Any, system: str | None, where: str) -> Chat:
    if isinstance(entry, Mapping) and not _is_message(entry):
        entry = _member(entry)
        if isinstance(entry, list | tuple) and entry and not all(_is_message(one) for one in entry):
            raise ConfigError(f"{where}: a dict inside a list must hold one text or one chat, got {_kind(entry)}")
    if isinstance(entry, str):
        if not entry:
            raise ConfigError(f"{where}: the text is empty")
        turn: Message = {"role": "user", "content": entry}
        return [{"role": "system", "content": system}, turn] if system is not None else [turn]
    messages = [entry] if _is_message(entry) else entry
    if not isinstance(messages, list | tuple) or not messages:
        raise ConfigError(f"{where}: must be a text or a chat, got {_kind(entry)}; allowed are: {_FORMS}")
    chat: Chat = []
    for turn_index, message in enumerate(messages):
        if not _is_message(message):
            raise ConfigError(
                f"{where}: message {turn_index} must have 'role' and 'content', both texts; got {_kind(message)}"
            )
        chat.append({"role": message["role"], "content": message["content"]})
    return chat


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return type(value).__name__


logger = logging.getLogger(__name__)


class QloraModel:
    """What `mlflow.pyfunc` wraps: one adapter, decoded as batch inference does it (`modeling.decoding.scheduler`)."""

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
            data: Any form of the table in `rankwise.flavor.pyfunc`: a text, a list of texts, one chat, a list of
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
    """Which stored model MLflow is loading, so that its tags take part in the check.

    1. The URI given to `mlflow.pyfunc.load_model` names a version or a LoggedModel: that one.
    2. MLflow's note in the directory names a version: that one, if it is of this model. A directory that was carried
       elsewhere (an image of `mlflow models build-docker`) keeps its note, and may be next to another store.
    3. `MLmodel` names a LoggedModel: that one. The registered name is not known then.
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
    away = isinstance(problem, TrackingError) and not is_final(problem.__cause__ or problem)
    version = None
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
    """Name and version of the registered model; no name where MLflow was given a LoggedModel."""
    try:
        noted: Any = read_yaml(note.read_text(encoding="utf-8"))
        return noted["model_name"], str(noted["model_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterIntegrityError(
            f"MLflow's note {note} cannot be read ({error!r}): fetch the model again"
        ) from error


BUILT_IN = (
    "How are you today?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "2 + 2 =",
    "Name three colors.",
    "Translate to German: Good morning.",
    "Is water wet? Answer yes or no.",
    "Once upon a time",
)


def read_prompts(path: Path, count: int, seed: int = 0) -> list[Any]:
    """A random sample of a file's prompts, in the file's order.

    Args:
        path: `.jsonl` with texts or objects that have `prompt` or `messages` (other keys are left alone), or a text
            file with one prompt a line.
        count: How many at most.
        seed: Of the sample.

    Raises:
        ConfigError: The file cannot be read, or a line has none of the forms.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the prompts in {path}: {reason}") from error
    if not lines:
        raise ConfigError(f"{path} has no prompts")
    chosen = sorted(random.Random(seed).sample(range(len(lines)), min(count, len(lines))))
    if path.suffix != ".jsonl":
        return [lines[index] for index in chosen]
    return [_entry(lines[index], f"{path}: line {index + 1} with content") for index in chosen]


def tokens_of(prompts: list[Any], tokenizer: Any, base: Path, system: str | None) -> list[list[int]]:
    """Token ids of prompts up to where an answer begins: through the chat template, or bare where there is none.

    Raises:
        ConfigError: A prompt has none of the forms, is a chat where there is no template, or the template refuses it.
    """
    chats = read_input(prompts, system)
    if tokenizer.chat_template:
        renderer = Renderer.create(tokenizer, base=base)
        return renderer.tokens(renderer.texts(chats, add_generation_prompt=True))
    if any(len(chat) > 1 for chat in chats):
        raise ConfigError("the model has no chat template, so its prompts must be texts, not chats")
    return [list(tokenizer(chat[0]["content"])["input_ids"]) for chat in chats]


def _entry(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if isinstance(value, str):
        return value
    found = [name for name in ("messages", "prompt") if isinstance(value, dict) and name in value]
    if len(found) != 1:
        raise ConfigError(f"{where}: must be a text, or an object with either 'messages' or 'prompt'")
    return {found[0]: value[found[0]]}
