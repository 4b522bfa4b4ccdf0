from __future__ import annotations

import pytest

from rankwise.tracking.cleanup import versions_of_jobs
from rankwise.tracking.registry import JOB


@pytest.fixture
def registered(store, experiment):
    """The run of a job, and the version that the job has registered."""
    with store.start_run(experiment, "r=4", system_metrics=False) as run:
        model = store.client.create_logged_model(experiment, "adapter", run.run_id)
        store.client.finalize_logged_model(model.model_id, "READY")
        return run.run_id, store.registry.create_version("pricer", model.model_id, tags={JOB: "7"})


@pytest.mark.parametrize("name", ["pricer", "pricer-in-production"])
def test_a_copy_of_a_job_s_version_is_of_whoever_made_it(store, registered, name):
    run_id, version = registered
    copy = store.client.copy_model_version(version.uri, name)
    assert (copy.tags[JOB], copy.run_id) == ("7", run_id)
    assert [found.uri for found in versions_of_jobs(store.registry.search())[7, run_id]] == [version.uri]
    assert [found.uri for found in store.registry.of_job("pricer", 7, run_id)] == [version.uri]
    store.client.delete_model_version("pricer", "1")
    assert versions_of_jobs(store.registry.search()) == {}
    assert store.registry.of_job(name, 7, run_id) == []
