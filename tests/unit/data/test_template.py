import hashlib
import json

import pytest
from helpers.data_rows import chat
from helpers.tiny import CHATML, make_tokenizer

from rankwise.data.template import apply_template, end_token_ids, padding_id, template_text, tokenizer_digest
from rankwise.exceptions import DatasetError

CHAT = chat(("system", "Be brief."), ("user", "How much?"), ("assistant", "$326"))


def rendered(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def test_the_base_own_template_is_the_default():
    tokenizer = apply_template(make_tokenizer(), None)
    assert tokenizer.chat_template == CHATML


def test_plain_is_prompt_newline_answer_end_token():
    tokenizer = apply_template(make_tokenizer(None), "plain")
    assert rendered(tokenizer, CHAT) == "Be brief.\nHow much?\n$326<|im_end|>"
    assert rendered(tokenizer, CHAT[1:2], add_generation_prompt=True) == "How much?\n"
    assert rendered(tokenizer, chat(("system", ""), ("user", "How much?"))) == "How much?\n"


def test_chatml_is_the_usual_form():
    tokenizer = apply_template(make_tokenizer(None), "chatml")
    assert rendered(tokenizer, CHAT[1:]) == (
        "<|im_start|>user\nHow much?<|im_end|>\n<|im_start|>assistant\n$326<|im_end|>\n"
    )
    assert rendered(tokenizer, CHAT[1:2], add_generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_built_in_templates_begin_as_the_tokenizer_begins():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    assert rendered(apply_template(tokenizer, "plain"), CHAT[1:]) == "<|endoftext|>How much?\n$326<|im_end|>"


def test_the_given_tokenizer_stays_as_it_is():
    tokenizer = make_tokenizer()
    apply_template(tokenizer, "plain")
    assert tokenizer.chat_template == CHATML


def test_a_base_without_a_template_is_refused_with_the_choices():
    with pytest.raises(DatasetError) as raised:
        apply_template(make_tokenizer(None), None)
    assert "has no chat template; set dataset.chat_template to plain" in str(raised.value)
    assert "or the path of a Jinja file; it is stored with the adapter" in str(raised.value)


def test_of_several_templates_the_default_is_taken():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ 'a' }}", "tool_use": "{{ 'b' }}"}
    assert template_text(tokenizer, None) == "{{ 'a' }}"


def test_chatml_is_refused_where_generation_would_not_stop_at_its_mark():
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(DatasetError, match=r"its end token is '<\|endoftext\|>', so generation would not stop"):
        apply_template(tokenizer, "chatml")


def test_built_in_templates_need_an_end_token():
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(DatasetError, match="plain needs an end token, but the base's tokenizer has no eos_token"):
        apply_template(tokenizer, "plain")


def test_a_jinja_file_is_read_and_held_to_its_pin(tmp_path):
    path = tmp_path / "short.jinja"
    path.write_text("{{ messages[0].content }}")
    pin = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert rendered(apply_template(make_tokenizer(), str(path), pin), CHAT) == "Be brief."
    with pytest.raises(DatasetError, match="but chat_template_revision is sha256:0000"):
        apply_template(make_tokenizer(), str(path), "sha256:" + "0" * 64)


def test_the_text_of_a_template_is_taken_as_it_is():
    assert template_text(make_tokenizer(), "{{ 'x' }}") == "{{ 'x' }}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("chatlm", "'chatlm' is neither built in nor a file; allowed are chatml, plain, the path of a Jinja file"),
        ("nowhere.jinja", "nowhere.jinja: No such file or directory; allowed are chatml, plain"),
        ("{% for x in %}", "dataset.chat_template: line 1: not a valid Jinja template"),
    ],
)
def test_what_is_no_template_is_refused(given, message):
    with pytest.raises(DatasetError) as raised:
        apply_template(make_tokenizer(), given)
    assert message in str(raised.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="it is not UTF-8 text"):
        apply_template(make_tokenizer(), str(tmp_path / "a.jinja"))


def test_a_syntax_error_names_file_and_line(tmp_path):
    path = tmp_path / "a.jinja"
    path.write_text("one\n{% if %}\n")
    with pytest.raises(DatasetError, match=r"a\.jinja: line 2: not a valid Jinja template"):
        apply_template(make_tokenizer(), str(path))


def test_templates_cannot_reach_into_objects():
    tokenizer = apply_template(make_tokenizer(), "{{ messages.__class__.__mro__ }}")
    from jinja2.exceptions import SecurityError

    with pytest.raises(SecurityError):
        rendered(tokenizer, CHAT)


def test_end_tokens_are_those_of_tokenizer_and_generation_configuration(tmp_path):
    tokenizer = make_tokenizer()
    assert end_token_ids(tokenizer) == {tokenizer.eos_token_id}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert end_token_ids(tokenizer, tmp_path) == {tokenizer.eos_token_id, 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    assert end_token_ids(tokenizer, tmp_path) == {tokenizer.eos_token_id, 0, 5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert end_token_ids(tokenizer, tmp_path) == {tokenizer.eos_token_id}


def test_a_broken_generation_configuration_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(DatasetError, match=r"generation_config\.json: eos_token_id cannot be read"):
        end_token_ids(make_tokenizer(), tmp_path)


def test_padding_falls_back_to_the_end_token():
    tokenizer = make_tokenizer()
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id


def test_the_digest_is_of_what_decides_tokens():
    tokenizer, other = make_tokenizer(), make_tokenizer()
    digest = tokenizer_digest(tokenizer)
    assert digest == tokenizer_digest(other)
    other(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(other) == digest
    other.add_tokens(["diamond"])
    assert tokenizer_digest(other) != digest


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(DatasetError, match="is not a fast one"):
        tokenizer_digest(object())
