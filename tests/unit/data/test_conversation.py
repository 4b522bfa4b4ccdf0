import json

import pytest
from helpers.data_rows import chat, definition

from rankwise.data.rows import RowMapping, answer_turns, parse_messages, prompt_key
from rankwise.exceptions import DatasetError

USER, ANSWER = ("user", "How much?"), ("assistant", "$326")
CHATS = {"messages": "chat", "prompt": None, "completion": None}


def mapping(**changes):
    return RowMapping.of(definition(**changes), ["chat", "carat", "cut", "price"], "train")


def convert(cell):
    return mapping(**CHATS).convert({"chat": cell}, "4")


def test_templates_make_a_question_and_an_answer():
    row = {"carat": 0.23, "cut": "Ideal", "price": 326}
    expected = chat(("user", "carat 0.23, cut Ideal"), ("assistant", "Price is $326"))
    assert mapping().convert(row, "0").messages == expected


def test_a_row_with_an_empty_cell_that_is_used_is_left_out():
    assert mapping().convert({"carat": None, "cut": "Ideal", "price": 326}, "0").left_out == "empty cell"
    assert mapping().convert({"carat": 1, "cut": "Ideal", "price": float("nan")}, "0").left_out == "empty cell"


def test_messages_are_lists_or_json_texts():
    cell = [dict(message) for message in chat(USER, ANSWER)]
    assert convert(cell).messages == convert(json.dumps(cell)).messages == chat(USER, ANSWER)


def test_turns_after_the_last_answer_are_cut_off_and_told():
    conversion = convert([dict(message) for message in chat(USER, ANSWER, ("user", "Thanks"))])
    assert conversion.messages == chat(USER, ANSWER)
    assert conversion.unanswered_tail


@pytest.mark.parametrize(("cell", "reason"), [(None, "empty cell"), ([], "no assistant turn")])
def test_chats_without_content_or_answer_are_left_out(cell, reason):
    assert convert(cell).left_out == reason


def test_keys_that_nothing_uses_are_told_unless_empty():
    cell = [{"role": "user", "content": "x", "name": "Ann"}, {"role": "assistant", "content": "y", "tool_calls": None}]
    assert convert(cell).unused_keys == {"name"}


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[{", "dataset.messages: row 4, column 'chat': the text is not JSON"),
        ({"role": "user"}, "expected a list of {role, content}, got dict"),
        (["hi"], "message 0: expected {role, content}, got str 'hi'"),
        (
            [{"from": "human", "value": "x"}],
            "message 0: role must be a text, got only from, value; rename from and value to role and content",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "message 0: content must be a text, got list [{'type': 'text'}]",
        ),
        ([{"role": "assistant", "content": None}], "message 0: content must be a text, got NoneType None"),
    ],
)
def test_cells_that_are_no_messages_are_refused_with_their_place(cell, message):
    with pytest.raises(DatasetError) as raised:
        convert(cell)
    assert message in str(raised.value)


def test_a_system_message_of_the_definition_goes_first_unless_the_row_has_one():
    assert mapping(system="Be brief.").with_system(chat(USER)) == chat(("system", "Be brief."), USER)
    assert mapping(system="").with_system(chat(USER)) == chat(("system", ""), USER)
    assert mapping().with_system(chat(USER)) == chat(USER)
    own = chat(("system", "Own."), USER)
    assert mapping(system="Be brief.").with_system(own) == own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (CHATS | {"messages": "chats"}, "dataset.messages: unknown column 'chats'; did you mean 'chat'?"),
        ({"prompt": "{carrat}"}, "dataset.prompt: unknown column 'carrat'; did you mean 'carat'?"),
        ({"completion": "{cost}"}, "dataset.completion: unknown column 'cost'"),
    ],
)
def test_columns_that_are_not_there_are_refused_by_key(changes, message):
    with pytest.raises(DatasetError) as raised:
        mapping(**changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion": None}, "rows need messages .* or both prompt and completion"),
        ({"messages": "chat"}, "give either messages, or prompt and completion, not both"),
    ],
)
def test_rows_have_one_form(changes, message):
    dataset = definition().model_copy(update=changes)  # the schema refuses these in a file already
    with pytest.raises(DatasetError, match=message):
        RowMapping.of(dataset, ["chat", "carat", "cut", "price"], "train")


def test_a_greeting_before_anyone_spoke_is_no_answer():
    assert answer_turns(chat(("assistant", "Hello"), USER, ANSWER, USER, ANSWER)) == (2, 4)
    assert answer_turns(chat(("system", "Tell a story."), ANSWER)) == (1,)
    assert answer_turns(chat(("assistant", "Hello"))) == ()


def test_equal_prompts_have_equal_keys_whatever_the_answer():
    key = prompt_key(chat(USER, ANSWER))
    assert prompt_key(chat(USER, ("assistant", "other"))) == key
    assert prompt_key(chat(("user", " How  much?\n"), ANSWER)) == key
    assert prompt_key(chat(("user", "How much"), ANSWER)) != key
    assert prompt_key(chat(USER, ANSWER, USER, ANSWER)) != key


def test_parsed_messages_keep_only_role_and_content():
    messages, unused = parse_messages([{"role": "user", "content": "x", "weight": 1}], "here")
    assert messages == ({"role": "user", "content": "x"},)
    assert unused == {"weight"}
