from __future__ import annotations

import json

import pytest
from rich.table import Table

from rankwise.cli.output import note, print_json, print_table, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (109_051_904, "109.05 MB"), (10**16, "10000.00 TB")],
)  # fmt: skip
def test_sizes_are_decimal(count, text):
    assert size(count) == text


def test_results_go_to_stdout_and_remarks_to_stderr(capsys):
    print_json({"a": "é"})
    note("[not markup] remark")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": "é"}
    assert err == "[not markup] remark\n"


def test_a_table_in_a_pipe_is_never_cut(capsys):
    table = Table()
    table.add_column("x" * 150)
    table.add_row("y" * 150)
    print_table(table)
    out = capsys.readouterr().out
    assert "x" * 150 in out
    assert "y" * 150 in out
