from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.preflight import RowDigests, row_key
from rankwise.data.rows import Example
from rankwise.exceptions import AssetError


def example(prompt, *before):
    turns = [*before, ("user", prompt), ("assistant", "42")]
    return Example(
        id="0",
        messages=tuple({"role": role, "content": content} for role, content in turns),
        prompt="<" + prompt + ">",
        completion="42",
    )


@given(st.lists(st.text(max_size=8), max_size=20), st.text(max_size=8))
def test_exactly_the_digested_keys_are_found_again_in_the_file(keys, other):
    made = RowDigests.of(keys, name="arm")
    read = RowDigests.from_bytes(made.to_bytes(), "here")
    assert read == made
    assert read.rows == len(keys)
    assert all(key in read for key in keys)
    assert (other in read) == (other in keys)


def test_the_same_arm_writes_the_same_bytes_and_two_arms_share_no_digest():
    keys = [f"prompt {n}" for n in range(50)]
    one, other = RowDigests.of(keys, name="a"), RowDigests.of(keys, name="b")
    assert one.to_bytes() == RowDigests.of(keys[::-1], name="a").to_bytes()
    assert not one.digests & other.digests


def test_no_prompt_can_be_read_and_a_row_costs_16_bytes():
    content = RowDigests.of(["a secret prompt"] * 3 + [f"{n}" for n in range(999)], name="a").to_bytes()
    header, _, body = content.partition(b"\n")
    assert b"secret" not in content
    assert len(body) == 16 * 1000
    assert json.loads(header)["rows"] == 1002


def test_the_key_of_a_row_is_its_prompt_without_template_answer_and_the_definition_s_system_message():
    plain = row_key(example("How much?"), None)
    assert row_key(example(" How   much? "), None) == plain
    assert row_key(example("How much?", ("system", "Be brief.")), "Be brief.") == plain
    # A row's own system message is a part of its prompt.
    assert row_key(example("How much?", ("system", "Be brief.")), "Be kind.") != plain
    assert row_key(example("How many?"), None) != plain


def test_a_file_that_is_not_whole_is_refused():
    content = RowDigests.of(["a", "b"], name="x", init_from="models:/m/1").to_bytes()
    assert RowDigests.from_bytes(content, "f").init_from == "models:/m/1"
    for bad, says in (
        (content[:-1], "f has 31 bytes of digests, expected 32: the file is truncated"),
        (b"\x00\x01", "f is not a file of row digests"),
        (content.replace(b'"format": 1', b'"format": 2'), "f has format 2; this release reads up to 1"),
    ):
        with pytest.raises(AssetError, match=says):
            RowDigests.from_bytes(bad, "f")
