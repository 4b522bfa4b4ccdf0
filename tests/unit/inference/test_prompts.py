from __future__ import annotations

import pytest

from rankwise.exceptions import DatasetError
from rankwise.inference.predictor import PromptReader

USER = {"role": "user", "content": "hello"}


def test_a_text_is_the_user_s_turn_after_the_system_prompt():
    reader = PromptReader.parse(None)
    assert reader.chat({"prompt": "hello"}, None) == [USER]
    assert reader.chat({"prompt": "hello"}, "be brief") == [{"role": "system", "content": "be brief"}, USER]


def test_a_chat_comes_as_it_is_or_as_json():
    reader = PromptReader.parse(None)
    assert reader.chat({"messages": [USER], "prompt": None}, "be brief") == [USER]
    assert reader.chat({"messages": '[{"role": "user", "content": "hello"}]'}, None) == [USER]


def test_a_template_is_filled_from_the_columns():
    reader = PromptReader.parse("carat {carat:.2f}, {cut}")
    assert reader.chat({"carat": 0.5, "cut": "Ideal"}, None) == [{"role": "user", "content": "carat 0.50, Ideal"}]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"text": "x"},
            "the row has neither a column 'prompt' nor 'messages', and --prompt is not set; its columns: text",
        ),
        ({"prompt": 3}, "prompt must be a string, got int 3"),
        ({"prompt": None}, "prompt must be a string, got NoneType None"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"messages": []}, "messages: the chat is empty"),
        ({"messages": [{"role": "user"}]}, "messages, message 0: content must be a text, got only role"),
        ({"messages": "no"}, "messages: the text is not JSON"),
    ],
)
def test_what_is_no_prompt_is_told(columns, told):
    with pytest.raises(DatasetError) as caught:
        PromptReader.parse(None).chat(columns, None)
    assert str(caught.value).startswith(told)


def test_a_template_that_does_not_fit_is_told():
    with pytest.raises(DatasetError, match=r"--prompt: field \{\} has no column name"):
        PromptReader.parse("{}")
    with pytest.raises(DatasetError, match=r"--prompt.*karat.*carat"):
        PromptReader.parse("{karat}").chat({"carat": 1}, None)
    with pytest.raises(DatasetError, match="does not fit"):
        PromptReader.parse("{carat:.2f}").chat({"carat": "big"}, None)
