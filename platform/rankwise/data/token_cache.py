"""The cache of tokens: one Arrow file per set of rows, template, tokenizer and length."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from filelock import FileLock

from rankwise.data.encoding import EncodedSet
from rankwise.settings import storage_errors, write_atomically

if TYPE_CHECKING:
    from rankwise.data.renderer import Renderer
    from rankwise.data.rows import Example

FORMAT = 1
"""Raised whenever the same key would give other tokens or another file."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCache:
    """A directory of encoded sets. Safe for several processes: one makes an entry, the others wait for it."""

    directory: Path

    def key(self, examples: Sequence[Example], renderer: Renderer, max_length: int | None) -> str:
        """64 hex digits over the rows' ids and messages, the renderer and the length limit."""
        digest = hashlib.sha256(json.dumps([FORMAT, renderer.digest(), max_length]).encode())
        for example in examples:
            chat = [[message["role"], message["content"]] for message in example.messages]
            digest.update(json.dumps([example.id, example.prompt, chat]).encode())
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """Where the entry of `key` lies."""
        return self.directory / f"{key}.arrow"

    def get(self, key: str, make: Callable[[], EncodedSet]) -> EncodedSet:
        """The entry of `key`; made and stored when it is not there or is not what was stored.

        Raises:
            StorageError: The cache cannot be written.
        """
        path = self.path(key)
        with storage_errors(path, "caching tokens"):
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire()
        try:
            if path.exists():
                try:
                    return read(path, key)
                except CorruptEntryError as error:
                    logger.warning("Tokens are made anew: %s", error)
            made = make()
            write_atomically(path, to_bytes(made, key))
            return made
        finally:
            lock.release()


class CorruptEntryError(Exception):
    """Raised when a file is not the set of tokens that was stored in it."""


def to_bytes(encoded: EncodedSet, key: str) -> bytes:
    """An Arrow file with the columns id, input_ids and supervised; key, digest and what was cut are its metadata."""
    offsets = pa.array(encoded.offsets, pa.int64())
    table = pa.table(
        {
            "id": pa.array(encoded.ids, pa.string()),
            "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(encoded.input_ids, pa.int32())),
            "supervised": pa.LargeListArray.from_arrays(offsets, pa.array(encoded.supervised, pa.bool_())),
        }
    ).replace_schema_metadata(
        {
            "rankwise.key": key,
            "rankwise.digest": encoded.digest,
            "rankwise.lost": json.dumps([encoded.cut, encoded.dropped, encoded.unended, encoded.longest]),
        }
    )
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def read(path: Path, key: str) -> EncodedSet:
    """Read an entry and check that it is the one of `key`, with the digest that was stored.

    Raises:
        CorruptEntryError: It is not an entry, or not the one that was stored.
    """
    try:
        with pa.ipc.open_file(path.read_bytes()) as reader:
            table = reader.read_all().combine_chunks()
        metadata = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        *lost, longest = json.loads(metadata["rankwise.lost"])
        cut, dropped, unended = (tuple(names) for names in lost)
        lists = _single(table, "input_ids")
        encoded = EncodedSet(
            ids=tuple(table.column("id").to_pylist()),
            offsets=np.asarray(lists.offsets, dtype=np.int64),
            input_ids=np.asarray(lists.values, dtype=np.int32),
            supervised=np.asarray(_single(table, "supervised").values.to_numpy(zero_copy_only=False), dtype=np.bool_),
            cut=cut,
            dropped=dropped,
            unended=unended,
            longest=longest,
        )
        digest = encoded.digest
        stored = metadata["rankwise.key"], metadata["rankwise.digest"]
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise CorruptEntryError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if stored != (key, digest):
        raise CorruptEntryError(f"{path} has the digest {digest}, stored was {stored[1]} for the key {stored[0]}")
    return encoded


def _single(table: pa.Table, name: str) -> pa.LargeListArray:
    chunks = table.column(name).chunks
    return chunks[0] if chunks else pa.array([], table.schema.field(name).type)
