from dataclasses import replace

import pytest
from helpers.data_rows import ask, chat, make_example, make_renderer

from rankwise.data.preflight import PreflightFinding, preflight
from rankwise.data.rows import Examples
from rankwise.data.template import Renderer
from rankwise.data.tokens import encode
from rankwise.exceptions import DatasetError


def rows(renderer, count=3, start=0, answer="one"):
    return [ask(renderer, f"carat {number}", answer, f"r{number}") for number in range(start, start + count)]


def check(train, evaluation=(), renderer=None, max_length=None, vocab_size=None, **examples):
    renderer = renderer or make_renderer()
    return preflight(
        Examples(train=list(train), eval=list(evaluation), **examples),
        encode(train, renderer, max_length),
        encode(evaluation, renderer, max_length),
        renderer,
        max_length=max_length,
        vocab_size=vocab_size,
    )


def codes(findings):
    return [finding.code for finding in findings]


def only(findings):
    (finding,) = findings
    return finding


def test_sound_data_have_no_findings_and_are_counted():
    renderer = make_renderer()
    report = check(rows(renderer), rows(renderer, 2, start=10), vocab_size=320, max_length=64)
    assert (report.errors, report.warnings) == ((), ())
    assert (report.counts["train.rows"], report.counts["eval.rows"]) == (3, 2)
    assert report.counts["train.tokens"] > report.counts["train.supervised_tokens"] > 3
    report.raise_for_errors()


def test_a_definition_without_evaluation_is_no_error():
    assert check(rows(make_renderer())).errors == ()


def test_no_rows_at_all_are_an_error():
    assert str(only(check([]).errors)) == "train: there are no rows"


def test_a_length_limit_that_no_row_fits_is_an_error_that_says_how_long_they_are():
    error = only(check(rows(make_renderer(), 9), max_length=5).errors)
    assert str(error).startswith(
        "train: none of the 9 rows fits into training.max_length=5 with its answer (the longest"
    )
    assert str(error).endswith("raise it, or shorten the prompt (rows r0, r1, r2, r3, r4, ...)")
    assert error.count == 9


def test_rows_beyond_the_length_limit_are_a_warning():
    renderer = make_renderer()
    report = check([*rows(renderer), ask(renderer, "a" * 300, "one", "long")], max_length=64)
    warning = only(report.warnings)
    assert "train: 1 of 4 rows are left out, because they are longer than training.max_length=64" in str(warning)
    assert warning.rows == ("long",)
    assert report.counts["train.dropped"] == 1
    assert report.errors == ()


def test_chats_that_lose_turns_are_a_warning():
    renderer = make_renderer()
    turns = chat(("user", "a"), ("assistant", "one"), ("user", "b" * 99), ("assistant", "two"))
    report = check([make_example(renderer, turns, "chatty")], max_length=64)
    assert codes(report.warnings) == ["cut"]
    assert report.counts["train.cut"] == 1


def test_a_template_that_does_not_end_answers_is_an_error():
    renderer = make_renderer("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}")
    error = only(check(rows(renderer), renderer=renderer).errors)
    assert error.code == "no_end"
    assert "does not end the assistant's turn with an end token in 3 rows" in error.message


def test_a_base_without_an_end_token_is_an_error():
    renderer = Renderer(tokenizer=make_renderer().tokenizer, end_token_ids=frozenset())
    assert codes(check(rows(renderer), renderer=renderer).errors) == ["no_end_token", "no_end"]


def test_masks_that_cover_everything_are_an_error_and_single_rows_of_it_a_warning():
    renderer = make_renderer(
        "{% for m in messages if m.content != 'x' %}{{ m.content + (eos_token if m.role == 'assistant' else '\\n') }}"
        "{% endfor %}"
    )
    bare = [ask(renderer, "x", "326", f"bare{number}") for number in range(2)]
    error = only(check(bare, renderer=renderer).errors)
    assert error.code == "all_supervised"
    report = check([*bare, *rows(renderer)], renderer=renderer)
    assert report.errors == ()
    assert str(only(report.warnings)) == "train: 2 of 5 rows have nothing but supervised tokens (rows bare0, bare1)"


def test_masks_that_cover_nothing_are_an_error_and_single_rows_of_it_a_warning():
    renderer = make_renderer("{% for m in messages if m.content != 'x' %}{{ m.content + eos_token }}{% endfor %}")
    silent = [ask(renderer, "a", "x", f"silent{number}") for number in range(2)]
    assert codes(check(silent, renderer=renderer).errors) == ["no_end", "none_supervised"]
    assert codes(check([*silent, *rows(renderer)], renderer=renderer).warnings) == ["row_none_supervised"]


def test_tokens_beyond_the_embedding_are_an_error_with_the_rows():
    renderer = make_renderer()
    renderer.tokenizer.add_tokens(["diamond"])
    new = renderer.tokenizer.convert_tokens_to_ids("diamond")
    report = check([*rows(renderer), ask(renderer, "a diamond", "one", "new")], renderer=renderer, vocab_size=new)
    error = only(report.errors)
    assert f"train: 1 rows have tokens beyond the {new} rows of the base's embedding, such as {new}" in error.message
    assert error.rows == ("new",)


def test_a_padding_token_beyond_the_embedding_is_an_error():
    renderer = make_renderer()
    renderer.tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    limit = renderer.pad_token_id
    assert codes(check(rows(renderer), renderer=renderer, vocab_size=limit).errors) == ["padding_beyond_vocabulary"]


def test_a_missing_padding_token_is_a_warning():
    renderer = make_renderer(pad_token=None)
    warning = only(check(rows(renderer), renderer=renderer).warnings)
    assert "has no padding token; '<|im_end|>' is used and masked" in warning.message


def test_empty_completions_are_a_warning_and_all_of_them_an_error():
    renderer = make_renderer()
    empty = rows(renderer, 2, answer=" ")
    assert "2 of 5 rows have an empty completion" in str(only(check([*empty, *rows(renderer, 3, 5)]).warnings))
    assert codes(check(empty).errors) == ["empty_completion"]


def test_rows_on_both_sides_are_a_warning_with_counts():
    renderer = make_renderer()
    train = rows(renderer, 4)
    evaluation = [*rows(renderer, 2), *rows(renderer, 1, 2, answer="other"), *rows(renderer, 1, 50)]
    report = check(train, evaluation)
    assert codes(report.warnings) == ["shared_rows", "shared_prompts"]
    assert str(report.warnings[0]).startswith("2 of 4 evaluation rows are also training rows")
    assert report.warnings[0].rows == ("r0", "r1")
    assert report.warnings[1].rows == ("r2",)


def test_an_end_token_inside_an_answer_is_a_warning():
    renderer = make_renderer()
    warning = only(check([ask(renderer, "a", "one<|im_end|>two", "odd"), *rows(renderer)]).warnings)
    assert warning.code == "end_token_inside"
    assert warning.rows == ("odd",)


def test_a_template_with_the_date_is_a_warning():
    renderer = make_renderer(
        "{{ strftime_now('%Y') + '\\n' }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    assert codes(check(rows(renderer), renderer=renderer).warnings) == ["dated_template"]


def test_what_reading_left_out_or_noted_is_a_warning():
    report = check(rows(make_renderer()), dropped={"train: empty cell": 1200, "eval: empty cell": 1}, notes=("a note",))
    left_out = ["1,200 rows left out: train: empty cell", "1 row left out: eval: empty cell"]
    assert [str(finding) for finding in report.warnings] == [*left_out, "a note"]


def test_errors_stop_a_run_with_all_of_them():
    renderer = make_renderer("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}")
    report = check(rows(renderer), renderer=renderer, vocab_size=10)
    with pytest.raises(DatasetError) as raised:
        report.raise_for_errors()
    assert len(raised.value.problems) == len(report.errors) > 1
    assert str(raised.value) == "\n".join(map(str, report.errors))


def test_a_finding_names_its_first_rows():
    assert str(PreflightFinding(code="x", message="odd", count=2, rows=("a", "b"))) == "odd (rows a, b)"
    assert str(PreflightFinding(code="x", message="odd", count=9, rows=("a", "b"))) == "odd (rows a, b, ...)"


def test_losing_more_than_a_percent_names_the_length_that_covers_99_percent():
    renderer = make_renderer()
    long = [ask(renderer, "a" * 50, "b" * 50, "long"), ask(renderer, "a" * 300, "b", "longer")]
    report = check([*rows(renderer, 98), *long], rows(renderer, 2, start=200), max_length=80)
    found = {finding.code: str(finding) for finding in report.warnings}
    covering = len(encode(long[:1], renderer, None)[0].input_ids)
    assert found["too_long"].startswith("train: 1 of 100 rows are left out, because they are longer than")
    assert "99 %" not in found["too_long"]
    assert found["truncated"].startswith("train: 1 of 100 rows lose the end of their answer")
    few = check([*rows(renderer, 48), *long], max_length=80)
    texts = [str(finding) for finding in few.warnings if finding.code == "too_long"]
    assert "training.max_length: " in texts[0]
    assert "leaves 99 % of the rows whole" in texts[0]
    assert (report.counts["train.truncated"], report.counts["eval.truncated"]) == (1, 0)
    assert encode([*rows(renderer, 98), *long], renderer, 80).covering(0.99) == covering


def test_tools_and_reasoning_that_the_template_does_not_write_are_a_warning():
    renderer = make_renderer()
    answer = {"role": "assistant", "content": "one", "reasoning_content": "because"}
    row = replace(make_example(renderer, (*chat(("user", "a")), answer), "r"), tools=({"function": {"name": "f"}},))
    assert codes(check([row]).warnings) == ["tools_not_written", "reasoning_not_written"]


def test_evaluation_conversations_share_prompts_by_all_their_answers():
    renderer = make_renderer()
    opening = (("user", "hello"), ("assistant", "hi"))
    train = [make_example(renderer, chat(*opening, ("user", "a"), ("assistant", "one")), "t")]
    shared = make_example(renderer, chat(*opening, ("user", "b"), ("assistant", "two")), "s")
    prefix = make_example(renderer, chat(*opening), "p")
    report = check(train, [shared, prefix])
    assert {finding.code: finding.rows for finding in report.warnings} == {
        "shared_rows": ("p",),
        "shared_prompts": ("s",),
    }
