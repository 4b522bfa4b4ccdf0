"""State of an unfinished prediction in `OUTPUT.parts/`: request, manifest, input index and shards of answers.

Each shard of consecutive rows has one file, which appears complete by a rename. When all shards exist, the output is
written from them and the directory is removed. The manifest holds resolved versions, so a resumed run is independent
of aliases that have moved.

Jobs of the queue may also answer ranges of shards, on any machine that sees the directory. Their file names contain
the start of the prediction's id, so a late write of a job from before `--restart` never counts as an answer.
"""

from __future__ import annotations

import glob
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from rankwise.data.tables import TextFormat
from rankwise.exceptions import ConfigError
from rankwise.files import make_directory, storage_errors, temporary_name, write_atomically
from rankwise.inference.predictor import BATCH_SIZE, Answer
from rankwise.inference.source import INPUT_TEXT, InputIndex, Survey
from rankwise.modeling.decoding.generation import Decoding
from rankwise.records import DamagedRecordError, parse_record

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_OBJECT: TypeAdapter[Any] = TypeAdapter(dict[str, Any])
_ANSWER = TypeAdapter(Answer)
_MANIFEST = "manifest.json"
_INDEX = "index.json"
_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class QueuedJobs:
    """The jobs of prediction `whole`; `spans` has the shards of each as (first, end), end exclusive."""

    whole: str
    spans: tuple[tuple[int, int], ...]


class JobsStatus(StrEnum):
    """Status of a prediction's jobs: some have not ended, all have succeeded, or all have ended."""

    OPEN = "open"
    DONE = "done"
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prediction answers, and with which models.

    `request` holds the input's digest and the options that determine answers; `models` the resolved URI of each
    requested model; `adapters` the manifest digests known before loading; `queued` is None for a local command.
    """

    request: Mapping[str, Any]
    models: Mapping[str, str]
    adapters: Mapping[str, str]
    survey: Survey
    shard_rows: int
    queued: QueuedJobs | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {**asdict(self), "survey": self.survey.to_json()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_json`. Raises `DamagedRecordError`."""
        return parse_record(json.dumps(values).encode(), _RECORD)

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return self.survey.rows

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def span(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows))


_RECORD, _QUEUED = TypeAdapter(Manifest), TypeAdapter(QueuedJobs)


class Parts:
    """The directory `OUTPUT.parts`."""

    def __init__(self, output: Path, whole: str | None = None) -> None:
        """Name the directory of `output`; `whole` is the id of a queued prediction, None for a local command."""
        self.output = output
        self._whole = whole
        self.directory = output.with_name(output.name + ".parts")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the output against other processes of this machine.

        Raises:
            ConfigError: Another process holds the lock.
        """
        make_directory(self.directory, f"writing {self.directory.name}")
        # Outside of the directory, which is removed while the lock is held.
        lock = FileLock(self.output.with_name(f".{self.output.name}.lock"))
        try:
            with storage_errors(self.output, f"writing {self.output.name}"):
                lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"another process is writing {self.output}; wait for it, or name another output"
            ) from None
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def manifest(self) -> Manifest | None:
        """The manifest; None if no prediction was started.

        Raises:
            ConfigError: Another release wrote it.
        """
        document = self._document()
        if document is None:
            return None
        version = document.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{self.directory} has format {version!r}, this release reads {FORMAT_VERSION}: finish it with the "
                "release that started it, or start over with --restart"
            )
        try:
            manifest = Manifest.of(document)
        except DamagedRecordError as error:
            raise self._damaged(_MANIFEST, str(error)) from error
        if manifest.shard_rows < 1 or manifest.rows < 0:
            problem = f"{manifest.rows} rows in shards of {manifest.shard_rows}"
            raise self._damaged(_MANIFEST, problem)
        return manifest

    def queued(self) -> QueuedJobs | None:
        """The queued jobs of the manifest, of any release; None if there are none."""
        values = (self._document() or {}).get("queued")
        try:
            return None if values is None else parse_record(json.dumps(values).encode(), _QUEUED)
        except DamagedRecordError as error:
            raise self._damaged(_MANIFEST, f"queued: {error}") from error

    def _document(self) -> dict[str, Any] | None:
        try:
            document: dict[str, Any] = parse_record((self.directory / _MANIFEST).read_bytes(), _OBJECT)
            return document
        except FileNotFoundError:
            return None
        except (DamagedRecordError, OSError) as error:
            raise self._damaged(_MANIFEST, str(error)) from error

    def _damaged(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.directory / name} is damaged: {problem}; start over with --restart")

    def begin(self, manifest: Manifest) -> None:
        """Write the manifest."""
        document = {"format_version": FORMAT_VERSION, **manifest.to_json()}
        write_atomically(self.directory / _MANIFEST, json.dumps(document, indent=1).encode())

    def index(self, manifest: Manifest) -> InputIndex | None:
        """The index of the manifest's input; None if it is missing or does not match."""
        try:
            index = InputIndex.of(parse_record((self.directory / _INDEX).read_bytes(), _OBJECT))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            logger.warning("%s is damaged (%s) and will be rebuilt", self.directory / _INDEX, error)
            return None
        expected = (manifest.request["input"], manifest.shard_rows)
        return index if index is not None and (index.input, index.shard_rows) == expected else None

    def write_index(self, index: InputIndex) -> None:
        """Write the index of the input."""
        write_atomically(self.directory / _INDEX, json.dumps(index.to_json()).encode())

    @property
    def own(self) -> bool:
        """Whether the directory still belongs to this queued prediction."""
        queued = self.queued()
        return queued is not None and queued.whole == self._whole

    def has(self, shard: int) -> bool:
        """Whether a shard is answered."""
        return self._shard_file(shard) is not None

    def write(self, shard: int, answers: Sequence[Answer]) -> None:
        """Write the answers of a shard."""
        lines = [json.dumps(_compact(answer)) for answer in answers]
        write_atomically(self._path(shard, self._whole), "".join(line + "\n" for line in lines).encode())

    def answers(self, manifest: Manifest) -> Iterator[Answer]:
        """The answers of all rows, in order.

        Raises:
            ConfigError: A shard is missing, is damaged, or has the wrong number of answers.
        """
        for shard in range(manifest.shards):
            path = self._shard_file(shard) or self._path(shard, self._whole)
            try:
                answers = [parse_record(line, _ANSWER) for line in path.read_bytes().splitlines()]
            except (DamagedRecordError, OSError):
                answers = []
            if len(answers) != len(manifest.span(shard)):
                raise ConfigError(
                    f"{path} has {len(answers)} answers for {len(manifest.span(shard))} rows; remove the "
                    "file, if it exists, and run the same command again"
                )
            yield from answers

    def remove(self) -> None:
        """Remove the directory in one step, so that a manifest never lacks its shards."""
        doomed = temporary_name(self.directory)
        try:
            self.directory.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        """Remove temporary files of killed processes. No other process may be writing."""
        pattern = f".{glob.escape(self.output.name)}.*.tmp"
        for path in [*self.output.parent.glob(pattern), *self.directory.glob(".*.tmp")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _shard_file(self, shard: int) -> Path | None:
        """The file of a shard. A queued prediction also uses shards that a local command has answered."""
        places = (self._path(shard, self._whole), self._path(shard, None))
        return next((path for path in places if path.exists()), None)

    def _path(self, shard: int, whole: str | None) -> Path:
        owner = "" if whole is None else f"-{whole[:_DIGITS]}"
        return self.directory / f"shard-{shard:06d}{owner}.jsonl"


def _compact(answer: Answer) -> dict[str, Any]:
    return {key: value for key, value in asdict(answer).items() if value is not None}


SHARD_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of a prediction.

    The first of `models` answers rows that name none in `model_column`. `prompt` None reads the columns of the stored
    template, `messages` or `prompt`; `delimiter` and `encoding` None are the usual ones of a text input; `base_model`,
    `device` and `attn_implementation` None select the recorded base, the first GPU (or the CPU) and the attention that
    training used. `batch_size` and `shard_rows` have no effect on answers.
    """

    models: tuple[str, ...] = ()
    model_column: str = "model"
    prompt: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    seed: int = 0
    base_model: str | None = None
    allow_base_mismatch: bool = False
    device: str | None = None
    attn_implementation: str | None = None
    batch_size: int = BATCH_SIZE
    shard_rows: int = SHARD_ROWS
    fail_fast: bool = False
    delimiter: str | None = None
    encoding: str | None = None

    @property
    def text(self) -> TextFormat:
        """How a text input is written."""
        return replace(INPUT_TEXT, delimiter=self.delimiter, encoding=self.encoding or INPUT_TEXT.encoding)

    def identity(self, input_digest: str) -> dict[str, Any]:
        """The input's digest and the options that determine answers, as plain values."""
        return {
            "input": input_digest,
            "models": list(self.models),
            "model_column": self.model_column,
            "prompt": self.prompt,
            "max_new_tokens": self.decoding.max_new_tokens,
            "temperature": self.decoding.temperature,
            "top_k": self.decoding.top_k,
            "top_p": self.decoding.top_p,
            "stop": list(self.decoding.stop),
            "seed": self.seed,
            "base_model": self.base_model,
            "allow_base_mismatch": self.allow_base_mismatch,
            # Left out where they are not given, as in predictions of earlier releases.
            **({} if self.delimiter is None else {"delimiter": self.delimiter}),
            **({} if self.encoding is None else {"encoding": self.encoding}),
            **({} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}),
        }

    def to_json(self) -> dict[str, Any]:
        """All options, for a job's spec."""
        values = asdict(self)
        for name in ("delimiter", "encoding"):  # Workers of earlier releases do not know these.
            if values[name] is None:
                del values[name]
        return values

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        decoding = {**values["decoding"], "stop": tuple(values["decoding"]["stop"])}
        return cls(**{**values, "models": tuple(values["models"]), "decoding": Decoding(**decoding)})
