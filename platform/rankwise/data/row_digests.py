"""Which prompts an adapter was trained on, without the prompts: so that whoever promotes it needs no training data.

One digest for each prompt: the first 16 bytes of SHA-256 over a salt and the prompt's key (`conversation.prompt_key`:
everything before the last answer, white space folded, the definition's own system message left out). Two of a billion
prompts share one with a probability of 2**-69.

Salted, since plain digests of common prompts are listed somewhere, and since the files of two adapters would tell how
many rows they share. The salt stands in the file and follows from the arm, so that a repeated attempt writes the same
bytes. A salt keeps nobody who may read the file from asking whether a prompt that he guesses was trained on: that is
what the file is for.

The file: a line of JSON (`{"format", "salt", "rows", "digests", "init_from"}`), then the digests, sorted: 16 bytes a
prompt, 16 MB a million.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from rankwise.data.conversation import prompt_key
from rankwise.data.rows import Example
from rankwise.exceptions import AssetError

FORMAT = 1
DIGEST_BYTES = 16
MANY_ROWS = 1_000_000
"""From here on a person is told how large the file is."""


@dataclass(frozen=True, kw_only=True)
class RowDigests:
    """The prompts of one training.

    Attributes:
        salt: Of the digests.
        rows: Rows that there were, equal prompts counted each.
        digests: Of the prompts.
        init_from: The registered adapter that training went on from, whose own prompts count too; None for none.
    """

    salt: bytes
    rows: int
    digests: frozenset[bytes]
    init_from: str | None = None

    @classmethod
    def of(cls, keys: Iterable[str], *, name: str, init_from: str | None = None) -> RowDigests:
        """Digest the keys of prompts.

        Args:
            keys: Of each row's prompt, as `row_key` gives it.
            name: Of the arm; it decides the salt.
            init_from: The registered adapter that training goes on from.
        """
        salt = hashlib.sha256(b"rankwise training rows\x00" + name.encode()).digest()[:DIGEST_BYTES]
        found = [_digest(salt, key) for key in keys]
        return cls(salt=salt, rows=len(found), digests=frozenset(found), init_from=init_from)

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
            raise AssetError(f"{where} is no file of row digests: {error!r}") from error
        if len(body) != count * DIGEST_BYTES:
            raise AssetError(
                f"{where} holds {len(body):,} bytes of digests and says {count * DIGEST_BYTES:,}: cut short"
            )
        digests = frozenset(body[at : at + DIGEST_BYTES] for at in range(0, len(body), DIGEST_BYTES))
        return cls(salt=salt, rows=rows, digests=digests, init_from=init_from)


def row_key(example: Example, system: str | None) -> str:
    """The key of an example's prompt; `system` is the definition's own system message, which does not count."""
    messages = example.messages
    if messages[0]["role"] == "system" and messages[0]["content"] == system:
        messages = messages[1:]
    return prompt_key(messages)


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode()).digest()[:DIGEST_BYTES]
