from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from rankwise.cli import output
from rankwise.cli.output import Bars, note, print_json, print_table, show, waiting


def test_results_go_to_stdout_and_remarks_to_stderr(capsys):
    print_json({"a": "é"})
    note("[not markup] remark")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"schema_version": 1, "a": "é"}
    assert err == "[not markup] remark\n"


def test_documents_begin_with_the_version_of_their_layout(capsys):
    print_json({"jobs": []})
    assert list(json.loads(capsys.readouterr().out)) == ["schema_version", "jobs"]


def test_no_command_prints_json_in_another_way():
    """All documents go through `print_json`; a JSON Schema has its own version."""
    sources = {path.stem: path.read_text() for path in Path(output.__file__).parent.glob("*.py")}
    assert sum("print_json(" in text for text in sources.values()) > 10
    assert {name for name, text in sources.items() if "print_foreign_json(" in text} == {"output", "experiment"}
    assert [name for name, text in sources.items() if re.search(r"echo\(\s*json\.", text)] == ["output"]


def test_a_table_in_a_pipe_is_never_cut(capsys):
    table = Table()
    table.add_column("x" * 150)
    table.add_row("y" * 150)
    print_table(table)
    out = capsys.readouterr().out
    assert "x" * 150 in out
    assert "y" * 150 in out


def test_a_table_on_a_narrow_terminal_is_folded_and_not_cut(capsys, monkeypatch):
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    table = Table("arm", "tokens", "parameters")
    table.add_row("lora.r=16", "9,830,400", "27,262,976")
    print_table(table)
    out = capsys.readouterr().out
    assert "…" not in out
    assert sorted(filter(str.isdigit, out)) == sorted("16983040027262976")


@pytest.mark.parametrize("text", ["an error of [q_proj] at [/tmp/x]", "models:x:1 [red]"])
def test_texts_are_shown_as_they_are(capsys, monkeypatch, text):
    table = Table(text)
    table.add_row(text)
    print_table(table)
    show(lambda console: text)
    note(text)
    out, err = capsys.readouterr()
    assert out.count(text) == 3
    assert err == f"{text}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with waiting(text):
        pass
    assert text in capsys.readouterr().err


def test_bars_show_texts_as_they_are():
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=200, highlight=False)
    with Bars(console) as bars, bars.task_with_remark("reading [/rows.csv]", 3, "rows") as (advance, remark):
        remark("loss [nan]")
        advance(1)
        bars._progress.refresh()
    assert "reading [/rows.csv]" in drawn.getvalue()
    assert "loss [nan]" in drawn.getvalue()
