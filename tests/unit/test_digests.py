import pytest

from rankwise.digests import canonical_json, content_digest


def test_canonical_json_has_one_spelling_that_never_changes():
    value = {"b": [1, 2.5, None, True], "a": {"é": "\u2028", "Z": float("inf")}}
    assert canonical_json(value) == '{"a":{"Z":Infinity,"é":"\u2028"},"b":[1,2.5,null,true]}'.encode()
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)
    assert canonical_json("é", ascii_only=True) == b'"\\u00e9"'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value, allow_nan=False)


def test_a_digest_names_its_algorithm():
    assert content_digest(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
