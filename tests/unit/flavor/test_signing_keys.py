from __future__ import annotations

import stat
import subprocess

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from rankwise.exceptions import ConfigError, StorageError
from rankwise.flavor.signing import new_pair, private_key, public_key, trusted_keys


def test_a_pair_signs_and_verifies_and_the_private_key_is_its_owners(tmp_path):
    private, public, key = new_pair(tmp_path / "keys", "team")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    signature = private_key(private).sign(b"message")
    trusted = public_key(public)
    assert (trusted.name, trusted.id) == ("team", key)
    assert trusted.verifies(signature, b"message")
    assert not trusted.verifies(signature, b"massage")
    assert not trusted.verifies(bytes(64), b"message")


def test_a_pair_is_never_replaced(tmp_path):
    private, _, _ = new_pair(tmp_path, "team")
    before = private.read_bytes()
    with pytest.raises(StorageError, match="already exists and is not replaced"):
        new_pair(tmp_path, "team")
    assert private.read_bytes() == before


def test_keys_of_openssl_are_taken(tmp_path):
    private, public = tmp_path / "o.key", tmp_path / "o.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    private.chmod(0o600)
    assert public_key(public).verifies(private_key(private).sign(b"x"), b"x")


def test_a_private_key_that_others_may_read_is_refused(tmp_path):
    private, _, _ = new_pair(tmp_path, "team")
    private.chmod(0o640)
    with pytest.raises(ConfigError, match=r"other users have access to .* \(mode 640\); chmod 600"):
        private_key(private)


def test_what_is_no_private_key_is_refused_without_a_word_of_its_content(tmp_path):
    path = tmp_path / "x.key"
    for content in (b"-----BEGIN PRIVATE KEY-----\nsecretsecret\n-----END PRIVATE KEY-----\n", b"secretsecret"):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="is not a private key in PEM") as caught:
            private_key(path)
        assert "secretsecret" not in str(caught.value)
        assert caught.value.__cause__ is None
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        private_key(tmp_path / "none.key")


def test_another_kind_of_key_and_one_with_a_passphrase_are_refused(tmp_path):
    other = generate_private_key(SECP256R1())
    path = tmp_path / "x.key"
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is not an Ed25519 key"):
        private_key(path)
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"abc")))
    with pytest.raises(ConfigError, match="has a passphrase"):
        private_key(path)
    public = tmp_path / "x.pub"
    public.write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigError, match="is not an Ed25519 public key"):
        public_key(public)


def test_trusted_keys_are_files_or_directories_and_none_at_all_is_an_error(tmp_path):
    _, one, first = new_pair(tmp_path / "a", "one")
    _, _, second = new_pair(tmp_path / "b", "two")
    assert {key.name for key in trusted_keys([one, tmp_path / "b"]).values()} == {"one", "two"}
    assert set(trusted_keys([one, tmp_path / "b"])) == {first, second}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no public key"):
        trusted_keys([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="is not a public key in PEM"):
        trusted_keys([tmp_path / "a" / "one.key"])
