import json

import pytest
from helpers.data_rows import chat, definition

from rankwise.data.chat import Chat, answer_turns, parse_messages, parse_tools, prompt_key, text_of
from rankwise.data.formats import RowMapping
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
    assert mapping().convert(row, "0").chat.messages == expected


def test_a_row_with_an_empty_cell_that_is_used_is_left_out():
    assert mapping().convert({"carat": None, "cut": "Ideal", "price": 326}, "0").left_out == "empty cell"
    assert mapping().convert({"carat": 1, "cut": "Ideal", "price": float("nan")}, "0").left_out == "empty cell"


def test_messages_are_lists_or_json_texts():
    cell = [dict(message) for message in chat(USER, ANSWER)]
    assert convert(cell).chat.messages == convert(json.dumps(cell)).chat.messages == chat(USER, ANSWER)


def test_turns_after_the_last_answer_are_cut_off_and_told():
    conversion = convert([dict(message) for message in chat(USER, ANSWER, ("user", "Thanks"))])
    assert conversion.chat.messages == chat(USER, ANSWER)
    assert conversion.unanswered_tail


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "empty cell"),
        ([], "no assistant turn to a question (roles: none)"),
        ([{"role": "critic", "content": "x"}], "no assistant turn to a question (roles: critic)"),
    ],
)
def test_chats_without_content_or_answer_are_left_out(cell, reason):
    assert convert(cell).left_out == reason


def test_keys_beyond_role_and_content_are_told_by_the_first_rendering_and_used_by_the_second():
    cell = [{"role": "user", "content": "x", "name": "Ann"}, {"role": "assistant", "content": "y", "tool_calls": None}]
    assert mapping(**CHATS, rendering=1).convert({"chat": cell}, "4").unused_keys == {"name"}
    conversion = convert(cell)
    assert conversion.unused_keys == set()
    assert conversion.chat.messages == (cell[0], {"role": "assistant", "content": "y"})


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[{", "dataset.messages: row 4, column 'chat': the text is not JSON"),
        ({"role": "user"}, "expected a list of {role, content}, got dict"),
        (["hi"], "message 0: expected {role, content}, got str 'hi'"),
        ([{"content": "x"}], "message 0: role must be a text, got only content"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "message 0: content has a part of the type 'image'; allowed are text parts",
        ),
        (
            [{"role": "assistant", "content": None}],
            "message 0: content must be a text, got null, and there are no tool_calls (its keys: role, content)",
        ),
        ([{"role": "user", "content": 3}], "message 0: content must be a text, got int 3"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "message 0, tool call 0, arguments: the text is not JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"arguments": {}}]}],
            "message 0, tool call 0: expected {type: function, function: {name, arguments}}, got {'arguments': {}}",
        ),
        ([{"from": "critic", "value": "x"}], "message 0: unknown role 'critic'"),
    ],
)
def test_cells_that_are_no_messages_are_refused_with_their_place(cell, message):
    with pytest.raises(DatasetError) as raised:
        convert(cell)
    assert message in str(raised.value)


def test_a_system_message_of_the_definition_goes_first_unless_the_row_has_one():
    question, own = Chat(messages=chat(USER), context=1), Chat(messages=chat(("system", "Own."), USER))
    brief = mapping(system="Be brief.").with_system(question)
    assert (brief.messages, brief.context) == (chat(("system", "Be brief."), USER), 2)
    assert mapping(system="").with_system(question).messages == chat(("system", ""), USER)
    assert mapping().with_system(question) == question
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
        ({"completion": None}, "give both prompt and completion"),
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


CALL = {"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "find", "arguments": '{"x": 1}'}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL]), "reasoning_content": None},
        {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"x": 1}}'},
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "find", "parameters": {"x": 1}}}],
        },
    ],
)
def test_calls_have_one_form(message):
    assert parse_messages([message], "here") == ({"role": "assistant", "content": None, "tool_calls": [CALL]},)


def test_the_spellings_of_a_conversation_have_one_form():
    rows = [
        {"from": "human", "value": "x"},
        {"from": "gpt", "value": "y", "weight": 1},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}, "b"], "thinking": "z"},
        {"from": "observation", "value": "w"},
    ]
    user, assistant, parts, tool = parse_messages(rows, "here")
    assert user == {"role": "user", "content": "x"}
    assert assistant == {"role": "assistant", "content": "y", "weight": 1}
    assert parts["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (text_of(parts), parts["reasoning_content"]) == ("a\nb", "z")
    assert tool["role"] == "tool"


def test_tools_are_lists_or_json_texts_and_have_one_form():
    function = {"name": "find", "parameters": {"type": "object"}}
    tool = {"type": "function", "function": function}
    assert parse_tools([tool], "here") == parse_tools(json.dumps([function]), "here") == (tool,)
    assert parse_tools([], "here") is None
    with pytest.raises(DatasetError, match=r"here, tool 0: expected \{type: function"):
        parse_tools([{"description": "x"}], "here")


def test_the_key_of_a_prompt_has_the_calls_and_tools_before_the_answer():
    called = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    asked = parse_messages([*called, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "y"}], "here")
    other = json.loads(json.dumps(asked).replace("find", "seek"))
    assert prompt_key(asked) == prompt_key(parse_messages(json.dumps(asked), "here"))
    assert len({prompt_key(asked), prompt_key(other), prompt_key(asked, ({"function": {"name": "find"}},))}) == 3
