"""Who stands for a stored adapter: an Ed25519 signature beside it, made when it is logged, checked when it is fetched.

What is signed names all content: the digests of the manifest (every file but `MLmodel`), of the sealed parts of
`MLmodel` (the flavor's section, signature, example), and of the base. The signature is the file `signature.json` of the
model and the tag `rankwise.signature` of the LoggedModel and the version.

With `RANKWISE_TRUSTED_KEYS`, what none of these keys has signed is refused. Without it, unsigned adapters are loaded as
ever; a signature that is there must fit all the same. The environment's policy counts, whatever settings a caller hands
over. A signature says nothing about names: that an older signed version comes back under an alias, it does not prevent.

A plain PEFT directory that is named by its path (`evaluate DIR`, `inspect DIR`) has no signature and is asked for none:
who names a local directory trusts it. `import` makes a stored model of one, and signs it with the importer's key.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from rankwise.assets.keys import TrustedKey, key_id, private_key, trusted_keys
from rankwise.exceptions import AdapterIntegrityError
from rankwise.settings import Settings, write_atomically

SIGNATURE_NAME = "signature.json"
SIGNATURE_TAG = "rankwise.signature"
_FORMAT = "rankwise-signature"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What is signed: digests (`sha256:...`) of the manifest, of the sealed parts of MLmodel, and of the base."""

    manifest: str
    section: str
    base: str

    def message(self) -> bytes:
        """The bytes that are signed; they name format and version, so that they mean nothing elsewhere."""
        content = {"format": _FORMAT, "version": _VERSION, **vars(self)}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Who has signed an adapter.

    Attributes:
        key: Id of the key.
        name: What the key is called among the trusted ones; None where it is none of them.
    """

    key: str
    name: str | None

    def __str__(self) -> str:
        """For people."""
        if self.name is None:
            return f"signed by {self.key}, which is not among RANKWISE_TRUSTED_KEYS"
        return f"signed by {self.name} ({self.key})"


def sign(directory: Path, statement: Statement) -> str | None:
    """Sign a whole model directory, if `RANKWISE_SIGNING_KEY` is set.

    Returns:
        The value of the tag, or None.

    Raises:
        ConfigError: The key cannot be used.
        StorageError: The signature cannot be written.
    """
    path = Settings.load().signing_key
    if path is None:
        return None
    key = private_key(path)
    signature = key.sign(statement.message())
    public = key.public_key()
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "key": key_id(public),
        "public_key": _text(public.public_bytes_raw()),
        "statement": vars(statement),
        "signature": _text(signature),
    }
    write_atomically(directory / SIGNATURE_NAME, json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")
    return _tag(key_id(public), signature)


def check_signature(directory: Path, statement: Statement, tags: Mapping[str, str], where: str) -> Signer | None:
    """Check a model directory's signature.

    Args:
        directory: Where `signature.json` lies, or not.
        statement: What the directory turns out to be.
        tags: Of the LoggedModel and the version; empty for a directory.
        where: The model's URI or path, for messages.

    Returns:
        Who has signed; None for an unsigned adapter where no keys are trusted.

    Raises:
        AdapterIntegrityError: There is no signature by a trusted key, or the one that is there does not fit.
        ConfigError: A trusted key cannot be read.
    """
    paths = Settings.load().trusted_keys
    trusted = trusted_keys(paths)
    path = directory / SIGNATURE_NAME
    if not path.is_file():
        if SIGNATURE_TAG in tags:
            raise AdapterIntegrityError(
                f"{where} was signed, says the tag {SIGNATURE_TAG}, and {SIGNATURE_NAME} is gone: fetch it again"
            )
        if paths:
            raise AdapterIntegrityError(
                f"{where} is not signed, and RANKWISE_TRUSTED_KEYS asks for a signature by one of "
                f"{_names(trusted)}; log it again with RANKWISE_SIGNING_KEY, or take a signed version"
            )
        return None
    key, signature = _read(path, where)
    if not key.verifies(signature, statement.message()):
        raise AdapterIntegrityError(
            f"the signature of {where} is of other content than what is there; take another version, or fetch it again"
        )
    if tags.get(SIGNATURE_TAG, _tag(key.id, signature)) != _tag(key.id, signature):
        raise AdapterIntegrityError(f"the signature of {where} is another one than its tag {SIGNATURE_TAG} says")
    if paths and key.id not in trusted:
        raise AdapterIntegrityError(
            f"{where} is signed by {key.id}, which is none of RANKWISE_TRUSTED_KEYS ({_names(trusted)}); if its owner "
            "is to be trusted, put the public key there"
        )
    return Signer(key=key.id, name=trusted[key.id].name if key.id in trusted else None)


def _read(path: Path, where: str) -> tuple[TrustedKey, bytes]:
    try:
        document: Any = json.loads(path.read_bytes())
        if document["format"] != _FORMAT or document["version"] != _VERSION:
            raise ValueError(f"format {document['format']!r} version {document['version']!r}")
        raw = base64.b64decode(document["public_key"], validate=True)
        key = TrustedKey(name="", key=Ed25519PublicKey.from_public_bytes(raw))
        if document["key"] != key.id:
            raise ValueError("its key is not the one that it names")
        return key, base64.b64decode(document["signature"], validate=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterIntegrityError(f"the signature of {where} cannot be read: {error!r}; fetch it again") from error


def _tag(key: str, signature: bytes) -> str:
    return f"{key} {_text(signature)}"


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _names(trusted: Mapping[str, TrustedKey]) -> str:
    return ", ".join(sorted(key.name for key in trusted.values()))
