"""The work of one prediction beside its output, so that it can be cut off anywhere and gone on with.

`OUTPUT.parts/` holds a manifest (what was asked, of which input, answered by which versions), an index of the input
(see `source`) and one file of answers for each shard of consecutive rows. A shard's file appears whole, by a rename.
When all are there the output is put together from the input's rows and the answers, and the directory goes away.
Aliases are resolved when the manifest is made: a run that is resumed uses the versions that it began with, wherever an
alias points by then.

The shards may also be answered by jobs of the queue, each a range of them, on any machine that sees the directory.
Their files carry the first digits of the prediction's name: what a worker writes that has not heard yet of a
`--restart` is never taken for an answer of the new prediction.

- What is asked of a table.
"""

from __future__ import annotations

import glob
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from rankwise.exceptions import ConfigError
from rankwise.files import storage_errors, temporary_name, write_atomically
from rankwise.inference.predictor import BATCH_SIZE, Answer
from rankwise.inference.source import Index, Survey
from rankwise.modeling.decoding.generation import Decoding

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_MANIFEST = "manifest.json"
_INDEX = "index.json"
_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Queued:
    """Whose work the shards are, where jobs of the queue answer them.

    Attributes:
        whole: Names the prediction in the rows of its jobs.
        spans: The shards of each job, as (first, behind the last).
    """

    whole: str
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From the manifest's file."""
        return cls(whole=values["whole"], spans=tuple((first, end) for first, end in values["spans"]))


class Stand(StrEnum):
    """How far the jobs of a prediction are: some have not ended, all have ended well, or all have ended."""

    OPEN = "open"
    DONE = "done"
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prediction is.

    Attributes:
        request: All that decides an answer beside the row and the model, and the input's digest.
        models: The resolved URI of each model asked for.
        adapters: The digest of each resolved model's manifest, where that was known before it was loaded.
        survey: What the input has.
        shard_rows: Rows of a shard; the last one may have fewer.
        queued: The jobs that answer the shards; None where one command does.
    """

    request: Mapping[str, Any]
    models: Mapping[str, str]
    adapters: Mapping[str, str]
    survey: Survey
    shard_rows: int
    queued: Queued | None = None

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {**asdict(self), "survey": self.survey.to_json()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        queued = None if values["queued"] is None else Queued.of(values["queued"])
        return cls(**{**values, "survey": Survey.of(values["survey"]), "queued": queued})

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return self.survey.rows

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_rows)

    def span(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows))


class Parts:
    """The directory `OUTPUT.parts`."""

    def __init__(self, output: Path, whole: str | None = None) -> None:
        """Of this output; `whole` names the queued prediction whose shards are written, None where one command does."""
        self.output = output
        self._whole = whole
        self.directory = output.with_name(output.name + ".parts")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes of this machine out.

        Raises:
            ConfigError: One is at it.
        """
        with storage_errors(self.directory, f"writing {self.directory.name}"):
            self.directory.mkdir(parents=True, exist_ok=True)
        # Beside the directory, which goes away while the lock is held.
        lock = FileLock(self.output.with_name(f".{self.output.name}.lock"))
        try:
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
        """What was begun; None where nothing was.

        Raises:
            ConfigError: Another release began it.
        """
        document = self._document()
        if document is None:
            return None
        version = document.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{self.directory} has format {version}, this release reads {FORMAT_VERSION}: finish it with the "
                "release that began it, or begin anew with --restart"
            )
        return Manifest.of(document)

    def queued(self) -> Queued | None:
        """Whose work was begun, whatever release began it; None where no jobs of the queue have it."""
        values = (self._document() or {}).get("queued")
        return None if values is None else Queued.of(values)

    def _document(self) -> dict[str, Any] | None:
        try:
            document: dict[str, Any] = json.loads((self.directory / _MANIFEST).read_bytes())
        except FileNotFoundError:
            return None
        return document

    def begin(self, manifest: Manifest) -> None:
        """Note what is to be done."""
        document = {"format_version": FORMAT_VERSION, **manifest.to_json()}
        write_atomically(self.directory / _MANIFEST, json.dumps(document, indent=1).encode())

    def index(self, manifest: Manifest) -> Index | None:
        """The index of the manifest's input; None where there is none that fits, as with release 0.1.0."""
        try:
            index = Index.of(json.loads((self.directory / _INDEX).read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s is damaged (%s) and made again", self.directory / _INDEX, error)
            return None
        expected = (manifest.request["input"], manifest.shard_rows)
        return index if index is not None and (index.input, index.shard_rows) == expected else None

    def write_index(self, index: Index) -> None:
        """Keep the index of the input."""
        write_atomically(self.directory / _INDEX, json.dumps(index.to_json()).encode())

    @property
    def own(self) -> bool:
        """Whether the directory is that of the queued prediction still."""
        queued = self.queued()
        return queued is not None and queued.whole == self._whole

    def has(self, shard: int) -> bool:
        """Whether a shard is done."""
        return self._found(shard) is not None

    def write(self, shard: int, answers: Sequence[Answer]) -> None:
        """Keep a shard's answers.

        Raises:
            StorageError: The disk is full, or the directory is not writable.
        """
        lines = [json.dumps(_compact(answer)) for answer in answers]
        write_atomically(self._path(shard, self._whole), "".join(line + "\n" for line in lines).encode())

    def answers(self, manifest: Manifest) -> Iterator[Answer]:
        """The answers of all rows, in order.

        Raises:
            ConfigError: A shard does not have its rows.
        """
        known = {each.name for each in fields(Answer)}
        for shard in range(manifest.shards):
            path = self._found(shard) or self._path(shard, self._whole)
            try:
                made = [json.loads(line) for line in path.read_bytes().splitlines()]
                answers = [Answer(**{key: one[key] for key in known & one.keys()}) for one in made]
            except (ValueError, AttributeError):
                answers = []
            if len(answers) != len(manifest.span(shard)):
                raise ConfigError(
                    f"{path} has {len(answers)} answers for {len(manifest.span(shard))} rows; remove the "
                    "file and run the same command again"
                )
            yield from answers

    def remove(self) -> None:
        """Throw everything away; in one step, so that a manifest never lacks its shards."""
        gone = temporary_name(self.directory)
        try:
            self.directory.rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what processes that were killed have left beside the output. Nobody else may be writing there."""
        pattern = f".{glob.escape(self.output.name)}.*.tmp"
        for path in [*self.output.parent.glob(pattern), *self.directory.glob(".*.tmp")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _found(self, shard: int) -> Path | None:
        """Where a shard lies. A queued prediction goes on with what a local command has answered."""
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
    """What is asked of a table.

    Attributes:
        models: URIs; the first answers rows that name none.
        model_column: The column in which a row may name its model.
        prompt: A template over columns; None for the columns `messages` or `prompt`.
        decoding: How tokens are chosen.
        seed: Of sampling.
        base_model: Where the base is, if not where it was recorded.
        allow_base_mismatch: Take another base all the same.
        device: `cpu`, `cuda:1`, ...; None for the first GPU, else the CPU.
        batch_size: Rows that are decoded together. It takes no part in the answers.
        shard_rows: Rows between two savings. It takes no part in the answers.
        fail_fast: Stop at the first row that cannot be answered.
    """

    models: tuple[str, ...] = ()
    model_column: str = "model"
    prompt: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    seed: int = 0
    base_model: str | None = None
    allow_base_mismatch: bool = False
    device: str | None = None
    batch_size: int = BATCH_SIZE
    shard_rows: int = SHARD_ROWS
    fail_fast: bool = False

    def identity(self, input_digest: str) -> dict[str, Any]:
        """What decides the answers, as plain values."""
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
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, for the row of a job."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        decoding = {**values["decoding"], "stop": tuple(values["decoding"]["stop"])}
        return cls(**{**values, "models": tuple(values["models"]), "decoding": Decoding(**decoding)})
