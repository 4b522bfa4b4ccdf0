"""`rankwise ui`: MLflow's UI on the local store, or where the UI of the remote one is."""

from __future__ import annotations

import signal
from types import FrameType

import click
from rich.console import Console

from rankwise.settings import Settings

_MOST_EXPERIMENTS = 10


@click.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface to listen on.")
def ui(port: int, host: str) -> None:
    """Open MLflow's UI on the store of this project and serve it until Ctrl-C.

    There is no authentication: on another interface than loopback everybody who reaches the port can read and change
    the store. MLFLOW_SERVER_ALLOWED_HOSTS names the host names that browsers may use.
    """
    # Late: MLflow takes seconds to import.
    from rankwise.redact import redact
    from rankwise.tracking.connect import connect
    from rankwise.tracking.server import is_remote, serve
    from rankwise.tracking.table_view import latest_views

    settings = Settings.load()
    console = Console(stderr=True)
    if is_remote(settings.tracking_uri):
        console.print("MLFLOW_TRACKING_URI names a server; its UI is at", highlight=False)
        click.echo(redact(settings.tracking_uri))
        return
    # A closed terminal or a plain kill ends the server too, as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        status = console.status("Starting MLflow ...")
        status.start()
        try:
            client = connect(settings)
            with serve(settings, host, port) as server:
                status.stop()
                console.print("MLflow's UI is at the address below; Ctrl-C ends it.", highlight=False)
                click.echo(server.url)
                for name, route in latest_views(client, _MOST_EXPERIMENTS):
                    console.print(f"{name}: {server.url}/{route}", highlight=False, markup=False, soft_wrap=True)
                server.wait()
        finally:
            status.stop()
    except KeyboardInterrupt:
        console.print("MLflow's UI has ended.", highlight=False)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
