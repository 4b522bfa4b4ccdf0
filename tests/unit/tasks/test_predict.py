"""Predict jobs, done by a worker's loop whose child is a thread: the real commands over a tiny base."""

from __future__ import annotations

import json
from contextlib import contextmanager

import mlflow
import pytest
import torch
from click.testing import CliRunner
from helpers.flavored import make_versions
from helpers.inline_worker import Listener, inline_worker

import rankwise.flavor as flavor
from rankwise.assets.base import resolve_base
from rankwise.cli.jobs import open_queue
from rankwise.cli.main import cli
from rankwise.exceptions import ConfigError, RankwiseError
from rankwise.inference.file_prediction import predict_file
from rankwise.inference.shards import Parts, Request
from rankwise.jobs.job import JobKind, JobState
from rankwise.modeling.decoding.generation import Decoding
from rankwise.settings import Settings
from rankwise.tasks.base_holder import BaseHolder
from rankwise.tasks.session import StoppableReporter
from rankwise.worker.loop import LoopOptions
from rankwise.worker.relay import RemoteReporter

ROWS = 11
REQUEST = Request(
    models=("models:/one@champion",),
    decoding=Decoding(max_new_tokens=4, temperature=1.0),
    shard_rows=2,
    batch_size=3,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    return make_versions(tmp_path_factory.mktemp("predict-jobs"))


@pytest.fixture(autouse=True)
def _environment(world, monkeypatch, tmp_path):
    """A queue of its own for each test; the registry is shared."""
    world.enter(monkeypatch)
    monkeypatch.setenv("RANKWISE_DATABASE_URL", f"sqlite:///{tmp_path / 'queue.db'}")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"carat {at}, cut Ideal", "model": f"models:/one/{1 + at % 2}"} for at in range(ROWS)]
    lines[4] = {"prompt": {}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def local(world, rows, tmp_path):
    """What the local command makes of the rows."""
    output = tmp_path / "local.jsonl"
    predict_file(REQUEST, rows, output, settings=world.settings, tracking_uri=world.settings.tracking_uri)
    return output.read_bytes()


def said(arguments, code):
    """What a command tells people, or the error that it ends with; its exit code must be `code`."""
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if isinstance(done.exception, RankwiseError):
        assert done.exception.exit_code == code
        return str(done.exception)
    assert done.exception is None
    assert done.return_value == code
    return done.stderr


def submit(*arguments, code=0, **request):
    """`rankwise predict --submit`; what it tells people."""
    values = {"model": "models:/one@champion", "max-new-tokens": 4, "temperature": 1.0, "shard-rows": 2, **request}
    options = [f"--{name}={value}" for name, value in values.items()]
    return said(["predict", *options, "--submit", *map(str, arguments)], code)


def jobs(*, joins=True):
    with open_queue() as queue:
        return [job for job in queue.jobs(kinds=[JobKind.PREDICT]) if joins or job.spec["span"] is not None]


@contextmanager
def worker(world, listener=None):
    with inline_worker(Settings.load(), listener or Listener()) as loop:
        yield loop


def drain(world):
    listener = Listener()
    with worker(world, listener) as loop:
        loop.work(LoopOptions(drain=True))
    return listener.told


def test_jobs_make_the_file_that_the_local_command_makes(world, rows, local, tmp_path):
    output = tmp_path / "out.jsonl"
    told = submit("--shards=3", "--priority=2", rows, output)
    assert "models:/one@champion is models:/one/1" in told
    assert "11 rows in 3 jobs and one that writes out.jsonl, 4 pending" in told
    queued = jobs()
    assert [(job.spec["span"], job.priority) for job in queued] == [([0, 2], 2), ([2, 4], 2), ([4, 6], 2), (None, 2)]
    assert queued[0].spec["manifest"]["models"]["models:/one@champion"] == "models:/one/1"
    assert queued[0].spec["manifest"]["adapters"]["models:/one/1"].startswith("sha256:")
    submit("--shards=9", rows, output)
    assert jobs() == queued, "the same command again adds nothing"

    mlflow.MlflowClient(world.settings.tracking_uri).set_registered_model_alias("one", "champion", "2")
    try:
        told = drain(world)
    finally:
        mlflow.MlflowClient(world.settings.tracking_uri).set_registered_model_alias("one", "champion", "1")
    assert output.read_bytes() == local
    assert {(job.state, job.attempts) for job in jobs()} == {(JobState.SUCCEEDED, 1)}
    assert [job.result["rows"] for job in jobs()] == [4, 4, 3, 11]
    result = jobs()[-1].result
    assert result["failed"] == 1
    client = mlflow.MlflowClient(world.settings.tracking_uri)
    shown = client.get_run(result["run_id"])
    assert (shown.info.run_name, shown.info.status) == ("out.jsonl", "FINISHED")
    assert shown.data.params["models"] == "models:/one/1, models:/one/2"
    assert shown.data.metrics["predict.rows"] == 11
    assert shown.data.metrics["predict.completion_tokens"] == result["completion_tokens"] > 0
    assert [each.dataset.name for each in shown.inputs.dataset_inputs] == ["rows.jsonl"]
    versions = client.search_model_versions("name = 'one'")
    assert {each.model_id for each in shown.inputs.model_inputs} == {
        each.source.rpartition("/")[2] for each in versions
    }
    assert sum(line.startswith("base: ") for line in told) == 1, "one load of the base for three jobs"
    assert sorted(path.name for path in tmp_path.glob("*out.jsonl*")) == ["out.jsonl"]

    assert "nothing to do" in submit("--shards=3", rows, output)
    assert len(jobs()) == 4
    output.unlink()
    submit("--shards=2", rows, output)
    drain(world)
    assert output.read_bytes() == local
    assert len(jobs()) == 7, "an output that is gone is made anew"
    output.write_text("mine")
    assert "already exists" in submit(rows, output, code=2)
    assert output.read_text() == "mine"


def test_a_queued_prediction_shows_in_listings_and_statuses_and_watching_ends_with_it(world, rows, local, tmp_path):
    output = tmp_path / "out.jsonl"
    submit(rows, output)
    drain(world)
    # All has been done: watching ends at once, and one row has an error.
    told = submit("--watch", rows, output, code=1)
    assert "10 of 11 rows answered" in told
    shown = CliRunner().invoke(cli, ["jobs", "show", "1", "--json"])
    attempt = json.loads(shown.stdout)["history"][0]
    assert attempt["outcome"] == "succeeded"
    listed = json.loads(CliRunner().invoke(cli, ["jobs", "list", "--json", "--kind", "predict"]).stdout)["jobs"]
    assert [job["state"] for job in listed] == ["succeeded", "succeeded"]


def test_an_input_that_has_changed_is_refused(world, rows, tmp_path):
    submit("--shards=2", rows, tmp_path / "out.jsonl")
    rows.write_text(rows.read_text().replace("Ideal", "Good", 1))
    drain(world)
    first, second, join = jobs()
    assert (first.state, second.state, join.state) == (JobState.FAILED, JobState.FAILED, JobState.CANCELLED)
    assert first.attempts == 1, "trying again cannot help"
    assert "has changed since it was submitted (it was sha256:" in first.error
    assert join.error == f"{first.title} failed", "the whole says which part has failed"
    assert "input was 'sha256:" in submit("--shards=2", rows, tmp_path / "out.jsonl", code=2)
    submit("--restart", rows, tmp_path / "out.jsonl")
    drain(world)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == ROWS


def test_a_part_reads_none_of_the_rows_before_it_and_the_output_needs_all_of_them(world, rows, local, tmp_path):
    output = tmp_path / "out.jsonl"
    submit("--shards=2", rows, output)
    content = rows.read_text()
    with worker(world) as loop:
        loop._iterate(LoopOptions(max_arms=1))
        rows.write_text(content.replace("carat 0", "carat 9"))
        loop.work(LoopOptions(drain=True))
    first, second, join = jobs()
    assert (first.state, second.state, join.state) == (JobState.SUCCEEDED, JobState.SUCCEEDED, JobState.FAILED)
    assert "has changed since it was submitted (it was sha256:" in join.error
    assert "restore it and retry the job" in join.error
    assert not output.exists()
    rows.write_text(content)
    with open_queue() as queue:
        queue.retry([join.id])
    drain(world)
    assert output.read_bytes() == local


def test_a_prediction_of_a_release_without_an_index_goes_on(world, rows, local, tmp_path, caplog):
    output = tmp_path / "out.jsonl"
    submit("--shards=3", rows, output)
    index = Parts(output).directory / "index.json"
    content = index.read_bytes()
    index.unlink()
    with caplog.at_level("INFO", logger="rankwise.inference.file_prediction"):
        drain_once(world)
    assert "has no index of its input; reading the whole input once" in caplog.text
    assert index.read_bytes() == content, "the jobs behind it have one again"
    index.write_text("[]")
    drain(world)
    assert output.read_bytes() == local


def test_without_an_index_a_changed_input_is_refused_too(world, rows, tmp_path):
    output = tmp_path / "out.jsonl"
    submit("--shards=2", rows, output)
    (Parts(output).directory / "index.json").unlink()
    rows.write_text(rows.read_text().replace("carat 0", "carat 9"))
    drain(world)
    assert [job.state for job in jobs(joins=False)] == [JobState.FAILED, JobState.FAILED]
    assert "has changed since it was submitted" in jobs()[1].error


def test_paths_that_the_worker_does_not_see_are_named(world, rows, tmp_path):
    submit(rows, tmp_path / "out.jsonl")
    rows.rename(tmp_path / "elsewhere.jsonl")
    drain_once(world)
    assert "does not exist on this machine" in jobs()[0].error
    assert "every worker must see INPUT and OUTPUT" in jobs()[0].error
    (tmp_path / "elsewhere.jsonl").rename(rows)
    Parts(tmp_path / "out.jsonl").remove()
    with open_queue() as queue:
        queue.cancel([jobs()[0].id])
        queue.retry([jobs()[0].id])
    drain_once(world)
    assert "out.jsonl.parts does not exist here" in jobs()[0].error


def test_a_worker_with_a_data_root_touches_nothing_outside_of_it(world, rows, tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    submit(rows, tmp_path / "shared" / "out.jsonl")
    monkeypatch.setenv("RANKWISE_DATA_ROOT", str(tmp_path / "shared"))
    drain(world)
    assert "INPUT: " in jobs()[0].error
    assert "outside of RANKWISE_DATA_ROOT" in jobs()[0].error
    told = submit("--restart", rows, tmp_path / "shared" / "out.jsonl", code=2)
    assert told.startswith(f"INPUT: {rows} is outside of RANKWISE_DATA_ROOT"), "said at once where it is known"
    assert len(jobs()) == 2


def drain_once(world):
    """One attempt of the first job."""
    with worker(world) as loop:
        loop._iterate(LoopOptions(max_arms=1))


def test_what_was_cut_off_goes_on_at_the_next_shard(world, rows, local, tmp_path, monkeypatch):
    submit(rows, tmp_path / "out.jsonl")
    write = Parts.write
    written = []

    def killed_at_the_third(self, shard, answers):
        if len(written) == 2:
            written.append(None)
            raise RuntimeError("boom")
        write(self, shard, answers)
        written.append(shard)

    monkeypatch.setattr(Parts, "write", killed_at_the_third)
    drain_once(world)
    (answering, _) = jobs()
    assert (answering.state, answering.failures) == (JobState.QUEUED, 1)
    assert "boom" in answering.error
    with open_queue() as queue:
        queue.cancel([answering.id])
        queue.retry([answering.id])
    drain(world)
    assert written == [0, 1, None, 2, 3, 4, 5]
    assert jobs()[0].result["reused"] == 4
    assert (tmp_path / "out.jsonl").read_bytes() == local


def test_cancelling_reaches_a_job_between_two_batches(world, rows, tmp_path, monkeypatch):
    submit(rows, tmp_path / "out.jsonl")
    moved = StoppableReporter.moved
    seen = []

    def cancel(self, description, done, total):
        seen.append(done)
        with open_queue() as queue:
            queue.cancel([1])
        # The heartbeat hears of it within two seconds.
        self._session.claims._cancelled = frozenset(self._tokens)
        moved(self, description, done, total)

    monkeypatch.setattr("rankwise.tasks.predict._ShardProgress.moved", cancel)
    drain(world)
    assert [job.state for job in jobs()] == [JobState.CANCELLED, JobState.CANCELLED]
    assert len(seen) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_with_fail_fast_the_others_are_cancelled(world, rows, tmp_path):
    submit("--shards=6", "--fail-fast", rows, tmp_path / "out.jsonl")
    drain(world)
    states = [job.state for job in jobs(joins=False)]
    assert states == [*[JobState.SUCCEEDED] * 2, JobState.FAILED, *[JobState.CANCELLED] * 3]
    failed, join = jobs()[2], jobs()[-1]
    assert "--fail-fast: row 4: column 'prompt' holds a mapping" in failed.error
    assert (failed.attempts, join.error) == (1, f"{failed.title} failed")


def test_local_work_and_jobs_do_not_mix_unasked(world, rows, local, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    write = Parts.write
    monkeypatch.setattr(Parts, "write", lambda self, shard, answers: shard < 2 and write(self, shard, answers))
    with pytest.raises(ConfigError, match="has 0 answers for 2 rows"):
        predict_file(REQUEST, rows, output, settings=world.settings, tracking_uri=world.settings.tracking_uri)
    monkeypatch.setattr(Parts, "write", write)
    submit(rows, output)
    drain_once(world)
    assert jobs()[0].result["reused"] == 4, "what a local command has begun is gone on with"
    with pytest.raises(ConfigError, match="belongs to queued jobs"):
        predict_file(REQUEST, rows, output, settings=world.settings, tracking_uri=world.settings.tracking_uri)
    drain(world)
    assert output.read_bytes() == local


def predict_here(*arguments, code=0):
    """`rankwise predict` without --submit; what it tells people."""
    options = ["--model=models:/one@champion", "--max-new-tokens=4", "--temperature=1.0", "--shard-rows=2"]
    return said(["predict", *options, *map(str, arguments)], code)


def test_a_worker_that_has_not_heard_of_a_restart_writes_nothing_that_counts(world, rows, local, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    submit("--seed=7", rows, output)
    write = Parts.write
    written = []

    def late(self, shard, answers):
        if not written:
            submit("--restart", rows, output)
        written.append(shard)
        write(self, shard, answers)

    monkeypatch.setattr(Parts, "write", late)
    drain_once(world)
    assert written == [0]
    assert len(list((tmp_path / "out.jsonl.parts").glob("shard-*"))) == 1
    drain(world)
    assert [job.state for job in jobs(joins=False)] == [JobState.CANCELLED, JobState.SUCCEEDED]
    assert jobs(joins=False)[-1].result["reused"] == 0
    assert output.read_bytes() == local


def test_a_worker_whose_directory_is_taken_away_stops(world, rows, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    submit(rows, output)
    write = Parts.write

    def taken(self, shard, answers):
        write(self, shard, answers)
        self.remove()

    monkeypatch.setattr(Parts, "write", taken)
    drain_once(world)
    assert jobs()[0].state is JobState.FAILED
    assert "was removed, or taken by another prediction" in jobs()[0].error
    assert not Parts(output).directory.exists()


def test_a_local_command_leaves_to_jobs_what_they_have_not_ended(world, rows, local, tmp_path):
    output = tmp_path / "out.jsonl"
    submit(rows, output)
    assert "rankwise predict --submit --restart, or cancel the jobs" in predict_here("--restart", rows, output, code=2)
    assert Parts(output).manifest() is not None
    with open_queue() as queue:
        queue.cancel([job.id for job in jobs()])
    assert "--restart discards" in predict_here(rows, output, code=2)
    predict_here("--batch-size=3", "--restart", rows, output, code=1)
    assert output.read_bytes() == local


def test_a_directory_that_was_left_behind_is_in_nobodys_way(world, rows, local, tmp_path):
    output = tmp_path / "out.jsonl"
    parts = Parts(output)
    parts.directory.mkdir()
    (parts.directory / "shard-000000.jsonl").write_text('{"text": "of nobody"}\n' * 2)
    submit(rows, output)
    with parts.locked():
        drain(world)
        assert parts.manifest() is not None, "whoever holds it is at it"
    assert output.read_bytes() == local
    assert "already exists" in predict_here(rows, output, code=2)
    assert not parts.directory.exists()


def test_a_warm_base_serves_evaluation_and_prediction_and_one_with_other_dtypes_is_loaded_as_recorded(
    world, rows, tmp_path, monkeypatch
):
    settings = Settings.load()
    holder = BaseHolder(settings, RemoteReporter(lambda message: None, width=80, terminal=False))
    resolved = resolve_base(str(world.base_path), None, settings)
    uri = settings.tracking_uri
    base = holder.get(resolved, world.load_base().quantization, "auto")
    (adapter,) = flavor.load_models(["models:/one/1"], settings=settings, find=holder.recorded, tracking_uri=uri)
    assert adapter.base is base
    assert adapter.overrides == ()
    monkeypatch.setattr("rankwise.tasks.base_holder.loads_plainly", lambda first, resolved: False)
    (again,) = flavor.load_models(["models:/one/1"], settings=settings, find=holder.recorded, tracking_uri=uri)
    assert again.base is not base
    assert again.overrides == ()
