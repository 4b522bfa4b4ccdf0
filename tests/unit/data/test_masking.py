import pytest
from helpers.data_rows import DEFAULT_SYSTEM, FORGETS_THINKING, QUICK, ask, chat, make_example, make_renderer, words
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.chat import answer_turns
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


def test_a_template_that_forgets_thinking_makes_a_row_for_each_answer():
    renderer = make_renderer(FORGETS_THINKING)
    turns = (("user", "a"), ("assistant", "<think>x</think>one"), ("user", "b"), ("assistant", "<think>y</think>two"))
    messages = chat(*turns)
    encoded = mask_examples([make_example(renderer, messages, "r3")], renderer, None)
    assert encoded.ids == ("r3", "r3")
    assert [decoded(renderer, row) for row in encoded] == [
        "<think>x</think>one<|im_end|>",
        "<think>y</think>two<|im_end|>",
    ]
    for row, place in zip(encoded, (1, 3), strict=True):
        (prompt,) = renderer.tokens(renderer.texts([messages[:place]], add_generation_prompt=True))
        assert row.input_ids[: len(prompt)].tolist() == prompt
        assert row.supervised.tolist().index(True) == len(prompt)
    assert "<think>x" not in renderer.tokenizer.decode(encoded[1].input_ids)
    assert encoded.whole_lengths.tolist() == [max(len(row.input_ids) for row in encoded)]


def test_answers_that_a_template_renders_alike_share_a_row():
    renderer = make_renderer(FORGETS_THINKING)
    turns = (("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "<think>y</think>two"))
    more = (*turns, ("user", "c"), ("assistant", "three"))
    encoded = mask_examples([make_example(renderer, chat(*more))], renderer, None)
    # What comes before the second answer is in both rows; the nearer one learns it.
    assert [decoded(renderer, row) for row in encoded] == [
        "one<|im_end|><think>y</think>two<|im_end|>",
        "three<|im_end|>",
    ]


OPENS_A_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def test_an_answer_without_a_thought_ends_the_one_that_the_prompt_opens():
    renderer = make_renderer(OPENS_A_THOUGHT)
    (row,) = mask_examples([ask(renderer, "a", "one")], renderer, None)
    assert renderer.tokenizer.decode(row.input_ids).endswith("<think>\n\n</think>\n\none<|im_end|>")
    assert decoded(renderer, row) == "\n</think>\n\none<|im_end|>"
    thoughtful = (*chat(("user", "a")), {"role": "assistant", "content": "one", "reasoning_content": "x"})
    (row,) = mask_examples([make_example(renderer, thoughtful)], renderer, None)
    assert decoded(renderer, row) == "x\n</think>\n\none<|im_end|>"


def test_a_thought_that_the_template_drops_is_learned_where_the_prompt_opens_it():
    drops = OPENS_A_THOUGHT.replace("m.reasoning_content", "m.nothing").replace(
        "m.content +", "m.content.split('</think>')[-1] +"
    )
    renderer = make_renderer(drops)
    for answer in (
        {"role": "assistant", "content": "one", "reasoning_content": "x"},
        {"role": "assistant", "content": "<think>x</think>one"},
    ):
        (row,) = mask_examples([make_example(renderer, (*chat(("user", "a")), answer))], renderer, None)
        assert decoded(renderer, row) == "x\n</think>\n\none<|im_end|>"


def test_a_generation_prompt_that_is_not_how_an_answer_begins_is_refused():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<plan>\\n' }}{% endif %}"
    )
    renderer = make_renderer(template)
    with pytest.raises(DatasetError) as raised:
        mask_examples([ask(renderer, "a", "one", str(row)) for row in range(9)], renderer, None)
    message = str(raised.value)
    assert "for 9 of 9 rows (rows 0, 1, 2, 3, 4, ...)" in message
    assert "renders the prompt of a generation differently from the beginning of the whole conversation" in message
    assert "'<plan>\\n' in the prompt against 'one<|im_end|>'" in message


def test_a_prompt_that_says_not_to_think_is_refused_for_thoughts_with_the_argument_that_helps():
    switch = OPENS_A_THOUGHT.replace(
        "'<|im_start|>assistant\n<think>\n'",
        "'<|im_start|>assistant\n<think>\n' + ('' if enable_thinking else '</think>')",
    )
    renderer = make_renderer(switch)
    thoughtful = (*chat(("user", "a")), {"role": "assistant", "content": "one", "reasoning_content": "x"})
    with pytest.raises(DatasetError) as raised:
        mask_examples([make_example(renderer, thoughtful)], renderer, None)
    assert "set dataset.chat_template_kwargs: {enable_thinking: true}" in str(raised.value)
    thinking = renderer.with_arguments(enable_thinking=True)
    (row,) = mask_examples([make_example(thinking, thoughtful)], thinking, None)
    assert decoded(thinking, row) == "x\n</think>\n\none<|im_end|>"


def test_a_template_that_begins_the_next_turn_with_the_end_token_ends_answers_with_it():
    renderer = make_renderer(
        "{% for m in messages %}{{ eos_token if m.role == 'user' else '>' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
    )
    messages = chat(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    encoded = mask_examples([make_example(renderer, messages)], renderer, None)
    assert [decoded(renderer, row) for row in encoded] == ["one<|im_end|>two<|im_end|>"]
    assert encoded.unended == ()


CALLED = (
    *chat(("user", "a")),
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": {"x": "y"}}}]},
)


def test_calls_that_the_template_does_not_write_are_refused():
    renderer = make_renderer()
    with pytest.raises(DatasetError, match="does not write tool_calls, so an empty answer would be learned"):
        mask_examples([make_example(renderer, CALLED)], renderer, None)


def test_calls_are_learned_as_the_template_writes_them():
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    renderer = make_renderer(template)
    (row,) = mask_examples([make_example(renderer, CALLED)], renderer, None)
    assert decoded(renderer, row) == '{"name": "find", "arguments": {"x": "y"}}<|im_end|>'


def test_an_answer_that_the_template_does_not_write_is_refused():
    renderer = make_renderer("{% for m in messages %}{{ m.role + eos_token }}{% endfor %}")
    with pytest.raises(DatasetError, match="the chat template does not write the answer"):
        mask_examples([ask(renderer, "a", "one")], renderer, None)


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


@pytest.mark.parametrize(
    ("supervise", "expected"),
    [("answers", "one<|im_end|>two<|im_end|>"), ("last_answer", "two<|im_end|>"), ("all_tokens", None)],
)
def test_what_is_supervised(supervise, expected):
    renderer = make_renderer()
    messages = chat(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    (row,) = mask_examples([make_example(renderer, messages)], renderer, None, supervise=supervise)
    whole = renderer.tokenizer.decode(row.input_ids)
    assert whole == renderer.texts([messages])[0]
    # The first token has nothing before it.
    assert decoded(renderer, row) == (expected or whole.removeprefix("<|im_start|>"))


def test_a_single_answer_that_is_too_long_is_truncated_and_does_not_learn_to_end():
    renderer = make_renderer()
    row = ask(renderer, "a", "one two three four", "long")
    (whole,) = mask_examples([row], renderer, None)
    limit = len(whole.input_ids) - 4
    encoded = mask_examples([row], renderer, limit)
    assert encoded.truncated == ("long",)
    assert (encoded.cut, encoded.dropped) == ((), ())
    assert encoded[0].input_ids.tolist() == whole.input_ids[:limit].tolist()
    assert encoded[0].supervised.tolist() == whole.supervised[:limit].tolist()
    assert renderer.tokenizer.eos_token_id not in encoded[0].input_ids[encoded[0].supervised]
    old = mask_examples([row], renderer, limit, overlong="whole_answers")
    assert (old.dropped, old.truncated, len(old)) == (("long",), (), 0)


def test_rows_that_are_too_long_are_dropped_truncated_or_an_error_on_request():
    renderer = make_renderer()
    turns = chat(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two three four"))
    rows = [make_example(renderer, turns, "chat"), ask(renderer, "a", "one", "short")]
    limit = len(mask_examples(rows, renderer, None)[0].input_ids) - 4
    assert mask_examples(rows, renderer, limit).cut == ("chat",)
    dropped = mask_examples(rows, renderer, limit, overlong="drop")
    assert (dropped.ids, dropped.dropped) == (("short",), ("chat",))
    truncated = mask_examples(rows, renderer, limit, overlong="truncate")
    assert (truncated.ids, truncated.truncated) == (("chat", "short"), ("chat",))
    assert decoded(renderer, truncated[0]).startswith("one<|im_end|>two")
    assert len(truncated[0].input_ids) == limit
    with pytest.raises(DatasetError) as raised:
        mask_examples(rows, renderer, limit, overlong="error")
    assert f"1 of 2 rows (rows chat) are longer than training.max_length={limit}" in str(raised.value)
    assert f"99 % have at most {limit + 4}" in str(raised.value)
