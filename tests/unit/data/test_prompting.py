import pytest
from helpers.data_rows import make_renderer
from helpers.tiny import make_tokenizer

from rankwise.data.formats import RowMapping
from rankwise.data.prompting import FIRST_READING, Reading, RowPrompts
from rankwise.data.template import Renderer, RenderError
from rankwise.exceptions import DatasetError
from rankwise.experiment.schema import DatasetSpec

USER = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}


def prompts(*, template=None, system=None, **reading):
    return RowPrompts(reading=Reading(**reading), system=system, template=template)


def asked(columns, **settings):
    (turn,) = prompts(**settings).chat(columns).messages
    assert turn["role"] == "user"
    return turn["content"]


def test_a_text_is_the_user_s_turn_after_the_system_prompt():
    assert prompts().chat({"prompt": "hello"}).messages == (USER,)
    assert prompts(system="be brief").chat({"prompt": "hello"}).messages == (SYSTEM, USER)


def test_a_chat_comes_as_it_is_or_as_json():
    for column, reading in (("messages", {}), ("chat", {"messages": "chat"}), ("messages", {"messages": "chat"})):
        reader = prompts(system="be brief", **reading)
        assert reader.chat({column: [SYSTEM, USER], "prompt": None}).messages == (SYSTEM, USER)
        assert reader.chat({column: '[{"role": "user", "content": "hello"}]'}).messages == (SYSTEM, USER)


def test_a_template_is_filled_from_the_columns():
    assert asked({"carat": 0.5, "cut": "Ideal"}, template="carat {carat:.2f}, {cut}") == "carat 0.50, Ideal"
    assert asked({"carat": "0.5"}, template="carat {carat:.2f}") == "carat 0.50"


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"zip": "01067"}, "zip 01067"),
        ({"zip": "01067", "prompt": None, "messages": None}, "zip 01067"),
        ({"zip": "01067", "color": "red"}, "zip 01067"),
        ({"zip": "01067", "prompt": "asked otherwise"}, "asked otherwise"),
        ({"prompt": "hello"}, "hello"),
        ({"text": "hello"}, "hello"),
    ],
)
def test_the_template_of_training_is_used_where_a_row_has_its_columns(columns, text):
    assert asked(columns, prompt="zip {zip}") == text
    assert asked({"zip": "01067", **columns}, prompt="zip {zip}", template="<{zip}>") == "<01067>"


def test_a_template_over_the_column_prompt_is_used():
    assert asked({"prompt": "Why?"}, prompt="Q: {prompt}") == "Q: Why?"


def test_a_chat_comes_before_the_template_of_training():
    assert prompts(prompt="zip {zip}").chat({"zip": "1", "messages": [USER]}).messages == (USER,)


def test_optional_parts_may_lack_a_value_but_not_the_others():
    template = "{a}[[ in {b}]]"
    assert asked({"a": "x", "b": ""}, prompt=template) == "x"
    with pytest.raises(DatasetError, match="column 'a' has no value, and the prompt needs it"):
        asked({"a": None, "b": "y"}, prompt=template)
    with pytest.raises(DatasetError, match="column 'a' has no value"):
        asked({"a": "NA", "b": "y"}, prompt=template, na_values=("NA",))


def test_a_prompt_may_be_a_number_or_a_chat_as_in_training():
    assert asked({"prompt": 3}) == "3"
    assert prompts(system="be brief").chat({"prompt": [USER]}).messages == (SYSTEM, USER)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"question": "x"},
            "the row has neither a column 'prompt' nor 'messages', and --prompt is not set; its columns: question",
        ),
        ({"prompt": None}, "column 'prompt' has no value"),
        ({"prompt": {"a": 1}}, "column 'prompt' holds a mapping, of which a template makes no text"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"messages": []}, "messages: the chat is empty"),
        ({"messages": "no"}, "messages: the text is not JSON"),
        (["x"], "a row must be a mapping of columns, got list"),
    ],
)
def test_what_is_no_prompt_is_told(columns, told):
    with pytest.raises(DatasetError) as caught:
        prompts().chat(columns)
    assert str(caught.value).startswith(told)


def test_a_row_without_the_columns_of_the_stored_template_is_told():
    with pytest.raises(DatasetError) as caught:
        prompts(prompt="zip {zip} of {town}").chat({"zip": 1, "x": 2})
    assert str(caught.value) == (
        "the row has no column 'town' of the prompt template that the adapter was trained with "
        "('zip {zip} of {town}'), no 'prompt' and no 'messages', and --prompt is not set; its columns: zip, x"
    )


def test_a_template_that_does_not_fit_is_told():
    with pytest.raises(DatasetError, match=r"--prompt: field \{\} has no column name"):
        prompts(template="{}").check()
    with pytest.raises(DatasetError, match=r"--prompt.*karat.*carat"):
        prompts(template="{karat}").chat({"carat": 1})
    with pytest.raises(DatasetError, match="does not fit"):
        prompts(template="{carat:.2f}").chat({"carat": "big"})


def test_adapters_of_earlier_releases_are_asked_as_before():
    first = RowPrompts(reading=FIRST_READING, template="{a} {b}")
    assert first.chat({"a": True, "b": None}).messages[0]["content"] == "True None"
    with pytest.raises(DatasetError, match="prompt must be a string, got int 3"):
        RowPrompts(reading=FIRST_READING).chat({"prompt": 3})
    assert RowPrompts(reading=FIRST_READING, template="{x:.3}").chat({"x": 1.2345}).messages[0]["content"] == "1.23"


def test_what_an_adapter_keeps_of_its_definition_is_plain_data():
    dataset = DatasetSpec(
        train="rows.csv",
        prompt="zip {zip}",
        completion="{color}",
        na_values=("NA",),
        tools="functions",
        chat_template_kwargs={"enable_thinking": False},
    )
    reading = Reading.of(dataset)
    section = reading.to_section()
    assert section == {
        "rendering": 2,
        "format": "auto",
        "prompt": "zip {zip}",
        "completion": "{color}",
        "messages": None,
        "tools": "functions",
        "system_column": None,
        "na_values": ["NA"],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert Reading.from_section(section) == reading


def test_what_was_recognized_from_the_rows_is_kept():
    rows = [{"instruction": "x", "input": "", "output": "y", "system": "be brief"}]
    dataset = DatasetSpec(train="rows.jsonl")
    reading = Reading.of(dataset, RowMapping.of(dataset, list(rows[0]), "train", rows))
    assert (reading.format, reading.system_column) == ("alpaca", "system")
    chat = RowPrompts(reading=reading).chat({"instruction": "x", "system": "be brief"})
    assert chat.messages == (SYSTEM, {"role": "user", "content": "x"})


def test_a_chat_is_asked_for_its_last_answer_with_its_tools():
    reader = prompts(messages="conversations")
    answered = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    chat = reader.chat({"conversations": answered, "tools": '[{"name": "f"}]'})
    assert chat.messages == (USER,)
    assert chat.tools == ({"type": "function", "function": {"name": "f"}},)


def test_a_text_for_an_adapter_of_documents_is_the_beginning_of_a_document():
    chat = prompts(format="text").chat({"text": "Once upon"})
    assert chat.raw
    renderer = make_renderer()
    assert renderer.prompts([chat]) == ["Once upon"]
    assert renderer.prompts([prompts().chat({"text": "Once upon"})])[0].startswith("<|im_start|>user")


def test_a_base_without_a_template_is_asked_with_texts():
    bare = Renderer.create(make_tokenizer(None), required=False)
    assert bare.prompts([prompts().chat({"prompt": "Once upon"})]) == ["Once upon"]
    with pytest.raises(RenderError, match="no chat template, so its prompts must be texts"):
        bare.prompts([prompts(system="be brief").chat({"prompt": "Once upon"})])
    with pytest.raises(DatasetError, match=r"has no chat template; set dataset.chat_template"):
        bare.texts([[USER]])
