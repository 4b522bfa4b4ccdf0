import errno
import logging
import os
import threading

import numpy as np
import pytest
from helpers.data_rows import ask, make_renderer

from rankwise.data.tokens import CorruptEntryError, Encoded, EncodedSet, TokenCache, read, to_bytes
from rankwise.exceptions import StorageError

KEY = "0" * 64


def make(token=1):
    return EncodedSet.of(
        [Encoded(id="a", input_ids=np.array([token, 2], np.int32), supervised=np.array([False, True]))],
        cut=("a",),
        dropped=("b", "c"),
        unended=("d",),
        longest=9,
    )


def never():
    raise AssertionError("made although it is there")


def test_an_entry_comes_back_whole(tmp_path):
    cache = TokenCache(tmp_path)
    made = cache.get(KEY, make)
    found = cache.get(KEY, never)
    assert found.digest == made.digest
    assert (found.cut, found.dropped, found.unended, found.longest) == (("a",), ("b", "c"), ("d",), 9)


def test_a_set_without_rows_comes_back(tmp_path):
    cache = TokenCache(tmp_path)
    cache.get(KEY, lambda: EncodedSet.of([], dropped=("a",)))
    assert cache.get(KEY, never).dropped == ("a",)


def flipped(content):
    middle = content.index(np.array([1, 2], np.int32).tobytes())
    return content[:middle] + b"\x07" + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:-20], lambda content: b"no arrow" * 100, flipped],
    ids=["empty", "truncated", "something else", "one byte"],
)
def test_a_damaged_entry_is_made_anew(tmp_path, damage, caplog):
    cache = TokenCache(tmp_path)
    cache.get(KEY, make)
    cache.path(KEY).write_bytes(damage(cache.path(KEY).read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY, make).digest == make().digest
    assert "rebuilding cached tokens" in caplog.text
    assert cache.get(KEY, never).digest == make().digest


def test_an_entry_of_another_key_is_not_taken(tmp_path):
    (tmp_path / "entry").write_bytes(to_bytes(make(), "1" * 64))
    with pytest.raises(CorruptEntryError, match="for the key 1111"):
        read(tmp_path / "entry", KEY)


def test_the_key_covers_rows_renderer_and_length(tmp_path):
    cache, renderer, plain = TokenCache(tmp_path), make_renderer(), make_renderer("plain")
    rows = [ask(renderer, "a", "one")]
    keys = [
        cache.key(rows, renderer, 64),
        cache.key(rows, renderer, 65),
        cache.key(rows, renderer, None),
        cache.key(rows, plain, 64),
        cache.key([ask(renderer, "a", "two")], renderer, 64),
        cache.key([ask(renderer, "a", "one", "other id")], renderer, 64),
        cache.key(rows * 2, renderer, 64),
    ]
    assert len(set(keys)) == len(keys)
    assert cache.key([ask(renderer, "a", "one")], make_renderer(), 64) == keys[0]


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="free some space"):
        TokenCache(tmp_path / "tokens").get(KEY, make)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] in ([], [".lock"])


def test_a_failure_to_make_an_entry_stores_nothing(tmp_path):
    cache = TokenCache(tmp_path)
    with pytest.raises(AssertionError):
        cache.get(KEY, never)
    assert not cache.path(KEY).exists()
    assert cache.get(KEY, make).digest == make().digest


def test_one_of_several_makes_an_entry_and_the_others_wait(tmp_path):
    made, found = [], []

    def slowly():
        made.append(1)
        threading.Event().wait(0.2)
        return make()

    threads = [
        threading.Thread(target=lambda: found.append(TokenCache(tmp_path).get(KEY, slowly).digest)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == [make().digest] * 4
