import json

import pytest
from helpers.data_rows import chat, make_renderer, table

from rankwise.data.formats import RowMapping, recognize
from rankwise.data.rows import build_examples
from rankwise.data.training_table import TypedTable
from rankwise.exceptions import DatasetError
from rankwise.experiment.schema import DatasetSpec

RENDERER = make_renderer()
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def spec(**keys):
    return DatasetSpec.model_validate({"train": "x", **keys})


def build(*rows, **keys):
    return build_examples(spec(**keys), [table(list(rows))], None, RENDERER)


def one(*rows, **keys):
    (example,) = build(*rows, **keys).train
    return example


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"messages": [USER, ANSWER]}, {}, "messages"),
        ({"chat": [USER, ANSWER]}, {"messages": "chat"}, "messages"),
        ({"conversations": SHAREGPT, "id": "1"}, {}, "sharegpt"),
        ({"conversations": json.dumps(SHAREGPT)}, {}, "sharegpt"),
        ({"conversations": [USER, ANSWER]}, {}, "messages"),
        ({"prompt": "q", "completion": "a"}, {}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, {}, "prompt_completion"),
        ({"question": "q", "answer": "a"}, {"prompt": "{question}", "completion": "{answer}"}, "prompt_completion"),
        ({"instruction": "q", "input": "", "output": "a"}, {}, "alpaca"),
        ({"instruction": "q", "output": "a"}, {}, "alpaca"),
    ],
)
def test_a_format_is_recognized_and_read(row, keys, expected):
    assert recognize(spec(**keys), list(row), [row]) == expected
    example = one(row, **keys)
    assert example.messages == chat(("user", "q"), ("assistant", "a"))
    assert (example.prompt, example.completion) == (RENDERER.texts([[USER]], add_generation_prompt=True)[0], "a")


def test_columns_of_no_format_are_refused_with_what_there_is():
    with pytest.raises(DatasetError) as raised:
        build({"label": 1, "text": "x"})
    assert "the columns (label, text) are those of no known format" in str(raised.value)
    assert "instruction, input and output (Alpaca)" in str(raised.value)


def test_a_format_can_be_set_and_refuses_the_keys_of_others():
    assert one({"text": "a document", "url": "x"}, format="text").completion == "a document"
    assert one({"title": "t", "body": "b"}, format="text", completion="{title}: {body}").completion == "t: b"
    with pytest.raises(DatasetError, match=r"dataset.prompt: cannot be combined with format: text"):
        build({"text": "x"}, format="text", prompt="{text}", completion="{text}")
    with pytest.raises(DatasetError, match=r"dataset.messages: unknown column 'messages'"):
        build({"prompt": "q"}, format="messages")
    with pytest.raises(DatasetError, match=r"dataset.prompt: unknown column 'instruction'"):
        build({"messages": [USER, ANSWER]}, format="alpaca")


def test_alpaca_has_no_blank_lines_for_an_empty_input():
    rows = [{"instruction": "Add.", "input": text, "output": "3"} for text in ("1 and 2", "", None)]
    prompts = [example.messages[0]["content"] for example in build(*rows).train]
    assert prompts == ["Add.\n\n1 and 2", "Add.", "Add."]


def test_conversational_prompts_and_completions_are_messages_and_only_the_completion_is_learned():
    before = [{"role": "system", "content": "s"}, USER, ANSWER, {"role": "user", "content": "q2"}]
    after = [{"role": "assistant", "content": "a2"}]
    for keys in ({}, {"prompt": "{prompt}", "completion": "{completion}"}):
        example = one({"prompt": before, "completion": after}, **keys)
        assert example.messages == (*before, *after)
        assert example.chat.answers == (4,)
        assert example.completion == "a2"
    mixed = one({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, system="Be brief.")
    assert mixed.messages[0] == {"role": "system", "content": "Be brief."}
    assert mixed.chat.answers == (2, 4)


def test_lists_in_a_text_are_refused():
    with pytest.raises(DatasetError, match="column 'prompt' holds a list, of which a template makes no text"):
        build({"prompt": [USER], "completion": "a"}, prompt="Q: {prompt}", completion="{completion}")


def test_a_completion_without_an_answer_is_left_out_and_counted():
    examples = build({"prompt": [USER], "completion": [ANSWER]}, {"prompt": [USER], "completion": [USER]})
    assert len(examples.train) == 1
    assert examples.dropped == {"train: no assistant turn in the completion (roles: user)": 1}


def test_sharegpt_has_its_own_roles_systems_and_tools():
    row = {
        "conversations": json.dumps(
            [
                *SHAREGPT[:1],
                {"from": "function_call", "value": '{"name": "find", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "7"},
                *SHAREGPT[1:],
            ]
        ),
        "system": "Be brief.",
        "tools": json.dumps([TOOL]),
    }
    example = RowMapping.of(spec(), list(row), "train", [row]).convert(row, "0").chat
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2]["tool_calls"][0]["function"] == {"name": "find", "arguments": {"x": 1}}
    assert example.tools == (TOOL,)
    assert example.answers == (2, 4)


def test_unknown_roles_are_refused_in_one_message_that_names_keys_and_roles():
    rows = [{"conversations": SHAREGPT}] * 3
    rows += [{"conversations": [{"from": role, "value": "x"}, *SHAREGPT]} for role in ("critic", "judge", "critic")]
    with pytest.raises(DatasetError) as raised:
        build(*rows)
    message = str(raised.value)
    assert "messages in the column 'conversations' have the keys from, value and roles that are not known" in message
    assert "'critic' (2 rows), 'judge' (1 rows), the first in row 3" in message
    assert "human, gpt" in message


def test_rows_of_two_spellings_are_all_read():
    rows = [{"messages": json.dumps(cell)} for cell in (SHAREGPT, [USER, ANSWER], [*SHAREGPT[:1], ANSWER])]
    assert [example.messages for example in build(*rows).train] == [(USER, ANSWER)] * 3


def test_tools_of_a_column_reach_the_template_and_the_prompt():
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    renderer = make_renderer(template)
    row = {"messages": [USER, ANSWER], "functions": json.dumps([TOOL])}
    for keys in ({"tools": "functions"}, {}):
        name = "functions" if keys else "tools"
        rows = table([{"messages": row["messages"], name: row["functions"]}])
        (example,) = build_examples(spec(**keys), [rows], None, renderer).train
        assert example.tools == (TOOL,)
        assert '"find"' in example.prompt
    with pytest.raises(DatasetError, match=r"dataset.tools: unknown column 'function'; did you mean 'functions'"):
        build(row, tools="function")


def test_keys_that_a_typed_table_fills_in_are_no_arguments():
    def called(**arguments):
        return {"role": "assistant", "content": None, "tool_calls": [{"name": "find", "arguments": arguments}]}

    plain = table([{"messages": [USER, called(x="1")]}, {"messages": [USER, called(y="2")]}])
    rows = TypedTable(plain)
    mapping = RowMapping.of(spec(), rows.column_names, "train")
    chats = [mapping.convert({"messages": cell}, "0").chat for cell in rows["messages"]]
    arguments = [chat.messages[1]["tool_calls"][0]["function"]["arguments"] for chat in chats]
    assert arguments == [{"x": "1"}, {"y": "2"}]
    cells = plain.to_pandas()["messages"]
    assert [mapping.convert({"messages": cell}, "0").chat for cell in cells] == chats


def test_a_question_is_what_the_last_answer_answers():
    def ask(row, **keys):
        return RowMapping.of(spec(**keys), list(row), "train", [row]).question(row, "0")

    assert ask({"messages": [USER, ANSWER]}).messages == (USER,)
    assert ask({"messages": [USER]}, system="s").messages == ({"role": "system", "content": "s"}, USER)
    assert ask({"prompt": "q", "completion": "a"}).messages == (USER,)
    assert ask({"prompt": [USER], "completion": [ANSWER]}).messages == (USER,)
    with pytest.raises(DatasetError, match="column 'messages' has no value, and the prompt needs it"):
        ask({"messages": None})
    mapping = RowMapping.of(spec(), ["instruction", "input", "output"], "train")
    assert mapping.question({"instruction": "q", "input": ""}, "0").messages == (USER,)


def test_conversations_with_an_answer_in_common_fall_on_one_side():
    def talk(first, second):
        turns = [first, "a", second, "b"]
        roles = ["user", "assistant"] * 2
        return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]}

    rows = [talk(f"opening {row // 3}", f"question {row}") for row in range(30)]
    split = {"split_from": "train", "rows": 3}
    examples = build(*rows, eval=split)
    openings = [{row.messages[0]["content"] for row in side} for side in (examples.train, examples.eval)]
    assert len(examples.eval) == 3
    assert openings[0].isdisjoint(openings[1])
    # With the last answer alone, only what comes before that one counts.
    last = build(*rows, eval=split, supervise="last_answer")
    openings = [{row.messages[0]["content"] for row in side} for side in (last.train, last.eval)]
    assert openings[0] & openings[1]
    assert len(last.train) == 27


def test_the_first_rendering_reads_roles_and_contents_only():
    row = {"messages": [{**USER, "name": "Ann"}, {**ANSWER, "reasoning_content": "r"}], "tools": json.dumps([TOOL])}
    mapping = RowMapping.of(spec(rendering=1, messages="messages"), list(row), "train")
    conversion = mapping.convert(row, "0")
    assert conversion.chat.messages == (USER, ANSWER)
    assert conversion.chat.tools is None
    assert conversion.unused_keys == {"name", "reasoning_content"}
