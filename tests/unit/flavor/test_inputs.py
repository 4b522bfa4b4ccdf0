"""Every form of the table, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from rankwise.data.formats import RowMapping
from rankwise.data.prompting import Reading, RowPrompts
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import DatasetSpec
from rankwise.flavor.inputs import read_input

A = [{"role": "user", "content": "a"}]
B = [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]


def asked(data, *arguments):
    return [list(chat.messages) for chat in read_input(data, *arguments)]


def text(value):
    return [{"role": "user", "content": value}]


@pytest.mark.parametrize(
    ("data", "chats"),
    [
        ("a", [A]),
        (["a", "b"], [A, text("b")]),
        (("a",), [A]),
        ([], []),
        (A[0], [A]),
        (A, [A]),
        (B, [B]),
        ([A, B], [A, B]),
        ([{"messages": A}, {"messages": B}], [A, B]),
        ([{"prompt": "a"}, "b"], [A, text("b")]),
        ({"messages": B}, [B]),
        ({"messages": [A, B]}, [A, B]),
        ({"prompt": "a"}, [A]),
        ({"prompt": ["a", "b"]}, [A, text("b")]),
        ({"prompt": np.array(["a", "b"])}, [A, text("b")]),
        (np.array("a"), [A]),
        (np.array(["a", "b"]), [A, text("b")]),
        (np.array([["a"], ["b"]], dtype=object), [A, text("b")]),
        (np.array(A, dtype=object), [A]),
        (np.array([B, B], dtype=object), [B, B]),
        (np.array([A, A], dtype=object), [A, A]),
        ({"messages": np.array([A, A], dtype=object)}, [A, A]),
        ([{"role": np.array("user"), "content": np.array("a")}], [A]),
        ([{"messages": np.array(B, dtype=object)}, {"messages": np.array(A, dtype=object)}], [B, A]),
        (pd.Series(["a", "b"]), [A, text("b")]),
        (pd.DataFrame({"prompt": ["a", "b"], "price": [1, 2]}), [A, text("b")]),
        (pd.DataFrame({"messages": [A, B]}), [A, B]),
        (pd.DataFrame({"anything": ["a", "b"]}), [A, text("b")]),
        (pd.DataFrame({0: ["a"]}), [A]),
        (pd.DataFrame(B), [B]),
    ],
)
def test_every_form_becomes_conversations(data, chats):
    assert asked(data) == chats


def test_a_recorded_system_prompt_comes_before_texts_and_not_into_chats():
    # As releases up to 0.2 did.
    assert asked(["a", A], "be brief") == [[{"role": "system", "content": "be brief"}, A[0]], A]


def test_a_recorded_system_prompt_comes_before_texts_and_chats_as_in_training():
    brief = {"role": "system", "content": "be brief"}
    assert asked(["a", A, B], "be brief", Reading()) == [[brief, A[0]], [brief, A[0]], B]


CALLED = [*A, {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}]
TOOLS = [{"name": "f"}]


@pytest.mark.parametrize(
    "data",
    [
        {"messages": [*CALLED, {"role": "tool", "content": "1"}], "tools": TOOLS},
        [{"messages": [*CALLED, {"role": "tool", "content": "1"}], "tools": TOOLS}],
        pd.DataFrame({"messages": [[*CALLED, {"role": "tool", "content": "1"}]], "tools": [TOOLS]}),
    ],
)
def test_calls_and_tools_reach_the_conversation(data):
    (chat,) = read_input(data, None, Reading())
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert chat.tools == ({"type": "function", "function": {"name": "f"}},)


def test_an_answer_that_ends_a_chat_is_asked_for():
    assert asked([[*A, {"role": "assistant", "content": "b"}]], None, Reading()) == [A]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (7, "got int"),
        (None, "got NoneType"),
        (["a", 7], "row 1: must be a text or a chat, got int"),
        (["a", float("nan")], "row 1: must be a text or a chat, got float"),
        (["a", ""], "row 1: the text is empty"),
        (["a", []], "row 1: must be a text or a chat, got an empty list"),
        (
            [[{"role": "user"}]],
            r"row 0: message 0 must have 'role' and 'content', both texts; got a dict with the keys",
        ),
        ([[*A, "b"]], "row 0: message 1 must have 'role' and 'content', both texts; got str"),
        ({"text": "a"}, "must have the key 'messages' or 'prompt' and no other; got text"),
        ({"prompt": "a", "temperature": 1}, "parameters such as max_new_tokens go into params"),
        ([{"messages": [A, B]}], "row 0: a dict inside a list must hold one text or one chat"),
        (np.zeros((2, 3)), r"one dimension, or one column; got the shape \(2, 3\)"),
        (
            pd.DataFrame({"a": ["x"], "b": ["y"]}),
            "needs a column 'messages' or 'prompt', or a single column; it has a, b",
        ),
    ],
)
def test_anything_else_is_refused_with_the_row_and_what_it_is(data, message):
    with pytest.raises(ConfigError, match=message):
        read_input(data)


CHAT = [*A, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
FORMATS = {
    "templates": ({"prompt": "{x} is", "completion": "{y}"}, {"x": "01", "y": "b", "id": "7"}),
    "optional": ({"prompt": "{x}[[ ({z})]]", "completion": "{y}"}, {"x": "01", "y": "b", "z": ""}),
    "conversational": ({}, {"prompt": A, "completion": CHAT[1:]}),
    "messages": ({"system": "be brief"}, {"messages": CHAT, "tools": TOOLS}),
    "named": ({"messages": "talk", "tools": "functions"}, {"talk": CHAT, "functions": TOOLS, "id": "7"}),
    "called": ({}, {"messages": [*CALLED, {"role": "tool", "content": "1"}, CHAT[1]], "tools": TOOLS}),
    "sharegpt": ({}, {"conversations": SHAREGPT, "system": "be brief"}),
    "alpaca": ({}, {"instruction": "a", "input": "c", "output": "b"}),
    "alpaca without input": ({}, {"instruction": "a", "input": "", "output": "b", "system": "be brief"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_of_every_format_is_asked_as_it_was_trained(name):
    section, row = FORMATS[name]
    dataset = DatasetSpec.model_validate({"train": "x", **section})
    mapping = RowMapping.of(dataset, list(row), "train", [row])
    trained = mapping.with_system(mapping.convert(row, "0").chat)
    reading = Reading.from_section(Reading.of(dataset, mapping).to_section())
    expected = trained.messages[: trained.answers[-1]]
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
    forms = [[row], pd.DataFrame([row]), np.array([row], dtype=object)]
    if name != "conversational":
        forms.append([texts])
    for form in forms:
        (chat,) = read_input(form, dataset.system, reading)
        assert (chat.messages, chat.tools) == (expected, trained.tools), form
    prompts = RowPrompts(reading=reading, system=dataset.system)
    without = {key: value for key, value in row.items() if key not in {"y", "completion", "output"}}
    assert prompts.chat(without) == prompts.chat(row)
    assert prompts.chat(row).messages == expected
