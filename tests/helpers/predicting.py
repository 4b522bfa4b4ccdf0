"""A project with a registered model of two versions and a table of rows, for tests that kill `rankwise predict`."""

from __future__ import annotations

from pathlib import Path

from helpers.flavored import make_versions
from helpers.project import Project, write_rows

COMMAND = [
    "predict", "--model", "models:/one@champion", "--prompt", "carat {carat}, cut {cut}", "--temperature", "1",
    "--max-new-tokens", "40", "--shard-rows", "2", "--batch-size", "2", "rows.jsonl",
]  # fmt: skip
"""Answers `rows.jsonl` in shards of two rows; the output and other options follow."""


def make_predicting(directory: Path, rows: int) -> Project:
    """Write `rows.jsonl`: every third row names version 2, the others take version 1."""
    project = Project(directory)
    directory.mkdir(parents=True, exist_ok=True)
    make_versions(directory, project.home)
    lines = [{"carat": round(number / 7, 2), "cut": "Ideal"} for number in range(rows)]
    write_rows(
        directory / "rows.jsonl",
        [{**line, **({} if at % 3 else {"model": "models:/one/2"})} for at, line in enumerate(lines)],
    )
    return project


def shards_of(project: Project, output: str) -> int:
    """How many shards are on disk."""
    return len(list((project.directory / f"{output}.parts").glob("shard-*.jsonl")))


def left_behind(project: Project, output: str) -> list[str]:
    """Names beside an output that are neither it nor anything else of the project."""
    return sorted(path.name for path in project.directory.glob(f"*{output}*") if path.name != output)
