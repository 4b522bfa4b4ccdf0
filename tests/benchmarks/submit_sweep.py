"""What submitting a large sweep costs: rows of the queue, and MLflow runs for the arms that are claimed first only.

Over a tiny base, without the checks of the rows. For comparison, what a run for each arm would cost, from fewer arms.
"""

from __future__ import annotations

import time
from pathlib import Path

from helpers.inline_worker import Listener
from helpers.project import make_project

import rankwise.tasks.submit as enqueue
from rankwise.experiment.experiment import parse_experiment
from rankwise.settings import Settings
from rankwise.tasks.arm_rows import RowsCache
from rankwise.tasks.context import open_context
from rankwise.tasks.submit import prepare, submit

EAGER = 50


def submit_sweep(directory: Path, arms: int) -> dict[str, float]:
    """Seconds to submit a sweep, the same once more, and by the old way, a run for each arm."""
    project = make_project(directory)
    settings = Settings.load({"RANKWISE_HOME": str(project.home), "RANKWISE_CACHE": str(directory / "cache")})
    text = project.file.read_text().replace("./", f"{directory}/")
    figures = {"arms": float(arms)}
    with open_context(settings, Listener()) as context:

        def seconds(name: str, count: int) -> float:
            seeds = ", ".join(map(str, range(count)))
            sweep = f"sweep={{parameters: {{lora.r: [2], seed: [{seeds}]}}}}"
            experiment = parse_experiment(text, "tiny.yaml", [f"name={name}", f"description={name}", sweep])
            prepared = prepare(context, experiment, RowsCache(settings, context.reporter), preflight=False)
            began = time.perf_counter()
            submit(context, prepared, command="bench")
            return time.perf_counter() - began

        figures["seconds"] = seconds("many", arms)
        figures["again_seconds"] = seconds("many", arms)
        ahead = enqueue._AHEAD
        enqueue._AHEAD = arms
        try:
            # Other arms than above, which are in the queue already.
            text = text.replace("learning_rate: 1e-2", "learning_rate: 2e-2")
            figures["with_all_runs_seconds"] = seconds("eager", EAGER) / EAGER * arms
        finally:
            enqueue._AHEAD = ahead
    return figures
