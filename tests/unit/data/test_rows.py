import json

import pytest
from helpers.data_rows import DEFAULT_SYSTEM, QUICK, chat, definition, diamonds, make_renderer, table
from hypothesis import given
from hypothesis import strategies as st

from rankwise.assets.dataset import resolve_data
from rankwise.data.rows import build_examples, load_examples
from rankwise.exceptions import DatasetError
from rankwise.settings import Settings

CHATS = {"messages": "chat", "prompt": None, "completion": None}
SPLIT = {"split_from": "train", "rows": 20, "seed": 0}


def build(rows, evaluation=None, renderer=None, **changes):
    eval_tables = None if evaluation is None else [table(evaluation)]
    return build_examples(definition(**changes), [table(rows)], eval_tables, renderer or make_renderer())


def test_a_row_becomes_prompt_completion_and_keeps_its_columns():
    example = build(diamonds(2)).train[1]
    assert example.id == "1"
    assert example.messages == chat(("user", "carat 0.21, cut Premium"), ("assistant", "Price is $301"))
    assert example.prompt == "<|im_start|>user\ncarat 0.21, cut Premium<|im_end|>\n<|im_start|>assistant\n"
    assert example.completion == "Price is $301"
    assert example.columns == {"carat": 0.21, "cut": "Premium", "price": 301}


def test_a_template_default_system_message_is_kept_and_one_of_the_definition_takes_its_place():
    renderer = make_renderer(DEFAULT_SYSTEM)
    assert "You are a helpful assistant." in build(diamonds(1), renderer=renderer).train[0].prompt
    prompt = build(diamonds(1), renderer=renderer, system="Be brief.").train[0].prompt
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    silent = build(diamonds(1), renderer=renderer, system="").train[0].prompt
    assert silent.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")


@QUICK
@given(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h"]), min_size=30, max_size=60), st.integers(0, 5))
def test_equal_prompts_fall_on_one_side(cuts, seed):
    rows = [{"carat": 1, "cut": cut, "price": number} for number, cut in enumerate(cuts)]
    split = {"split_from": "train", "rows": 3, "seed": seed}
    try:
        examples = build(rows, renderer=RENDERER, eval=split)
    except DatasetError:
        assert len(set(cuts)) < 4
        return
    assert len(examples.eval) == 3
    assert {row.prompt for row in examples.train}.isdisjoint(row.prompt for row in examples.eval)
    lost = examples.dropped.get("split: shares a prompt with evaluation rows", 0)
    assert len(examples.train) + len(examples.eval) + lost == len(rows)


RENDERER = make_renderer()


def test_the_split_is_the_same_for_another_template_and_system_message():
    rows = diamonds(100)
    first = build(rows, eval=SPLIT)
    second = build(rows, eval=SPLIT, renderer=make_renderer("plain"), system="Be brief.")
    assert [row.id for row in first.eval] == [row.id for row in second.eval]


def test_limits_choose_after_the_split_by_its_seed():
    rows = diamonds(200)
    whole, small = build(rows, eval=SPLIT), build(rows, eval=SPLIT, limit={"train": 30, "eval": 5})
    assert (len(small.train), len(small.eval)) == (30, 5)
    assert {row.id for row in small.train} < {row.id for row in whole.train}
    assert {row.id for row in small.eval} < {row.id for row in whole.eval}
    other = build(rows, eval=SPLIT | {"seed": 1}, limit={"train": 30})
    assert [row.id for row in other.train] != [row.id for row in small.train]


def test_a_limit_beyond_the_rows_is_told():
    assert build(diamonds(5), limit={"train": 9}).notes == ("dataset.limit.train is 9, but there are only 5 rows",)


def test_evaluation_rows_come_from_their_own_table():
    examples = build(diamonds(5), diamonds(3), eval="eval.csv")
    assert (len(examples.train), len(examples.eval)) == (5, 3)


def test_a_column_that_only_the_evaluation_table_lacks_is_named_with_its_table():
    with pytest.raises(DatasetError, match=r"dataset\.completion \(eval data\): unknown column 'price'"):
        build(diamonds(5), [{"carat": 1.0, "cut": "Ideal"}], eval="eval.csv")


def test_rows_with_empty_cells_are_left_out_and_counted():
    rows = [*diamonds(3), {"carat": None, "cut": "Ideal", "price": 1}]
    examples = build(rows)
    assert len(examples.train) == 3
    assert examples.dropped == {"train: empty cell": 1}


def test_a_table_without_a_usable_row_is_refused():
    with pytest.raises(DatasetError, match=r"dataset\.train: none of 2 rows can be used: 2 with no assistant turn"):
        build([{"chat": [{"role": "user", "content": "x"}]}] * 2, **CHATS)


def test_the_id_column_names_rows():
    rows = [row | {"id": f"row-{number}"} for number, row in enumerate(diamonds(3))]
    assert [row.id for row in build(rows).train] == ["row-0", "row-1", "row-2"]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [(("a", "a", "b"), "has repeated values"), ((1.5, 2.5, 3.5), "neither a text nor a whole number")],
)
def test_an_id_column_that_does_not_name_rows_is_told_and_not_used(ids, reason):
    examples = build([row | {"id": name} for name, row in zip(ids, diamonds(3), strict=True)])
    assert [row.id for row in examples.train] == ["0", "1", "2"]
    assert reason in examples.notes[0]


def test_numbers_of_rows_are_those_of_the_source():
    examples = build(diamonds(100), eval=SPLIT, limit={"train": 10})
    for row in (*examples.train, *examples.eval):
        assert row.columns["price"] == 300 + int(row.id)


def test_chats_are_prompts_up_to_the_last_answer():
    turns = chat(("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"), ("user", "bye"))
    examples = build([{"chat": json.dumps(turns)}], **CHATS)
    assert examples.train[0].messages == turns[:4]
    assert examples.train[0].prompt.endswith("two<|im_end|>\n<|im_start|>assistant\n")
    assert examples.train[0].completion == "2"
    assert examples.notes == ("train: 1 rows have turns after the assistant's last one; these turns are not used",)


def test_a_row_that_the_template_refuses_is_named():
    renderer = make_renderer(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    )
    rows = [
        {"chat": json.dumps(chat(("user", "x"), ("assistant", "y")))},
        {"chat": json.dumps(chat(("tool", "x"), ("assistant", "y")))},
    ]
    with pytest.raises(DatasetError, match=r"Row 1: The chat template refuses .* roles tool: no tools"):
        build(rows, renderer=renderer, **CHATS)


def test_tables_are_read_from_their_sources(tmp_path):
    lines = ["carat,cut,price", *(f"{row['carat']:.2f},{row['cut']},{row['price']}" for row in diamonds(40))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    settings = Settings.load({"RANKWISE_HOME": str(tmp_path / "home"), "RANKWISE_CACHE": str(tmp_path / "cache")})
    dataset = definition(train=str(tmp_path / "rows.csv"), eval=SPLIT)
    data = resolve_data(dataset.train, None, settings)
    examples = load_examples(dataset, [data], None, make_renderer(), settings)
    assert (len(examples.train), len(examples.eval)) == (20, 20)
