"""Examples of several sources: mixtures, splits, ids, and what is counted by source."""

import pytest
from helpers.data_rows import QUICK, definition, make_renderer, table
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.preflight import preflight
from rankwise.data.rows import build_examples, row_keys
from rankwise.data.selection import mix, split_sources
from rankwise.data.tokens import encode
from rankwise.exceptions import DatasetError
from rankwise.experiment.schema import DataSource

RENDERER = make_renderer()


def questions(name, count):
    return [{"carat": f"{name}{number}", "cut": "Ideal", "price": number} for number in range(count)]


def chats(count):
    return [
        {"conversations": [{"from": "human", "value": f"chat {number}?"}, {"from": "gpt", "value": str(number)}]}
        for number in range(count)
    ]


def build(train, tables, evaluation=None, **changes):
    spec = definition(**{"train": train, **changes})
    return build_examples(
        spec, [table(rows) for rows in tables], None if evaluation is None else [table(rows) for rows in evaluation],
        RENDERER,
    )  # fmt: skip


def test_each_source_is_read_with_its_own_mapping_and_its_rows_have_ids_of_their_own():
    sources = [{"source": "a.csv"}, {"source": "b.jsonl", "format": "sharegpt", "label": "chat", "system": "Be brief."}]
    examples = build(sources, [questions("a", 2), chats(2)])
    assert [row.id for row in examples.train] == ["a/0", "a/1", "chat/0", "chat/1"]
    assert [row.source for row in examples.train] == ["a", "a", "chat", "chat"]
    assert examples.train[0].messages[0]["content"] == "carat a0, cut Ideal"
    assert [turn["content"] for turn in examples.train[2].messages] == ["Be brief.", "chat 0?", "0"]
    assert examples.formats == ("prompt_completion", "sharegpt")
    assert examples.mapping is None
    assert build([{"source": "a.csv"}, {"source": "b.csv"}], [questions("a", 1)] * 2).mapping is not None
    # The source's own system message does not count as a part of the prompt.
    bare = build([{"source": "b", "format": "sharegpt"}], [chats(1)]).train[0]
    assert row_keys(examples.train[2], ["Be brief."]) == row_keys(bare)


def test_weights_repeat_and_leave_out_rows_the_same_way_everywhere():
    sources = [{"source": "a", "weight": 3}, {"source": "b", "weight": 1}]
    examples = build(sources, [questions("a", 4), questions("b", 8)])
    ids = [row.id for row in examples.train]
    assert ids == [
        "a/0", "a/1", "a/2", "a/3", "a/0#2", "a/1#2", "a/2#2", "a/3#2", "a/0#3", "b/0", "b/5", "b/6",
    ]  # fmt: skip
    assert len(set(ids)) == len(ids)
    assert examples.train[4].messages == examples.train[0].messages
    assert examples.notes == ("train: b: 3 of 8 rows are in an epoch",)
    encoded = encode(examples.train, RENDERER, None)
    assert encoded.ids == tuple(ids)
    # Another seed, through that of a split, chooses others.
    split = {"split_from": "train", "rows": 2, "seed": 1}
    assert len(build(sources, [questions("a", 4), questions("b", 8)], eval=split).train) == 10


@QUICK
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.lists(st.integers(1, 20), min_size=4, max_size=4),
    st.one_of(st.none(), st.integers(1, 60)),
    st.integers(0, 3),
)
def test_a_mixture_has_every_row_as_often_as_the_others_of_its_source_or_once_more(sizes, weights, limit, seed):
    sources = [DataSource(source=str(place), weight=weight) for place, weight in enumerate(weights[: len(sizes)])]
    ids = [[str(number) for number in range(size)] for size in sizes]
    try:
        picks = mix(sources, ids, limit, seed)
    except DatasetError:
        return
    total = min(sum(sizes), limit or sum(sizes))
    assert len(picks) == len(set(picks)) == total
    for place, size in enumerate(sizes):
        often = [sum((pick.source, pick.position) == (place, row) for pick in picks) for row in range(size)]
        assert max(often) - min(often) <= 1
        assert abs(sum(often) - total * weights[place] / sum(weights[: len(sizes)])) < 1
    assert picks == mix(sources, ids, limit, seed)


def test_a_larger_limit_keeps_the_rows_of_a_smaller_one():
    sources = [DataSource(source="a", weight=1), DataSource(source="b", weight=1)]
    ids = [[str(number) for number in range(50)]] * 2
    assert set(mix(sources, ids, 20, 0)) < set(mix(sources, ids, 60, 0))
    plain = [DataSource(source="a"), DataSource(source="b", rows=70)]
    few, more = (set(mix(plain, ids, limit, 0)) for limit in (20, 60))
    assert few < more < set(mix(plain, ids, None, 0))
    assert sum(pick.copy == 2 for pick in mix(plain, ids, None, 0)) == 20


def test_a_split_takes_rows_of_every_source_and_no_prompt_is_on_both_sides():
    shared = questions("same", 10)
    tables = [[*questions("a", 30), *shared], [*shared, *questions("b", 70)]]
    examples = build([{"source": "a"}, {"source": "b"}], tables,
                     eval={"split_from": "train", "rows": 24})  # fmt: skip
    counts = {label: sum(row.source == label for row in examples.eval) for label in ("a", "b")}
    assert counts == {"a": 8, "b": 16}
    assert {row.prompt for row in examples.train}.isdisjoint(row.prompt for row in examples.eval)
    lost = examples.dropped.get("split: shares a prompt with evaluation rows", 0)
    assert len(examples.train) + len(examples.eval) + lost == 120


@pytest.mark.parametrize("weights", [(1, 1), (9, 1), (1, 9)])
def test_the_split_does_not_depend_on_the_weights(weights):
    sources = [{"source": name, "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    tables = [questions("a", 30), questions("b", 60)]
    examples = build(sources, tables, eval={"split_from": "train", "rows": 9})
    plain = build([{"source": "a"}, {"source": "b"}], tables, eval={"split_from": "train", "rows": 9})
    assert [row.id for row in examples.eval] == [row.id for row in plain.eval]
    assert len(examples.train) == 81


def test_a_source_that_is_too_small_for_the_split_is_named():
    with pytest.raises(DatasetError, match=r"1 are split off tiny, but that source has 1 rows"):
        split_sources([["x", "y", "z"], ["w"]], 2, 0, ["big", "tiny"])


def test_evaluation_rows_of_several_sources():
    evaluation = [{"source": "c", "rows": 3}, {"source": "d", "label": "hard"}]
    examples = build("a", [questions("a", 5)], [questions("c", 20), questions("d", 4)], eval=evaluation)
    assert sum(row.source == "c" for row in examples.eval) == 3
    assert [row.id for row in examples.eval][3:] == ["hard/0", "hard/1", "hard/2", "hard/3"]
    assert examples.train[0].id == "0"


def test_what_is_left_out_is_counted_by_source():
    bad = [{"carat": None, "cut": "x", "price": 1}, *questions("b", 2)]
    examples = build([{"source": "a"}, {"source": "b"}], [questions("a", 2), bad])
    assert examples.dropped == {"train: b: empty cell": 1}
    report = preflight(examples, encode(examples.train, RENDERER, None), None, RENDERER)
    assert "1 row left out: train: b: empty cell" in [str(finding) for finding in report.warnings]
    with pytest.raises(DatasetError, match=r"dataset\.train: b: none of 1 rows can be used: 1 with empty cell"):
        build([{"source": "a"}, {"source": "b"}], [questions("a", 2), bad[:1]])


def test_a_wrong_column_names_the_source():
    with pytest.raises(DatasetError, match=r"dataset\.prompt \(train b data\)"):
        build([{"source": "a"}, {"source": "b"}], [questions("a", 2), [{"carat": 1, "price": 2}]])


def test_documents_and_answers_are_not_mixed():
    with pytest.raises(
        DatasetError, match=r"cannot be mixed with questions and answers \(a: prompt_completion, b: text\)"
    ):
        build([{"source": "a"}, {"source": "b", "format": "text"}], [questions("a", 2), [{"text": "Once."}]])
