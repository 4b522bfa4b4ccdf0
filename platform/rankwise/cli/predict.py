"""`rankwise predict`: a table of rows in, a table of answers out."""

from __future__ import annotations

from pathlib import Path

import click

from rankwise.cli.output import note, print_json
from rankwise.cli.queue import open_queue
from rankwise.settings import Settings


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="URI",
    help="models:/NAME@ALIAS, models:/NAME/VERSION or a directory; repeatable. The first answers rows that name none.",
)
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEMPLATE", help="A template over columns, such as 'carat {carat}, cut {cut}'.")
@click.option("--model-column", default="model", show_default=True, help="The column in which a row names its model.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="The longest answer, in tokens."
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 draws from all tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draws from the fewest tokens that have this probability together.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="A text that ends an answer; repeatable.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling; row i draws from (seed, i).")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Rows decoded together.")
@click.option("--shard-rows", type=click.IntRange(min=1), default=256, show_default=True, help="Rows between savings.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first row that cannot be answered.")
@click.option("--overwrite", is_flag=True, help="Replace an OUTPUT that is there.")
@click.option("--restart", is_flag=True, help="Throw away what an interrupted run has done.")
@click.option("--base-model", metavar="SOURCE", help="Where the base is, if not where it was recorded.")
@click.option(
    "--allow-base-mismatch", is_flag=True, help="Run over another base all the same; a warning says what differs."
)
@click.option("--device", help="cpu, cuda, cuda:1; the first GPU, else the CPU, by default.")
@click.option("--submit", is_flag=True, help="Let workers do it: jobs of the queue, in place of this process.")
@click.option(
    "--shards", type=click.IntRange(min=1), help="With --submit: jobs that the rows are split into. Default: one."
)
@click.option("--priority", type=int, help="With --submit: jobs of a higher one are claimed first. Default: 0.")
@click.option("--watch", is_flag=True, help="With --submit: wait until the output is there.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def predict(
    models: tuple[str, ...],
    source: Path,
    output: Path,
    prompt: str | None,
    model_column: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop: tuple[str, ...],
    seed: int,
    batch_size: int,
    shard_rows: int,
    fail_fast: bool,
    overwrite: bool,
    restart: bool,
    base_model: str | None,
    allow_base_mismatch: bool,
    device: str | None,
    submit: bool,
    shards: int | None,
    priority: int | None,
    watch: bool,
    as_json: bool,
) -> int:
    """Answer the rows of INPUT with registered adapters, into OUTPUT (.jsonl, .csv or .parquet, both).

    A row has a column `prompt` (a text) or `messages` (a chat), or the columns of --prompt; it may name its model. All
    adapters lie over one base in memory, and rows of different adapters share a batch. A row that cannot be answered
    gets an `error`, and the command exits with 1 in the end. Aliases are resolved once. An interrupted command goes on
    where it was when it is given again.

    With --submit the rows are answered by workers (`rankwise worker`), which must see INPUT and OUTPUT under the same
    paths; the output is the same file. Given again, the command finds its jobs, and tries failed ones again.
    """
    if not submit and (shards is not None or priority is not None or watch):
        raise click.UsageError("--shards, --priority and --watch go with --submit")
    if submit and device is not None:
        raise click.UsageError("--device does not go with --submit: each worker has its own device")
    from rich.console import Console

    from rankwise.cli.progress import Bars

    settings = Settings.load()
    with Bars(Console(stderr=True, highlight=False)) as bars:
        # Late: torch and MLflow take seconds to import.
        from rankwise.cli.predict_jobs import Jobs, submit_and_watch
        from rankwise.inference.predict import Request, predict_file
        from rankwise.inference.shards import Queued, Stand
        from rankwise.modeling.generation import Decoding
        from rankwise.tasks.prediction import stand_of
        from rankwise.tracking.connect import connect

        request = Request(
            models=models,
            model_column=model_column,
            prompt=prompt,
            decoding=Decoding(
                max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop
            ),
            seed=seed,
            base_model=base_model,
            allow_base_mismatch=allow_base_mismatch,
            device=device,
            batch_size=batch_size,
            shard_rows=shard_rows,
            fail_fast=fail_fast,
        )
        if submit:
            jobs = Jobs(shards=shards or 1, priority=priority or 0, watch=watch, overwrite=overwrite, restart=restart)
            return submit_and_watch(settings, bars, request, source, output, jobs, as_json=as_json)
        connect(settings)

        def stand(queued: Queued) -> Stand:
            with open_queue(settings) as queue:
                return stand_of(queue, output, queued.whole)

        summary = predict_file(
            request,
            source,
            output,
            settings=settings,
            tracking_uri=settings.tracking_uri,
            overwrite=overwrite,
            restart=restart,
            stand=stand,
            progress=bars,
        )
    for asked, resolved in summary.models.items():
        if asked != resolved:
            note(f"{asked} was {resolved}")
    speed = f", {summary.completion_tokens / summary.seconds:,.0f} tokens a second" if summary.completion_tokens else ""
    reused = f" ({summary.reused} of them by an earlier run)" if summary.reused else ""
    note(f"{summary.rows - summary.failed} of {summary.rows} rows answered{reused}{speed}")
    if summary.failed:
        note(f"{summary.failed} rows have an error in place of an answer: column error")
    if as_json:
        print_json(summary.to_json())
    else:
        click.echo(output)
    return 1 if summary.failed else 0
