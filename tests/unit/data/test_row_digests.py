from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.row_digests import RowDigests
from rankwise.data.rows import Example, row_keys
from rankwise.exceptions import AssetError


def of(keys, **options):
    return RowDigests.of([[key] for key in keys], **options)


def row_key(example, *systems):
    (key,) = row_keys(example, systems)
    return key


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
    made = of(keys, name="arm")
    read = RowDigests.from_bytes(made.to_bytes(), "here")
    assert read == made
    assert read.rows == len(keys)
    assert all(key in read for key in keys)
    assert (other in read) == (other in keys)


def test_the_same_arm_writes_the_same_bytes_and_two_arms_share_no_digest():
    keys = [f"prompt {n}" for n in range(50)]
    one, other = of(keys, name="a"), of(keys, name="b")
    assert one.to_bytes() == of(keys[::-1], name="a").to_bytes()
    assert not one.digests & other.digests


def test_no_prompt_can_be_read_and_a_row_costs_16_bytes():
    content = of(["a secret prompt"] * 3 + [f"{n}" for n in range(999)], name="a").to_bytes()
    header, _, body = content.partition(b"\n")
    assert b"secret" not in content
    assert len(body) == 16 * 1000
    assert json.loads(header)["rows"] == 1002


def test_the_key_of_a_row_is_its_prompt_without_template_answer_and_the_definition_s_system_message():
    plain = row_key(example("How much?"))
    assert row_key(example(" How   much? ")) == plain
    assert row_key(example("How much?", ("system", "Be brief.")), "Be brief.") == plain
    # A row's own system message is a part of its prompt.
    assert row_key(example("How much?", ("system", "Be brief.")), "Be kind.") != plain
    assert row_key(example("How many?")) != plain


def test_a_conversation_has_a_key_for_each_answer_that_is_learned():
    row = example("And now?", ("system", "Be brief."), ("user", "How much?"), ("assistant", "7"))
    first, last = row_keys(row, ["Be brief."])
    assert first == row_key(example("How much?"))
    assert row_keys(row, ["Be brief."], "last_answer") == [last]
    digests = RowDigests.of([[first, last]], name="a")
    assert (digests.rows, len(digests.digests)) == (1, 2)
    assert first in digests


def test_a_file_of_format_1_is_read():
    content = of(["a", "b"], name="x").to_bytes().replace(b'"format": 2', b'"format": 1')
    read = RowDigests.from_bytes(content, "f")
    assert "a" in read
    assert "c" not in read


def test_a_file_that_is_not_whole_is_refused():
    content = of(["a", "b"], name="x", init_from="models:/m/1").to_bytes()
    assert RowDigests.from_bytes(content, "f").init_from == "models:/m/1"
    for bad, says in (
        (content[:-1], "f has 31 bytes of digests, expected 32: the file is truncated"),
        (b"\x00\x01", "f is not a file of row digests"),
        (content.replace(b'"format": 2', b'"format": 3'), "f has format 3; this release reads up to 2"),
    ):
        with pytest.raises(AssetError, match=says):
            RowDigests.from_bytes(bad, "f")
