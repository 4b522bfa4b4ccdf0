import pickle

import pytest
from helpers.data_rows import chat, make_renderer
from helpers.tiny import make_tokenizer

from rankwise.data.template import Renderer, RenderError

CHAT = chat(("user", "How much?"), ("assistant", "$326"))
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ message.content }}{% endfor %}"
)


def test_texts_are_those_of_transformers():
    tokenizer = make_tokenizer()
    renderer = Renderer.create(tokenizer)
    assert renderer.texts([CHAT]) == [tokenizer.apply_chat_template(list(CHAT), tokenize=False)]
    assert renderer.texts([CHAT[:1]], add_generation_prompt=True) == [
        tokenizer.apply_chat_template(list(CHAT[:1]), tokenize=False, add_generation_prompt=True)
    ]


def test_tokens_are_those_of_transformers():
    tokenizer = make_tokenizer()
    renderer = Renderer.create(tokenizer)
    whole = tokenizer.apply_chat_template(list(CHAT), return_dict=False)
    assert renderer.tokens(renderer.texts([CHAT])) == [whole]
    assert renderer.tokens([]) == []


def test_a_refused_conversation_is_named_with_the_template_reason():
    renderer = make_renderer(NO_SYSTEM)
    with pytest.raises(RenderError, match="roles system, user: System role not supported") as raised:
        renderer.texts([CHAT, chat(("system", "x"), ("user", "y"))])
    assert raised.value.index == 1


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RenderError("text", 3)))
    assert (str(error), error.index) == ("text", 3)


def test_the_digest_covers_template_tokenizer_and_end_tokens():
    renderer = make_renderer()
    others = [
        make_renderer("plain"),
        Renderer(tokenizer=renderer.tokenizer, end_token_ids=frozenset({0})),
        make_renderer("{{ strftime_now('%Y') }}"),
    ]
    assert make_renderer().digest() == renderer.digest()
    assert len({renderer.digest(), *(other.digest() for other in others)}) == 4


def test_a_template_that_writes_the_date_is_known():
    assert make_renderer("{{ strftime_now('%Y') }}").dated
    assert not make_renderer().dated
