"""The work of one prediction beside its output, so that it can be cut off anywhere and gone on with.

`OUTPUT.parts/` holds a manifest (what was asked, of which input, answered by which versions) and one file of answers
for each shard of consecutive rows. A shard's file appears whole, by a rename. When all are there the output is put
together from the input's rows and the answers, and the directory goes away. Aliases are resolved when the manifest is
made: a run that is gone on with uses the versions that it began with, wherever an alias points by then.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rankwise.exceptions import ConfigError
from rankwise.inference.answer import Answer
from rankwise.settings import storage_errors, write_atomically

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prediction is.

    Attributes:
        request: All that decides an answer beside the row and the model, and the input's digest.
        models: The resolved URI of each model asked for.
        rows: Rows of the input.
        shard_rows: Rows of a shard; the last one may have fewer.
    """

    request: Mapping[str, Any]
    models: Mapping[str, str]
    rows: int
    shard_rows: int

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_rows)

    def span(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows))


class Parts:
    """The directory `OUTPUT.parts`."""

    def __init__(self, output: Path) -> None:
        """Of this output."""
        self.output = output
        self.directory = output.with_name(output.name + ".parts")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out.

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
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def manifest(self) -> Manifest | None:
        """What was begun; None where nothing was.

        Raises:
            ConfigError: Another release began it.
        """
        try:
            document = json.loads((self.directory / _MANIFEST).read_bytes())
        except FileNotFoundError:
            return None
        version = document.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{self.directory} has format {version}, this release reads {FORMAT_VERSION}: finish it with the "
                "release that began it, or begin anew with --restart"
            )
        return Manifest(**document)

    def begin(self, manifest: Manifest) -> None:
        """Note what is to be done."""
        document = {"format_version": FORMAT_VERSION, **asdict(manifest)}
        write_atomically(self.directory / _MANIFEST, json.dumps(document, indent=1).encode())

    def has(self, shard: int) -> bool:
        """Whether a shard is done."""
        return self._path(shard).exists()

    def write(self, shard: int, answers: Sequence[Answer]) -> None:
        """Keep a shard's answers.

        Raises:
            StorageError: The disk is full, or the directory is not writable.
        """
        lines = [json.dumps(_compact(answer)) for answer in answers]
        write_atomically(self._path(shard), "".join(line + "\n" for line in lines).encode())

    def answers(self, manifest: Manifest) -> Iterator[Answer]:
        """The answers of all rows, in order.

        Raises:
            ConfigError: A shard does not have its rows.
        """
        known = {each.name for each in fields(Answer)}
        for shard in range(manifest.shards):
            lines = self._path(shard).read_text(encoding="utf-8").splitlines()
            if len(lines) != len(manifest.span(shard)):
                raise ConfigError(
                    f"{self._path(shard)} has {len(lines)} answers for {len(manifest.span(shard))} rows; remove the "
                    "file and run the same command again"
                )
            for line in lines:
                yield Answer(**{key: value for key, value in json.loads(line).items() if key in known})

    def remove(self) -> None:
        """Throw everything away."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:06d}.jsonl"


def _compact(answer: Answer) -> dict[str, Any]:
    return {key: value for key, value in asdict(answer).items() if value is not None}
