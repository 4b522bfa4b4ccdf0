"""The command `rankwise`: its lazily imported subcommands, error messages and exit codes.

Exit codes: 0 ok, 1 a job failed or was refused, 2 usage or configuration, 3 environment, 130 interrupted, 141 the
reader of the output has ended. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import importlib
import logging
import os
import select
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click

from rankwise import __version__
from rankwise.exceptions import RankwiseError, StorageError
from rankwise.files import describe_os_error, error_number
from rankwise.logs import configure
from rankwise.redact import redact
from rankwise.settings import Settings, close_new_files, set_log_level, set_process_defaults

logger = logging.getLogger(__name__)
INTERRUPTED = 130
BROKEN_PIPE = 141
"""The exit code that shells report for SIGPIPE."""
_COMMANDS = {
    "examples": ("rankwise.cli.examples:examples", "List the shipped experiment files, or write one of them."),
    "validate": ("rankwise.cli.experiment:validate", "Check an experiment file."),
    "preview": ("rankwise.cli.preview:preview", "Show what an experiment's rows become, without training."),
    "plan": ("rankwise.cli.experiment:plan", "Show the arms of an experiment, their hashes and cost."),
    "schema": ("rankwise.cli.experiment:schema", "Print the JSON Schema of experiment files."),
    "run": ("rankwise.cli.run:run", "Train, register, evaluate and compare all arms of an experiment."),
    "submit": ("rankwise.cli.experiment:submit", "Queue an experiment's jobs for workers."),
    "worker": ("rankwise.cli.worker:worker", "Do jobs of the queue."),
    "compare": ("rankwise.cli.compare:compare", "Compare the arms of an experiment across ranks."),
    "report": ("rankwise.cli.compare:report", "Write the comparison as an HTML page, with plots and curves."),
    "jobs": ("rankwise.cli.jobs:jobs", "List, show, cancel and retry jobs, and read their logs."),
    "status": ("rankwise.cli.jobs:status", "Show the queue, the workers, and the estimated time left."),
    "cancel": ("rankwise.cli.jobs:cancel", "Cancel jobs."),
    "retry": ("rankwise.cli.jobs:retry", "Retry failed and cancelled jobs."),
    "cluster": ("rankwise.cli.worker:cluster", "Start, list and stop workers on a Ray cluster."),
    "db": ("rankwise.cli.maintenance:db", "Check and upgrade the queue's database."),
    "evaluate": ("rankwise.cli.evaluate:evaluate", "Evaluate stored adapters and the bare base on the same rows."),
    "promote": ("rankwise.cli.evaluate:promote", "Give a version an alias, if it is better beyond noise."),
    "rollback": ("rankwise.cli.evaluate:rollback", "Undo the last move of an alias."),
    "predict": ("rankwise.cli.predict:predict", "Answer the rows of a table with registered adapters."),
    "inspect": ("rankwise.cli.inspect:inspect", "Show the anatomy of an adapter over its base."),
    "pull": ("rankwise.cli.registry:pull", "Fetch a registered adapter as a plain PEFT directory."),
    "import": ("rankwise.cli.registry:import_", "Register an adapter made by another program."),
    "export": ("rankwise.cli.registry:export", "Merge a registered adapter into its base."),
    "keys": ("rankwise.cli.registry:keys", "Create signing keys, sign adapters, and show public keys."),
    "bases": ("rankwise.cli.bases:bases", "List, add, verify and prune bases on this machine."),
    "sync": (
        "rankwise.cli.maintenance:sync",
        "Deliver pending data to MLflow, and remove duplicate model versions.",
    ),
    "gc": ("rankwise.cli.maintenance:gc", "Remove checkpoints, models, outboxes and caches that no job needs."),
    "doctor": ("rankwise.cli.maintenance:doctor", "Check this machine and its services, and report what to fix."),
    "home": ("rankwise.cli.home:home", "Maintain RANKWISE_HOME: relocate it after it was moved or copied."),
    "ui": ("rankwise.cli.maintenance:ui", "Open the MLflow UI on this project's store."),
    "init-team": ("rankwise.cli.init_team:init_team", "Write the secrets of a new team for compose.yaml."),
}


class _LazyGroup(click.Group):
    """Imports a subcommand when it is called, so that `--help` stays fast."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BrokenPipeError as error:
            # click would exit with 1, the code of a failed job, without a message.
            if not _reader_gone():
                raise RuntimeError("a pipe to another process broke") from error
            # Otherwise Python reports the error again when it flushes stdout at exit.
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
    """Whether the process that reads stdout or stderr has ended."""
    polling = select.poll()
    for descriptor in (1, 2):
        polling.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in polling.poll(0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    set_process_defaults()
    close_new_files()
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
    except Exception as error:
        if not error_number(error):
            raise
        logger.debug("the operating system refused", exc_info=True)
        # All files are written where their errors get a name; those of stdout and stderr have none.
        if isinstance(error, OSError) and error.filename is None and not isinstance(error, shutil.Error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            click.echo(f"error: cannot write the output: {os.strerror(error_number(error))}", err=True)
        else:
            click.echo(f"error: {redact(describe_os_error(error))}", err=True)
        sys.exit(StorageError.exit_code)


if __name__ == "__main__":
    main()
