"""What becomes of the output when nobody takes it, or it has no room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from rankwise.cli.main import cli

COMMANDS = (["schema"], ["schema", "--markdown"])
DEFINITION = Path(__file__).parents[3] / "experiments" / "diamonds-rank.yaml"
PROGRAM = "from rankwise.cli.main import main; main()"


def run(command, **options):
    return subprocess.run([sys.executable, "-c", PROGRAM, *command], stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("command", [*COMMANDS, ["plan", str(DEFINITION), "--no-estimates"]])
def test_a_reader_that_has_gone_is_no_failed_job(command):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(command, stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is full is Linux's")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_without_room_is_said_without_a_traceback(command):
    with open("/dev/full", "wb") as full:
        done = run(command, stdout=full)
    assert (done.returncode, done.stderr) == (
        3, "error: cannot write the output: No space left on device\n"
    )  # fmt: skip


def test_a_closed_output_is_no_bug():
    inner = [sys.executable, "-c", PROGRAM, "plan", str(DEFINITION), "--no-estimates"]
    code = "import os, sys; os.close(1); os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *inner], stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


def test_another_pipe_that_breaks_keeps_its_traceback():
    code = (
        "from rankwise.cli import experiment, main\n"
        "def broken(): raise BrokenPipeError(32, 'Broken pipe')\n"
        "experiment.editor_schema = broken\n"
        "main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "schema"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: a pipe to another process broke"


def commands(command, name):
    if not isinstance(command, click.Group):
        return [(name, command)]
    context = click.Context(command)
    found = [(each, command.get_command(context, each)) for each in command.list_commands(context)]
    return [leaf for each, inner in found for leaf in commands(inner, f"{name} {each}")]


def test_every_command_and_every_option_says_what_it_is_for():
    every = commands(cli, "rankwise")
    assert len(every) > 35
    silent = [name for name, command in every if not command.help]
    silent += [
        f"{name} {option.opts[0]}"
        for name, command in every
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert silent == []
