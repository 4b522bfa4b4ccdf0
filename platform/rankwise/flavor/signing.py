"""Signatures of stored adapters (Ed25519, RFC 8032): made when an adapter is logged, checked when it is fetched.

A signature covers all content: the digests of the manifest (every file but `MLmodel`), of the sealed parts of `MLmodel`
(the flavor's section, signature, example), and of the base. It is the file `signature.json` of the model, and the tag
`rankwise.signature` of the LoggedModel and the version.

Names: if an adapter is registered when it is logged, the signature is for that registered model and does not count
under another name. So nobody with write access to the registry alone can replace a model by another signed adapter.
`sign_version` signs a version (a copy, a renamed or unsigned model) for its name, in the tag `rankwise.signature.name`.
A signature without a name (by an earlier release, or of an adapter that was not registered) counts under every name.

Trust: with `RANKWISE_TRUSTED_KEYS`, everything that none of these keys signed is refused. Without it, unsigned adapters
load under every name, but an existing signature must fit the content. The environment decides, whatever settings a
caller passes. Signatures do not prevent a rollback of an alias to an older signed version of the same name. A PEFT
directory given by its path (`evaluate DIR`, `inspect DIR`) needs no signature; `import` signs with the importer's key.

Keys: a pair is two PEM files, `NAME.key` (PKCS #8, readable by its owner only) and `NAME.pub` (SubjectPublicKeyInfo),
as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them. The private key is never logged, shown
or copied.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from rankwise.digests import canonical_json, content_digest
from rankwise.exceptions import AdapterIntegrityError, ConfigError, StorageError
from rankwise.files import fsync_directory, make_directory, storage_errors, write_atomically
from rankwise.settings import Settings

SUFFIXES = (".pub", ".pem")
_NEW = "`rankwise keys new DIR` makes a pair"


@dataclass(frozen=True, kw_only=True)
class TrustedKey:
    """A public key; its name is the file's name without suffix."""

    name: str
    key: Ed25519PublicKey

    @property
    def id(self) -> str:
        """The key's id, see `key_id`."""
        return key_id(self.key)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the signature of the message was made with this key."""
        try:
            self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


def key_id(key: Ed25519PublicKey) -> str:
    """`sha256:` and 64 hex digits over the public key (DER of its SubjectPublicKeyInfo)."""
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return content_digest(der)


def new_pair(directory: Path, name: str) -> tuple[Path, Path, str]:
    """Write a new pair; return the files of the private and the public key, and the key's id.

    Raises:
        StorageError: One of the files exists, or cannot be written.
    """
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    for path in (private, public):
        if path.exists():
            raise StorageError(f"{path} already exists and is not replaced; use another name (--name)")
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with storage_errors(private, "writing a private key"):
        make_directory(directory, "writing a private key", shared=True)
        # Created with its mode, so that other users can never read it.
        descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fsync_directory(directory)
    content = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_atomically(public, content, shared=True)
    return private, public, key_id(key.public_key())


def private_key(path: Path) -> Ed25519PrivateKey:
    """Read the private key that `RANKWISE_SIGNING_KEY` names.

    Raises:
        ConfigError: There is no such file, other users have access to it, or it is no Ed25519 key without a passphrase.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"RANKWISE_SIGNING_KEY: {path} cannot be read: {error.strerror}; {_NEW}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"RANKWISE_SIGNING_KEY: other users have access to {path} (mode {stat.S_IMODE(mode):o}); chmod 600 {path}"
        )
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        # Neither the library's message nor the cause, so that no content of the file reaches a log.
        closed = isinstance(error, TypeError)
        kind = "has a passphrase, which is not supported" if closed else "is not a private key in PEM"
        raise ConfigError(f"RANKWISE_SIGNING_KEY: {path} {kind}; {_NEW}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"RANKWISE_SIGNING_KEY: {path} is not an Ed25519 key; {_NEW}")
    return key


def public_key(path: Path) -> TrustedKey:
    """Read a public key.

    Raises:
        ConfigError: The file has no Ed25519 key.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the public key {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a public key in PEM; {_NEW}, NAME.pub is the public one") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is not an Ed25519 public key; {_NEW}")
    return TrustedKey(name=path.stem, key=key)


def trusted_keys(paths: Sequence[Path]) -> dict[str, TrustedKey]:
    """The keys that `RANKWISE_TRUSTED_KEYS` names, by id. Directories stand for their `.pub` and `.pem` files.

    Raises:
        ConfigError: A path does not exist, a directory contains no key, or a file is no key.
    """
    trusted: dict[str, TrustedKey] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not files:
                # An empty directory would refuse everything or trust everyone; neither is intended.
                raise ConfigError(f"RANKWISE_TRUSTED_KEYS: {path} holds no public key (*.pub); {_NEW}")
        for file in files:
            key = public_key(file)
            trusted[key.id] = key
    return trusted


SIGNATURE_NAME = "signature.json"
SIGNATURE_TAG = "rankwise.signature"
NAME_TAG = "rankwise.signature.name"
_FORMAT = "rankwise-signature"
_WITHOUT_NAME, _WITH_NAME = 1, 2
_HOW = "`rankwise keys sign models:/NAME/VERSION`"


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The signed content: three digests, and the registered model that it is for (None: all)."""

    manifest: str
    section: str
    base: str
    name: str | None = None

    @property
    def version(self) -> int:
        """Version of the format: 1 without a name, as the first release signs and reads it."""
        return _WITHOUT_NAME if self.name is None else _WITH_NAME

    def to_dict(self) -> dict[str, str]:
        """As plain values."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def message(self) -> bytes:
        """The signed bytes. They contain format and version, so they have no meaning elsewhere."""
        content = {"format": _FORMAT, "version": self.version, **self.to_dict()}
        return canonical_json(content, ascii_only=True)


@dataclass(frozen=True, kw_only=True)
class Signer:
    """The signer of an adapter.

    `key` is the key's id, `name` its name among the trusted keys, if any; `model` is the registered model (None: all).
    """

    key: str
    name: str | None
    model: str | None = None

    def __str__(self) -> str:
        """One line for users."""
        meant = "" if self.model is None else f" for {self.model}"
        if self.name is None:
            return f"signed{meant} by {self.key}, which is not among RANKWISE_TRUSTED_KEYS"
        return f"signed{meant} by {self.name} ({self.key})"


@dataclass(frozen=True, kw_only=True)
class _Signature:
    """A signature that was read: its key, the registered model it is for, and its bytes."""

    key: TrustedKey
    model: str | None
    content: bytes


def sign(directory: Path, statement: Statement) -> str | None:
    """Sign a complete model directory and return the tag's value; None if `RANKWISE_SIGNING_KEY` is not set.

    Raises:
        ConfigError: The key cannot be used.
        StorageError: The signature cannot be written.
    """
    document = signed(statement)
    if document is None:
        return None
    write_atomically(directory / SIGNATURE_NAME, json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")
    return f"{document['key']} {document['signature']}"


def signed(statement: Statement) -> dict[str, Any] | None:
    """The content of `signature.json` and of the tag `rankwise.signature.name`; None without `RANKWISE_SIGNING_KEY`.

    Raises:
        ConfigError: The key cannot be used.
    """
    path = Settings.load().signing_key
    if path is None:
        return None
    key = private_key(path)
    public = key.public_key()
    return {
        "format": _FORMAT,
        "version": statement.version,
        "key": key_id(public),
        "public_key": _text(public.public_bytes_raw()),
        "statement": statement.to_dict(),
        "signature": _text(key.sign(statement.message())),
    }


def check_signature(
    directory: Path, statement: Statement, tags: Mapping[str, str], where: str, name: str | None = None
) -> Signer | None:
    """Check a stored model's signatures; return the signer, or None for an unsigned adapter without trusted keys.

    `statement` is the directory's actual content, `name` the registered model (None for a LoggedModel or a directory).

    Raises:
        AdapterIntegrityError: No trusted key has signed it, or a signature does not fit the content.
        ConfigError: A trusted key cannot be read.
    """
    paths = Settings.load().trusted_keys
    trusted = trusted_keys(paths)
    signatures = _signatures(directory, statement, tags, where)
    if not paths:
        return _signer(signatures[0], trusted) if signatures else None
    if not signatures:
        raise AdapterIntegrityError(
            f"{where} is not signed, and RANKWISE_TRUSTED_KEYS requires a signature by one of {_names(trusted)}; log "
            f"it again with RANKWISE_SIGNING_KEY, use a signed version, or sign this one ({_HOW})"
        )
    known = [signature for signature in signatures if signature.key.id in trusted]
    if not known:
        raise AdapterIntegrityError(
            f"{where} is signed by {', '.join(signature.key.id for signature in signatures)}, which is none of "
            f"RANKWISE_TRUSTED_KEYS ({_names(trusted)}); if you trust its owner, add the public key"
        )
    valid = [signature for signature in known if name is None or signature.model in (None, name)]
    if not valid:
        raise AdapterIntegrityError(
            f"{where} was signed for the registered model {' and '.join(str(signature.model) for signature in known)}, "
            f"and is a version of {name} here: someone may have replaced another adapter with it; if it belongs there, "
            f"sign it for that name ({_HOW})"
        )
    return _signer(valid[0], trusted)


def _signatures(directory: Path, statement: Statement, tags: Mapping[str, str], where: str) -> list[_Signature]:
    """The signatures in a model's file and in the tag of its name, each checked against the content."""
    signatures = []
    path = directory / SIGNATURE_NAME
    if path.is_file():
        signature = _read(path.read_bytes, statement, where)
        tag = f"{signature.key.id} {_text(signature.content)}"
        if tags.get(SIGNATURE_TAG, tag) != tag:
            raise AdapterIntegrityError(f"the signature of {where} differs from its tag {SIGNATURE_TAG}")
        signatures.append(signature)
    elif SIGNATURE_TAG in tags:
        raise AdapterIntegrityError(
            f"{where} was signed, according to its tag {SIGNATURE_TAG}, but {SIGNATURE_NAME} is missing: fetch it again"
        )
    if NAME_TAG in tags:
        signatures.append(_read(lambda: tags[NAME_TAG], statement, f"{where}, in its tag {NAME_TAG},"))
    return signatures


def _read(read: Callable[[], str | bytes], content: Statement, where: str) -> _Signature:
    try:
        document: Any = json.loads(read())
        statement = replace(content, name=document["statement"].get("name"))
        if document["format"] != _FORMAT or document["version"] != statement.version:
            raise ValueError(f"format {document['format']!r} version {document['version']!r}")
        raw = base64.b64decode(document["public_key"], validate=True)
        key = TrustedKey(name="", key=Ed25519PublicKey.from_public_bytes(raw))
        if document["key"] != key.id:
            raise ValueError("its key is not the one that it names")
        signature = base64.b64decode(document["signature"], validate=True)
        fits = key.verifies(signature, statement.message())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterIntegrityError(f"the signature of {where} cannot be read: {error!r}; fetch it again") from error
    if not fits:
        raise AdapterIntegrityError(
            f"the signature of {where} does not fit its content; use another version, or fetch it again"
        )
    return _Signature(key=key, model=statement.name, content=signature)


def _signer(signature: _Signature, trusted: Mapping[str, TrustedKey]) -> Signer:
    known = trusted.get(signature.key.id)
    return Signer(key=signature.key.id, name=None if known is None else known.name, model=signature.model)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _names(trusted: Mapping[str, TrustedKey]) -> str:
    return ", ".join(sorted(key.name for key in trusted.values()))
