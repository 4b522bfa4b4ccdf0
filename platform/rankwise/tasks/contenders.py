"""Among how many arms a version was chosen: those that were compared with it on the same evaluation rows."""

from __future__ import annotations

from rankwise.evaluation.summary import PREFIX
from rankwise.tracking.query import get_run
from rankwise.tracking.registry import ModelVersion
from rankwise.tracking.store import Store
from rankwise.tracking.sweeps import membership


def contenders(store: Store, version: ModelVersion) -> int:
    """The evaluated arms of the sweeps that a version's arm belongs to, itself included; 1 where it belongs to none.

    Raises:
        TrackingError: The store cannot be reached.
    """
    if version.run_id is None:
        return 1
    own = get_run(store.client, version.run_id)
    sweeps = [membership(sweep) for sweep in store.runs(own.experiment_id, kind="sweep")]
    of_own = [belongs for belongs in sweeps if belongs(own.parent, own.spec_hash or "")]
    evaluated = {
        run.spec_hash
        for run in store.runs(own.experiment_id, kind="train")
        if any(belongs(run.parent, run.spec_hash or "") for belongs in of_own)
        and any(key.startswith(PREFIX) for key in run.metrics)
    }
    return len({*evaluated, own.spec_hash})
