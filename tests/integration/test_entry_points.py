"""The same rows through every entry point give the same prompts: files in training, evaluation and prediction, queued
jobs, the Python API, pyfunc, and MLflow's HTTP server."""

from __future__ import annotations

import csv
import datetime
import json

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.flavored import make_world
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import rankwise.flavor as flavor
from rankwise.assets.dataset import resolve_data
from rankwise.data.prompting import Reading
from rankwise.data.rows import load_examples
from rankwise.data.template import Renderer
from rankwise.data.values import text_of
from rankwise.experiment.schema import DatasetSpec
from rankwise.flavor import pyfunc
from rankwise.inference import Predictor, predictor
from rankwise.inference.file_prediction import predict_file
from rankwise.inference.shards import Manifest, Request
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.modeling.decoding.scheduler import Generation
from rankwise.reporter import SILENT
from rankwise.tasks.predict import PredictWork

TEMPLATE = "{word}|{count}|{count:06d}|{size}|{size:.2f}|{flag}|{day}|{day:%d.%m.%Y}[[ ({note})]]"
DATASET = {"prompt": TEMPLATE, "completion": "{answer}", "na_values": ("-999",)}
TYPES = pa.schema(
    [
        ("word", pa.string()),
        ("count", pa.int64()),
        ("size", pa.float64()),
        ("flag", pa.bool_()),
        ("day", pa.date32()),
        ("note", pa.string()),
        ("answer", pa.string()),
    ]
)
# A word in a cell of CSV is never empty; everything else may be in it.
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8) | st.sampled_from(
    ["01067", " 5", "NA", "None", "null", "n/a", "nan", "true", "1.50", "2024-01-07", "-999", 'say "hi", twice', "a\nb"]
)
ROW = st.fixed_dictionaries(
    {
        "word": WORDS | st.none(),
        "count": st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, -999]) | st.none(),
        "size": st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, 1.0, 12.5]) | st.none(),
        "flag": st.booleans(),
        "day": st.dates(datetime.date(1000, 1, 1)),
        "note": WORDS | st.none(),
        "answer": st.just("x"),
    }
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    world = make_world(tmp_path_factory.mktemp("entry-points"))
    reading = Reading.of(DatasetSpec(train="rows", **DATASET))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    flavor.log_adapter(world.adapter, world.load_base(), registered_model_name="one", reading=reading)
    yield world
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def loaded(world):
    with Predictor.load(["models:/one/1"], settings=world.settings, device="cpu") as loaded:
        yield loaded, mlflow.pyfunc.load_model("models:/one/1")


@pytest.fixture
def asked(world, monkeypatch):
    """The rendered prompts, in the order in which they were asked; nothing is generated."""
    texts = []

    def record(tokenizer, prompts):
        texts.extend(tokenizer.decode(list(prompt.token_ids)) for prompt in prompts)
        empty = Generation(text="", token_ids=(), finish_reason="stop", prompt_tokens=0)
        return [(index, empty) for index in range(len(prompts))]

    def each(base, prompts, decoding, *, tokenizer, batch_size):
        return record(tokenizer, prompts)

    def everything(base, prompts, decoding, *, tokenizer, batch_size):
        return [generation for _, generation in record(tokenizer, prompts)]

    world.enter(monkeypatch)
    monkeypatch.setattr(predictor, "generate_each", each)
    monkeypatch.setattr(pyfunc, "generate", everything)
    return texts


def is_missing(row):
    return any(row[name] is None or text_of(row[name]) == "-999" for name in ("word", "count", "size"))


def as_json(row):
    """JSON has no dates: their text is what training reads too."""
    return {name: value.isoformat() if isinstance(value, datetime.date) else value for name, value in row.items()}


def write(directory, rows):
    """The rows as files of every type."""
    cells = [{name: "" if value is None else text_of(value) for name, value in row.items()} for row in rows]
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (directory / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, TYPES.names, delimiter=delimiter)
            writer.writeheader()
            writer.writerows(cells)
    lines = [json.dumps(as_json(row)) for row in rows]
    (directory / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (directory / "rows.ndjson").write_text("\n".join(lines), encoding="utf-8")
    (directory / "rows.json").write_text(json.dumps([as_json(row) for row in rows], indent=1), encoding="utf-8")
    table = pa.Table.from_pylist(rows, TYPES)
    pq.write_table(table, directory / "rows.parquet")
    with pa.ipc.new_file(str(directory / "rows.arrow"), TYPES) as writer:
        writer.write_table(table)
    return [directory / f"rows.{suffix}" for suffix in ("csv", "tsv", "jsonl", "ndjson", "json", "parquet", "arrow")]


def trained(world, renderer, path, side):
    """Prompts in training, or of `evaluate --data` and `promote --data`; rows without a value are left out."""
    dataset = DatasetSpec(train=str(path), **DATASET)
    data = resolve_data(str(path), None, world.settings)
    sources = ([data], None) if side == "train" else (None, [data])
    examples = load_examples(replace_eval(dataset, path), *sources, renderer, world.settings)
    return [example.prompt for example in getattr(examples, side)]


def replace_eval(dataset, path):
    return dataset.model_copy(update={"eval": str(path)})


def queued(world, loaded, path, output):
    """Answers of the jobs of a queued prediction, whose payload has been in a database."""
    from rankwise.inference.file_prediction import Prediction, answer_shards, plan
    from rankwise.inference.shards import Parts
    from rankwise.inference.source import Source

    request = Request(models=("models:/one/1",), shard_rows=2)
    source, parts = Source(path, world.settings), Parts(output, "whole")
    manifest = plan(request, source, output, parts, None, world.settings.tracking_uri, SILENT)
    prediction = Prediction(request=request, manifest=manifest, source=path, output=output, whole="whole")
    new = PredictWork(prediction=prediction, span=(0, manifest.shards), host="here").job(priority=0)
    spec = json.loads(json.dumps(new.spec))
    job = Job(id=1, kind=JobKind.PREDICT, experiment="x", spec_hash=new.spec_hash, spec=spec, state=JobState.RUNNING)
    work = PredictWork.of(job)
    assert isinstance(work.prediction.manifest, Manifest)
    opened = work.prediction.open(world.settings, SILENT)
    part = work.prediction.shard_work(range(*work.span))
    answers = []
    answer_shards(work.prediction, part, opened, loaded, lambda shard, made: answers.extend(made))
    work.prediction.parts.remove()
    return answers


def table(rows):
    """A table as pandas makes it with types that can lack a value."""
    frame = pd.DataFrame([{**row, "count": row["count"]} for row in rows], dtype=object)
    return frame.astype({"count": "Int64", "flag": "boolean", "size": "float64"})


@settings(
    max_examples=8,
    deadline=None,
    database=None,
    # An example takes seconds, and shrinking one hundreds of them.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(ROW, min_size=3, max_size=6))
def test_every_entry_point_asks_what_training_taught(world, loaded, asked, tmp_path_factory, rows):
    rows = [{**rows[0], "word": "w", "count": 7, "size": 2.0}, *rows]
    directory = tmp_path_factory.mktemp("rows")
    here, stored = loaded
    renderer = Renderer.create(here.adapters["models:/one/1"].tokenizer, base=world.base_path)
    complete = [row for row in rows if not is_missing(row)]
    paths = write(directory, rows)
    wanted = trained(world, renderer, paths[0], "train")
    assert len(wanted) == len(complete)
    assert f"w|7|000007|2.0|2.00|{'true' if rows[0]['flag'] else 'false'}|{rows[0]['day'].isoformat()}|" in wanted[0]

    # Through the tokenizer and back, as the recorded prompts are.
    expected = [renderer.tokenizer.decode(list(ids)) for ids in renderer.tokens(wanted)]

    def check(name):
        assert asked == expected, name
        asked.clear()

    for path in paths:
        for side in ("train", "eval"):
            assert trained(world, renderer, path, side) == wanted, (path.name, side)
        output = directory / f"{path.name}.out.jsonl"
        summary = predict_file(
            Request(models=("models:/one/1",), shard_rows=2), path, output, settings=world.settings, restart=True
        )
        assert summary.failed == len(rows) - len(complete), path.name
        check(f"predict {path.name}")
        answers = queued(world, here, path, output.with_suffix(".queued.jsonl"))
        assert sum(answer.error is not None for answer in answers) == len(rows) - len(complete)
        check(f"queued {path.name}")
    here.predict(rows)
    check("dicts")
    here.predict(table(rows))
    check("pandas")
    list(here.stream(map(as_json, rows)))
    check("stream")

    # These refuse the whole input if one row lacks a value.
    if len(complete) < len(rows):
        with pytest.raises(Exception, match=r"row \d+: column '\w+' has no value"):
            stored.predict(rows)
    for name, data in (
        ("pyfunc: dicts", complete),
        ("pyfunc: pandas", table(complete)),
        ("pyfunc: a dict of lists", {key: [row[key] for row in complete] for key in TYPES.names}),
    ):
        stored.predict(data)
        check(name)
    for row in complete:
        stored.predict(row)
    check("pyfunc: a dict")
    # Late: MLflow warns when it is imported before the flavor.
    from mlflow.pyfunc.scoring_server import invocations

    plain = [as_json(row) for row in complete]
    columns = list(TYPES.names)
    values = [[row[name] for name in columns] for row in plain]
    for form, body in (("inputs", plain), ("dataframe_split", {"columns": columns, "data": values})):
        if form == "dataframe_split" and any(abs(row["size"]) > 2**53 for row in plain):
            continue  # A table of whole numbers only is made of them by pandas' JSON reader.
        response = invocations(json.dumps({form: body}), "application/json", stored, None)
        assert response.status == 200, response.response
        check(f"HTTP {form}")
