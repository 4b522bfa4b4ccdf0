import pytest
from helpers.data_rows import DEFAULT_SYSTEM, FORGETS_THINKING, QUICK, ask, chat, make_example, make_renderer, words
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.rows import answer_turns
from rankwise.data.tokens import encode, mask_examples
from rankwise.exceptions import DatasetError

RENDERERS = {name: make_renderer(name) for name in ("chatml", "plain", DEFAULT_SYSTEM)}
questions = words.map(lambda text: text.replace("<|", "")).filter(lambda text: text.strip() == text and text)
chats = st.lists(st.tuples(questions, questions), min_size=1, max_size=4).map(
    lambda turns: chat(*(turn for ask, answer in turns for turn in (("user", ask), ("assistant", answer))))
)


def decoded(renderer, row):
    return renderer.tokenizer.decode(row.input_ids[row.supervised])


@QUICK
@given(chats, st.sampled_from(sorted(RENDERERS)))
def test_the_prompt_tokens_are_the_first_tokens_and_the_mask_is_what_generation_has_to_produce(messages, name):
    renderer = RENDERERS[name]
    (row,) = mask_examples([make_example(renderer, messages)], renderer, None)
    tokens, expected = row.input_ids.tolist(), [False] * len(row.input_ids)
    assert [tokens] == renderer.tokens(renderer.texts([messages]))
    for turn in answer_turns(messages):
        (prompt,) = renderer.tokens(renderer.texts([messages[:turn]], add_generation_prompt=True))
        assert tokens[: len(prompt)] == prompt
        stop = tokens.index(renderer.tokenizer.eos_token_id, len(prompt)) + 1
        assert renderer.tokenizer.decode(tokens[len(prompt) : stop]) == messages[turn]["content"] + "<|im_end|>"
        expected[len(prompt) : stop] = [True] * (stop - len(prompt))
    assert row.supervised.tolist() == expected


def test_the_mask_covers_the_answer_and_the_end_token_and_not_the_newline_after_it():
    renderer = make_renderer()
    (row,) = mask_examples([ask(renderer, "How much?", "Price is $326")], renderer, None)
    assert decoded(renderer, row) == "Price is $326<|im_end|>"
    assert renderer.tokenizer.decode(row.input_ids).endswith("<|im_end|>\n")
    assert not row.supervised[-1]


def test_every_answer_of_a_chat_is_supervised():
    renderer = make_renderer()
    messages = chat(("system", "S"), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    (row,) = mask_examples([make_example(renderer, messages)], renderer, None)
    assert decoded(renderer, row) == "one<|im_end|>two<|im_end|>"


def test_a_greeting_is_context():
    renderer = make_renderer()
    messages = chat(("assistant", "Hello"), ("user", "a"), ("assistant", "one"))
    (row,) = mask_examples([make_example(renderer, messages)], renderer, None)
    assert decoded(renderer, row) == "one<|im_end|>"


def test_a_default_system_message_of_the_template_is_read_and_not_learned():
    renderer = make_renderer(DEFAULT_SYSTEM)
    (row,) = mask_examples([ask(renderer, "a", "one")], renderer, None)
    assert "You are a helpful assistant." in renderer.tokenizer.decode(row.input_ids)
    assert decoded(renderer, row) == "one<|im_end|>"


def test_an_end_token_of_the_generation_configuration_ends_an_answer():
    from rankwise.data.template import Renderer

    template = "{% for m in messages %}{{ m.content + '<|endoftext|>' }}{% endfor %}"
    plain = make_renderer(template)
    renderer = Renderer(tokenizer=plain.tokenizer, end_token_ids=plain.end_token_ids | {plain.tokenizer.bos_token_id})
    encoded = mask_examples([ask(renderer, "a", "one")], renderer, None)
    assert decoded(renderer, encoded[0]) == "one<|endoftext|>"
    assert encoded.unended == ()


def test_an_answer_without_an_end_token_is_noted():
    renderer = make_renderer("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}")
    encoded = mask_examples([ask(renderer, "a", "one", "r7")], renderer, None)
    assert encoded.unended == ("r7",)
    assert decoded(renderer, encoded[0]) == "one\n"


def test_what_follows_an_end_token_inside_an_answer_is_not_supervised():
    renderer = make_renderer()
    (row,) = mask_examples([ask(renderer, "a", "one<|im_end|>two")], renderer, None)
    assert decoded(renderer, row) == "one<|im_end|>"


def test_the_first_token_is_never_supervised():
    renderer = make_renderer("{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}")
    (row,) = mask_examples([ask(renderer, "a", "326")], renderer, None)
    assert row.supervised.tolist() == [False] + [True] * (len(row.input_ids) - 1)


def test_a_template_that_forgets_thinking_is_refused_for_chats_and_fine_for_single_answers():
    renderer = make_renderer(FORGETS_THINKING)
    single = chat(("user", "a"), ("assistant", "<think>x</think>one"))
    (row,) = mask_examples([make_example(renderer, single)], renderer, None)
    assert decoded(renderer, row) == "<think>x</think>one<|im_end|>"
    several = make_example(renderer, (*single, *chat(("user", "b"), ("assistant", "two"))), "r3")
    with pytest.raises(DatasetError) as raised:
        mask_examples([several], renderer, None)
    message = str(raised.value)
    assert "The loss mask cannot be computed for 1 of 1 rows (rows r3)" in message
    assert "renders an earlier answer differently once more turns follow" in message
    assert "with '<think>x</think>one" in message
    assert "Use rows with one answer each, or a dataset.chat_template that does not change earlier turns" in message


def test_a_generation_prompt_that_is_not_how_an_answer_begins_is_refused():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    renderer = make_renderer(template)
    with pytest.raises(DatasetError) as raised:
        mask_examples([ask(renderer, "a", "one", str(row)) for row in range(9)], renderer, None)
    message = str(raised.value)
    assert "for 9 of 9 rows (rows 0, 1, 2, 3, 4, ...)" in message
    assert "renders the prompt of a generation differently from the beginning of the whole conversation" in message
    assert "'<think>\\n' in the prompt against 'one<|im_end|>'" in message


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused():
    template = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ' ') }}{% endfor %}"
    renderer = make_renderer(template)
    with pytest.raises(DatasetError) as raised:
        mask_examples([ask(renderer, "Price", "is $326")], renderer, None)
    message = str(raised.value)
    assert "the tokenizer joins the end of the prompt and the beginning of the answer into one token" in message
    assert "the prompt ends with 'Price ', the answer begins with 'is $326" in message
    assert "is 'Ġ' alone and 'Ġis' with the answer" in message


def test_a_row_that_is_too_long_is_cut_after_the_last_whole_answer_or_dropped():
    renderer = make_renderer()
    turns = chat(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    chatty, long = make_example(renderer, turns, "chatty"), ask(renderer, "a" * 200, "one", "long")
    short = ask(renderer, "a", "one", "short")
    (whole,) = mask_examples([chatty], renderer, None)
    stop = 1 + int(whole.supervised.nonzero()[0].max())
    first = renderer.tokens(renderer.texts([turns[:2]]))[0]
    encoded = mask_examples([chatty, long, short], renderer, stop - 1)
    assert encoded.ids == ("chatty", "short")
    assert (encoded.cut, encoded.dropped) == (("chatty",), ("long",))
    assert encoded[0].input_ids.tolist() == first[:-1]  # without the newline after the end token
    assert decoded(renderer, encoded[0]) == "one<|im_end|>"
    assert encoded.longest > 100


def test_losing_only_the_newline_after_the_last_answer_is_no_cut():
    renderer = make_renderer()
    (whole,) = mask_examples([ask(renderer, "a", "one")], renderer, None)
    encoded = encode([ask(renderer, "a", "one")], renderer, len(whole.input_ids) - 1)
    assert (encoded.cut, encoded.dropped) == ((), ())
    assert encoded[0].input_ids.tolist() == whole.input_ids.tolist()[:-1]


def test_blocks_of_rows_give_what_single_rows_give(monkeypatch):
    renderer = make_renderer()
    examples = [ask(renderer, f"carat {row}", f"${row}", str(row)) for row in range(7)]
    whole = mask_examples(examples, renderer, None)
    monkeypatch.setattr("rankwise.data.tokens.BLOCK_ROWS", 2)
    assert mask_examples(examples, renderer, None).digest == whole.digest


def test_a_conversation_that_the_template_refuses_later_is_named():
    renderer = make_renderer(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(DatasetError, match="Row r1: The chat template refuses"):
        mask_examples([ask(renderer, "a", "b", "r1")], renderer, None)
