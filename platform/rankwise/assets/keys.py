"""Ed25519 keys (RFC 8032) that sign adapters: one private key for whoever logs them, public keys for whoever trusts.

A key pair is two PEM files: `NAME.key` (PKCS #8, readable by its owner only) and `NAME.pub` (SubjectPublicKeyInfo), as
`openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them too. The private key is never logged, shown
or stored anywhere else.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

from rankwise.exceptions import ConfigError, StorageError
from rankwise.settings import fsync_directory, storage_errors, write_atomically

SUFFIXES = (".pub", ".pem")
_NEW = "`rankwise keys new DIR` makes a pair"


@dataclass(frozen=True, kw_only=True)
class TrustedKey:
    """A public key and what it is called here.

    Attributes:
        name: The file's name without its suffix.
        key: The key.
    """

    name: str
    key: Ed25519PublicKey

    @property
    def id(self) -> str:
        """What names the key."""
        return key_id(self.key)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the key's owner has signed the message."""
        try:
            self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


def key_id(key: Ed25519PublicKey) -> str:
    """`sha256:` and 64 hex digits over the public key (DER of its SubjectPublicKeyInfo)."""
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + hashlib.sha256(der).hexdigest()


def new_pair(directory: Path, name: str) -> tuple[Path, Path, str]:
    """Write a new pair; existing files are never replaced.

    Returns:
        The files of the private and of the public key, and the key's id.

    Raises:
        StorageError: One of the files is there, or cannot be written.
    """
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    for path in (private, public):
        if path.exists():
            raise StorageError(f"{path} is there already and is not replaced; take another name (--name)")
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with storage_errors(private, "writing a private key"):
        directory.mkdir(parents=True, exist_ok=True)
        # Created with its mode: there is no moment in which others could read it.
        descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fsync_directory(directory)
    write_atomically(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public, key_id(key.public_key())


def private_key(path: Path) -> Ed25519PrivateKey:
    """Read the private key that `RANKWISE_SIGNING_KEY` names.

    Raises:
        ConfigError: There is no such file, others may read it, or it is no Ed25519 key without a passphrase.
    """
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"RANKWISE_SIGNING_KEY: {path} cannot be read: {error.strerror}; {_NEW}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"RANKWISE_SIGNING_KEY: others than its owner may use {path} (mode {stat.S_IMODE(mode):o}); "
            f"chmod 600 {path}"
        )
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        # Without the library's own words and without a cause: nothing of the file may come into a log.
        closed = isinstance(error, TypeError)
        kind = "has a passphrase, which is not supported" if closed else "is no private key in PEM"
        raise ConfigError(f"RANKWISE_SIGNING_KEY: {path} {kind}; {_NEW}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"RANKWISE_SIGNING_KEY: {path} is a key of another kind than Ed25519; {_NEW}")
    return key


def public_key(path: Path) -> TrustedKey:
    """Read a public key.

    Raises:
        ConfigError: There is none in the file, or not one of Ed25519.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the public key {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no public key in PEM; {_NEW}, NAME.pub is the public one") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is a public key of another kind than Ed25519; {_NEW}")
    return TrustedKey(name=path.stem, key=key)


def trusted_keys(paths: Sequence[Path]) -> dict[str, TrustedKey]:
    """The keys that `RANKWISE_TRUSTED_KEYS` names, by their ids.

    Args:
        paths: Files, or directories whose `.pub` and `.pem` files count.

    Raises:
        ConfigError: A path is not there, a directory holds no key, or a file is none.
    """
    found: dict[str, TrustedKey] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES)
            if not files:
                # An empty directory would refuse everything, or trust everybody: neither is what was meant.
                raise ConfigError(f"RANKWISE_TRUSTED_KEYS: {path} holds no public key (*.pub); {_NEW}")
        for file in files:
            key = public_key(file)
            found[key.id] = key
    return found
