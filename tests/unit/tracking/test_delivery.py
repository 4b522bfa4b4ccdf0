from __future__ import annotations

import json

from rankwise.tracking.outbox import MAX_BYTES, MAX_ITEMS, MAX_METRICS, Entry, batches


def entries(*records):
    made, end = [], 0
    for record in records:
        line = json.dumps(record).encode() + b"\n" if record is not None else b"\0\n"
        end += len(line)
        made.append(Entry(end=end, line=line, record=record))
    return made


def test_neighbours_of_one_kind_travel_together_in_order():
    records = [
        {"params": {"a": "1"}},
        {"m": {"x": 1.0}, "s": 0, "t": 1},
        {"m": {"x": 2.0}, "s": 1, "t": 2},
        {"tags": {"k": "v"}},
        {"m": {"x": 3.0}, "s": 2, "t": 3},
        {"end": "FINISHED", "t": 4},
    ]
    made = list(batches(entries(*records)))
    assert [batch.kind for batch in made] == ["params", "m", "tags", "m", "end"]
    assert [len(batch.entries) for batch in made] == [1, 2, 1, 1, 1]
    assert [entry.record for batch in made for entry in batch.entries] == records


def test_a_batch_holds_no_more_metrics_than_a_request():
    records = [{"m": {"a": 1.0, "b": 2.0, "c": 3.0}, "s": step, "t": step} for step in range(1000)]
    sizes = [sum(len(entry.record["m"]) for entry in batch.entries) for batch in batches(entries(*records))]
    assert sum(sizes) == 3000
    assert max(sizes) <= MAX_METRICS


def test_a_batch_holds_no_more_tags_and_bytes_than_a_request():
    many = list(batches(entries(*[{"tags": {f"k{i}": "v"}} for i in range(250)])))
    assert [len(batch.entries) for batch in many] == [MAX_ITEMS, MAX_ITEMS, 50]
    large = list(batches(entries(*[{"tags": {f"k{i}": "x" * 7000}} for i in range(90)])))
    assert all(sum(len(entry.line) for entry in batch.entries) <= MAX_BYTES for batch in large)
    assert len(large) == 2


def test_files_and_ends_travel_alone():
    record = {"file": "a", "to": "a", "table": False}
    assert [len(batch.entries) for batch in batches(entries(record, record))] == [1, 1]


def test_lines_without_a_meaning_are_set_apart():
    made = list(batches(entries({"m": {"x": 1.0}, "s": 0, "t": 1}, None, {"future": 1}, {})))
    assert [(batch.kind, len(batch.entries)) for batch in made] == [("m", 1), ("?", 3)]


def test_nothing_to_send_makes_no_batch():
    assert list(batches([])) == []
