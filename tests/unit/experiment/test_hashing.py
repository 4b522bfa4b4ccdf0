from __future__ import annotations

import hashlib

import pytest

from rankwise.experiment.hashing import digest, plain


def test_the_digest_is_sha256_over_canonical_json():
    expected = hashlib.sha256('{"a":[1,0.002],"b":"é"}'.encode()).hexdigest()
    assert digest({"b": "é", "a": (1.0, 2e-3)}) == expected


def test_spelling_and_order_do_not_count():
    assert digest({"a": 16, "b": 1}) == digest({"b": 1.0, "a": 16.0})


def test_different_types_stay_different():
    assert len({digest(1), digest("1"), digest(True), digest(None), digest([1]), digest(1.5)}) == 6


def test_what_is_not_json_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


def test_plain_keeps_large_floats_and_true_as_they_are():
    assert plain({"x": (1e300, True)}) == {"x": [1e300, True]}
    assert isinstance(plain(1e300), float)
    assert plain(True) is True
