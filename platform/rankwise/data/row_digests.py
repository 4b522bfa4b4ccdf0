"""Digests of the prompts that an adapter was trained on.

`RowDigests` records which prompts an adapter was trained on without storing them, so that promotion needs no training
data. A digest is the first 16 bytes of SHA-256 over a salt and a prompt's key (`rows.row_keys`: everything before an
answer, white space folded, without the definition's system message; a document has one key). A conversation has one
digest for each answer that was learned. Any two of a billion prompts collide with a probability of 2**-69. The salt
prevents looking up the digests of common prompts, and comparing the files of two adapters. It is stored in the file and
derived from the arm, so a retry writes the same bytes. Anyone who can read the file can still test a guessed prompt:
that is its purpose.

The file: a line of JSON (`{"format", "salt", "rows", "digests", "init_from"}`), then the sorted digests, 16 bytes each.
Files of format 1 have one digest for each row, of the prompt of its last answer; they are read alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rankwise.exceptions import AssetError

FORMAT = 2
DIGEST_BYTES = 16
MANY_ROWS = 1_000_000
"""From this many rows on, the file's size is reported."""


@dataclass(frozen=True, kw_only=True)
class RowDigests:
    """The prompts of one training.

    Attributes:
        salt: Of the digests.
        rows: Rows that there were, equal prompts counted each.
        digests: Of the prompts of all answers.
        init_from: The registered adapter that training started from, whose prompts count too; None for none.
    """

    salt: bytes
    rows: int
    digests: frozenset[bytes]
    init_from: str | None = None

    @classmethod
    def of(cls, keys: Iterable[Sequence[str]], *, name: str, init_from: str | None = None) -> RowDigests:
        """Digest the keys of prompts.

        Args:
            keys: Of each row's prompts, as `rows.row_keys` gives them.
            name: Of the arm; it decides the salt.
            init_from: The registered adapter that training starts from.
        """
        salt = hashlib.sha256(b"rankwise training rows\x00" + name.encode()).digest()[:DIGEST_BYTES]
        rows = list(keys)
        digests = frozenset(_digest(salt, key) for row in rows for key in row)
        return cls(salt=salt, rows=len(rows), digests=digests, init_from=init_from)

    def __contains__(self, key: str) -> bool:
        """Whether a prompt of this key was trained on."""
        return _digest(self.salt, key) in self.digests

    def to_bytes(self) -> bytes:
        """The file; equal prompts and an equal name give equal bytes."""
        header = {
            "format": FORMAT,
            "salt": self.salt.hex(),
            "rows": self.rows,
            "digests": len(self.digests),
            "init_from": self.init_from,
        }
        return json.dumps(header, sort_keys=True).encode() + b"\n" + b"".join(sorted(self.digests))

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> RowDigests:
        """The inverse of `to_bytes`. `where` names the file in messages.

        Raises:
            AssetError: It is not such a file, cut short, or of a newer format.
        """
        head, _, body = content.partition(b"\n")
        try:
            header = json.loads(head)
            if header["format"] > FORMAT:
                raise AssetError(f"{where} has format {header['format']}; this release reads up to {FORMAT}: upgrade")
            salt, rows, count = bytes.fromhex(header["salt"]), int(header["rows"]), int(header["digests"])
            init_from = header["init_from"]
        except (ValueError, KeyError, TypeError) as error:
            raise AssetError(f"{where} is not a file of row digests: {error!r}") from error
        if len(body) != count * DIGEST_BYTES:
            raise AssetError(
                f"{where} has {len(body):,} bytes of digests, expected {count * DIGEST_BYTES:,}: the file is truncated"
            )
        digests = frozenset(body[at : at + DIGEST_BYTES] for at in range(0, len(body), DIGEST_BYTES))
        return cls(salt=salt, rows=rows, digests=digests, init_from=init_from)


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode()).digest()[:DIGEST_BYTES]
