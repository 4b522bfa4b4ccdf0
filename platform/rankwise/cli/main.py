"""The command `rankwise`: groups its subcommands, and turns errors into messages and exit codes.

Exit codes: 0 ok, 1 a job failed or was refused, 2 usage or configuration, 3 environment, 130 interrupted, 141 nobody
reads the output any more. Human text goes to stderr, results to stdout. Subcommands are imported when they are called,
so that `--help` stays quick.
"""

from __future__ import annotations

import errno
import importlib
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

import click

from rankwise import __version__
from rankwise.exceptions import RankwiseError, StorageError
from rankwise.logs import configure
from rankwise.redact import redact
from rankwise.settings import Settings, set_log_level, set_process_defaults

INTERRUPTED = 130
BROKEN_PIPE = 141
"""As a shell says of a program that SIGPIPE has ended."""
_COMMANDS = {
    "examples": ("rankwise.cli.examples:examples", "List the shipped experiment files, or write one to start from."),
    "validate": ("rankwise.cli.experiment:validate", "Check an experiment file."),
    "plan": ("rankwise.cli.experiment:plan", "Show the arms of an experiment, their hashes and what they cost."),
    "schema": ("rankwise.cli.experiment:schema", "Print the JSON Schema of experiment files."),
    "run": ("rankwise.cli.run:run", "Train, register, evaluate and compare all arms of an experiment."),
    "submit": ("rankwise.cli.experiment:submit", "Queue an experiment's jobs, for workers anywhere."),
    "worker": ("rankwise.cli.worker:worker", "Do jobs of the queue."),
    "compare": ("rankwise.cli.compare:compare", "Compare the arms of an experiment across ranks."),
    "report": ("rankwise.cli.compare:report", "Write that comparison as an HTML page, with plots and curves."),
    "jobs": ("rankwise.cli.jobs:jobs", "List and show jobs, cancel them, try them again, read their logs."),
    "status": ("rankwise.cli.jobs:status", "Show the queue, the workers, what they do and when it is done."),
    "cancel": ("rankwise.cli.jobs:cancel", "Cancel jobs."),
    "retry": ("rankwise.cli.jobs:retry", "Try failed and cancelled jobs again."),
    "cluster": ("rankwise.cli.worker:cluster", "Start, list and stop workers on a Ray cluster."),
    "db": ("rankwise.cli.maintenance:db", "Check and upgrade the queue's database."),
    "evaluate": ("rankwise.cli.evaluate:evaluate", "Evaluate stored adapters and the bare base on the same rows."),
    "promote": ("rankwise.cli.evaluate:promote", "Give a version an alias, if it is better beyond noise."),
    "rollback": ("rankwise.cli.evaluate:rollback", "Undo the last move of an alias."),
    "predict": ("rankwise.cli.predict:predict", "Answer the rows of a table with registered adapters."),
    "inspect": ("rankwise.cli.inspect:inspect", "Show the anatomy of an adapter over its base."),
    "pull": ("rankwise.cli.registry:pull", "Fetch a registered adapter as a plain PEFT directory."),
    "import": ("rankwise.cli.registry:import_", "Register an adapter that another program has stored."),
    "export": ("rankwise.cli.registry:export", "Merge a registered adapter into its base, as a model of its own."),
    "keys": ("rankwise.cli.registry:keys", "Make keys that sign adapters, sign with them, and show public ones."),
    "bases": ("rankwise.cli.bases:bases", "List, add, verify and prune bases on this machine."),
    "sync": (
        "rankwise.cli.maintenance:sync",
        "Deliver what MLflow has missed, and remove duplicates from the registry.",
    ),
    "gc": ("rankwise.cli.maintenance:gc", "Remove checkpoints, models, outboxes and caches that no job needs."),
    "doctor": ("rankwise.cli.maintenance:doctor", "Look at this machine and what it is connected to; say what to do."),
    "ui": ("rankwise.cli.maintenance:ui", "Open the MLflow UI on the store of this project."),
    "init-team": ("rankwise.cli.init_team:init_team", "Write the secrets of a new team, for compose.yaml."),
}


class _LazyGroup(click.Group):
    """A group that imports a subcommand when it is needed."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError as error:
            # Left to click, the exit code would be that of a job that failed, and no word of it.
            if not _reader_gone():
                raise RuntimeError("a pipe to another process broke") from error
            # Python would complain once more when it flushes stdout at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            context.exit(BROKEN_PIPE)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rankwise")
@click.option("-v", "--verbose", count=True, help="Log more on stderr: -v INFO, -vv DEBUG (RANKWISE_LOG_LEVEL).")
def cli(verbose: int) -> None:
    """Which LoRA rank does the job? QLoRA sweeps over one 4-bit base, tracked and registered with MLflow."""
    if verbose:
        set_log_level("INFO" if verbose == 1 else "DEBUG")
    configure(Settings.load().log_level)


def _reader_gone() -> bool:
    """Whether what reads stdout or stderr (`| head`) has ended."""
    polling = select.poll()
    for descriptor in (1, 2):
        polling.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in polling.poll(0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    set_process_defaults()
    try:
        code = cli.main(
            args=None if arguments is None else list(arguments), prog_name="rankwise", standalone_mode=False
        )
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except RankwiseError as error:
        text = redact(str(error))
        click.echo(f"error: {text}" if "\n" not in text else text, err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # Without a name of a file it is what has no name: stdout or stderr.
        if error.filename is not None or error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EIO}:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        click.echo(f"error: the output cannot be written: {error.strerror}", err=True)
        sys.exit(StorageError.exit_code)


if __name__ == "__main__":
    main()
