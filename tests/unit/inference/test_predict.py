"""Files in, files out, over a tiny base with two stored adapters."""

from __future__ import annotations

import json
import sys

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from helpers.flavored import make_versions

from rankwise.cli.predict import predict
from rankwise.exceptions import AdapterIntegrityError, AssetError, ConfigError, JobError, StorageError
from rankwise.inference import Predictor, source
from rankwise.inference.file_prediction import predict_file
from rankwise.inference.shards import Parts, Request
from rankwise.modeling.decoding.generation import Decoding

PROMPTS = ["a", "carat 0.23, cut Ideal", "0 1 2", "Price", "How much is this diamond?", "b c d e f g", "user"]
SHORT = Decoding(max_new_tokens=5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    return make_versions(tmp_path_factory.mktemp("predict"))


@pytest.fixture(autouse=True)
def _home(world, monkeypatch):
    world.enter(monkeypatch)


@pytest.fixture
def rows(tmp_path):
    """Rows of both versions by turns; row 3 names none."""
    path = tmp_path / "rows.jsonl"
    models = ["models:/one@champion", "models:/one/2"]
    lines = [{"prompt": text, "model": models[at % 2], "note": at} for at, text in enumerate(PROMPTS)]
    lines[3]["model"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(world, rows, output, **changes):
    values = {"models": ("models:/one@champion",), "decoding": SHORT, "shard_rows": 2}
    options = {name: changes.pop(name) for name in ("overwrite", "restart") if name in changes}
    return predict_file(
        Request(**{**values, **changes}),
        rows,
        output,
        settings=world.settings,
        tracking_uri=world.settings.tracking_uri,
        **options,
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_has_its_own_adapter_s_answer_and_says_where_it_comes_from(world, rows, tmp_path):
    summary = run(world, rows, tmp_path / "out.jsonl")
    assert (summary.rows, summary.failed, summary.reused) == (7, 0, 0)
    assert summary.models == {"models:/one@champion": "models:/one/1", "models:/one/2": "models:/one/2"}
    out = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in out] == list(range(7))
    assert [row["note"] for row in out] == list(range(7))
    assert [row["model"] for row in out] == [f"models:/one/{v}" for v in (1, 2, 1, 1, 1, 2, 1)]
    assert out[3]["input.model"] is None
    assert {row["version"] for row in out} == {"1", "2"}
    assert len({row["adapter_sha256"] for row in out}) == 2
    assert all(row["finish_reason"] in {"stop", "length"} for row in out)
    assert all(0 < row["completion_tokens"] <= 5 for row in out)
    assert summary.completion_tokens == sum(row["completion_tokens"] for row in out)
    assert len({row["base_fingerprint"] for row in out}) == 1
    # Each alone, by MLflow's own way, gives the same text.
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    for version in ("1", "2"):
        alone = mlflow.pyfunc.load_model(f"models:/one/{version}")
        mine = [row for row in out if row["version"] == version]
        assert alone.predict([row["prompt"] for row in mine], params={"max_new_tokens": 5}) == [
            row["text"] for row in mine
        ]
    assert len({row["text"] for row in out}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batches_and_shards_change_no_answer(world, rows, tmp_path, temperature):
    decoding = Decoding(max_new_tokens=5, temperature=temperature)
    run(world, rows, tmp_path / "a.jsonl", decoding=decoding, batch_size=1, shard_rows=3)
    run(world, rows, tmp_path / "b.jsonl", decoding=decoding, batch_size=16, shard_rows=100)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


OPENED = []
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet"])
def test_the_input_is_opened_once(world, rows, tmp_path, output):
    OPENED.clear()
    run(world, rows, tmp_path / output)
    assert OPENED.count(str(rows)) == 1


def test_an_input_that_is_too_large_to_hold_gives_the_same_output(world, rows, tmp_path, monkeypatch):
    run(world, rows, tmp_path / "held.jsonl")
    monkeypatch.setattr(source, "HELD_BYTES", 0)
    run(world, rows, tmp_path / "read.jsonl")
    assert (tmp_path / "read.jsonl").read_bytes() == (tmp_path / "held.jsonl").read_bytes()


def test_an_input_that_changes_while_it_is_worked_on_is_refused(world, rows, tmp_path, monkeypatch):
    write = Parts.write

    def change(self, shard, answers):
        write(self, shard, answers)
        rows.write_text(rows.read_text().replace("Price", "Prize"))

    monkeypatch.setattr(Parts, "write", change)
    with pytest.raises(AssetError, match=r"rows\.jsonl changed during the prediction; start over with --restart"):
        run(world, rows, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_another_seed_samples_other_answers(world, rows, tmp_path):
    decoding = Decoding(max_new_tokens=5, temperature=5.0)
    run(world, rows, tmp_path / "a.jsonl", decoding=decoding)
    run(world, rows, tmp_path / "b.jsonl", decoding=decoding, seed=1)
    assert [row["text"] for row in read(tmp_path / "a.jsonl")] != [row["text"] for row in read(tmp_path / "b.jsonl")]


def test_what_was_cut_off_goes_on_with_the_versions_it_began_with(world, rows, tmp_path, monkeypatch):
    run(world, rows, tmp_path / "whole.jsonl")
    written = []
    write = Parts.write

    def fail_at_the_third(self, shard, answers):
        if len(written) == 2:
            raise StorageError("the disk is full")
        write(self, shard, answers)
        written.append(shard)

    monkeypatch.setattr(Parts, "write", fail_at_the_third)
    with pytest.raises(StorageError):
        run(world, rows, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr(Parts, "write", write)
    client = mlflow.MlflowClient(world.settings.tracking_uri)
    client.set_registered_model_alias("one", "champion", "2")
    try:
        summary = run(world, rows, tmp_path / "out.jsonl")
    finally:
        client.set_registered_model_alias("one", "champion", "1")
    assert summary.reused == 4
    assert summary.models["models:/one@champion"] == "models:/one/1"
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl", "whole.jsonl"]


def test_cut_off_between_the_output_and_the_end(world, rows, tmp_path, monkeypatch):
    remove = Parts.remove

    def killed(self):
        if self.output.exists():
            raise KeyboardInterrupt
        remove(self)

    monkeypatch.setattr(Parts, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        run(world, rows, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.setattr(Parts, "remove", remove)
    assert run(world, rows, tmp_path / "out.jsonl").reused == 7
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert not (tmp_path / "out.jsonl.parts").exists()


@pytest.fixture
def begun(world, rows, tmp_path, monkeypatch):
    """A prediction that has answered nothing yet, as its manifest says; the manifest's file."""
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", lambda *_: (_ for _ in ()).throw(StorageError("full")))
        with pytest.raises(StorageError):
            run(world, rows, tmp_path / "out.jsonl")
    return tmp_path / "out.jsonl.parts" / "manifest.json"


@pytest.mark.usefixtures("begun")
def test_another_request_does_not_go_on_where_the_first_was(world, rows, tmp_path):
    with pytest.raises(ConfigError, match=r"other settings \(max_new_tokens was 5, is 4\).*--restart"):
        run(world, rows, tmp_path / "out.jsonl", decoding=Decoding(max_new_tokens=4))
    assert run(world, rows, tmp_path / "out.jsonl", decoding=Decoding(max_new_tokens=4), restart=True).reused == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda begun: begun["adapters"].update({"models:/one/2": "sha256:0"}),
            AdapterIntegrityError,
            r"models:/one/2 has changed: its manifest is .+, the prediction started with sha256:0; start over",
        ),
        (
            lambda begun: begun.update(format_version=99),
            ConfigError,
            r"has format 99, this release reads \d+: finish it",
        ),
    ],
    ids=["other files of a version", "another release"],
)
def test_what_began_otherwise_is_not_gone_on_with(world, rows, tmp_path, begun, change, error, message):
    document = json.loads(begun.read_text())
    change(document)
    begun.write_text(json.dumps(document))
    with pytest.raises(error, match=message):
        run(world, rows, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_is_there_is_not_replaced_unasked(world, rows, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"already exists.*--overwrite"):
        run(world, rows, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    assert not (tmp_path / "out.jsonl.parts").exists()
    run(world, rows, tmp_path / "out.jsonl", overwrite=True)
    assert len(read(tmp_path / "out.jsonl")) == 7
    with pytest.raises(ConfigError, match="is the same file as the input"):
        run(world, rows, rows)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.jsonl is a directory"):
        run(world, rows, tmp_path / "folder.jsonl", overwrite=True)


def test_rows_that_cannot_be_answered_say_why_in_their_place(world, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "a", "id": "good"}
    bad = [{"prompt": {}}, {"prompt": "x " * 5000}, {"messages": [{"role": "nobody", "content": 1}]}, {"ask": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, *bad]) + "no json\n" + json.dumps(good) + "\n")
    summary = run(world, path, tmp_path / "out.jsonl")
    assert summary.failed == 5
    out = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in out] == ["good", 1, 2, 3, 4, 5, "good"]
    assert out[0]["text"] == out[6]["text"]
    assert ["error" in row for row in out] == [False, True, True, True, True, True, False]
    assert all("text" not in row for row in out if "error" in row)
    assert "column 'prompt' holds a mapping, of which a template makes no text" in out[1]["error"]
    assert "positions of the base" in out[2]["error"]
    with pytest.raises(JobError, match="row 1: column 'prompt' holds a mapping"):
        run(world, path, tmp_path / "other.jsonl", fail_fast=True)


def test_models_that_are_not_there_are_named_together_before_anything_is_loaded(world, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "model": "models:/two/1"}\n{"prompt": "b", "model": "what"}\n')
    with pytest.raises(ConfigError) as caught:
        run(world, path, tmp_path / "out.jsonl")
    assert "models:/two/1 (named by 1 rows): " in str(caught.value)
    assert "what (named by 1 rows): " in str(caught.value)
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match=r"1 of 1 rows name no model in a column 'model'; .*--model"):
        run(world, path, tmp_path / "other.jsonl", models=())


def test_every_format_into_every_other(world, rows, tmp_path):
    run(world, rows, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[0].split(",")[:3] == ["id", "text", "finish_reason"]
    csv = tmp_path / "rows.csv"
    csv.write_text("id,prompt,carat\n7,a,0.5\n8,,1\n", encoding="utf-8-sig")
    with pytest.raises(ConfigError, match=r"--prompt.*karat.*carat"):
        run(world, csv, tmp_path / "b.parquet", prompt="{prompt} {karat}")
    run(world, csv, tmp_path / "b.parquet", prompt="{prompt} {carat:.2f}", restart=True)
    table = pq.read_table(tmp_path / "b.parquet")
    assert table["id"].to_pylist() == ["7", "8"]
    assert table["error"].to_pylist() == [None, "column 'prompt' has no value, and the prompt needs it"]
    assert table["prompt"].to_pylist() == ["a", ""], "as it was written"
    assert table["carat"].to_pylist() == ["0.5", "1"]
    run(world, tmp_path / "b.parquet", tmp_path / "c.jsonl", prompt="{carat}")
    again = read(tmp_path / "c.jsonl")
    assert [row["input.text"] for row in again] == table["text"].to_pylist()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"prompt": "a", "x": 1}\n{"prompt": "b", "x": "y"}\n')
    with pytest.raises(ConfigError, match=r"column 'x' has mixed types.*write \.jsonl"):
        run(world, mixed, tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("cells", "output", "message"),
    [
        ([b"x", None], "out.jsonl", r"'x' holds bytes, which \.jsonl cannot store; write \.parquet"),
        ([["a"], [1]], "out.parquet", r"'x' has mixed types.*write \.jsonl"),
    ],
)
def test_what_the_output_could_not_hold_is_refused_before_a_row_is_answered(
    world, tmp_path, monkeypatch, cells, output, message
):
    monkeypatch.setattr(Predictor, "load", lambda *args, **options: pytest.fail("an adapter was loaded"))
    rows = [{"prompt": "a", "x": cell} for cell in cells]
    if output.endswith(".jsonl"):
        source = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=message):
        run(world, source, tmp_path / output)


def test_what_was_answered_before_keeps_all_its_columns_when_it_is_answered_again(world, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "text": "1", "input.text": "2", "input.input.text": "3"}) + "\n")
    run(world, path, tmp_path / "out.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    assert row["text"] not in {"1", "2", "3"}
    assert {name: value for name, value in row.items() if name.endswith(".text")} == {
        "input.text": "2", "input.input.text": "3", "input.input.input.text": "1"
    }  # fmt: skip


def test_a_line_that_is_no_row_does_not_spoil_a_parquet_column_of_ids(world, tmp_path):
    csv = tmp_path / "rows.csv"
    csv.write_text("id,prompt\nr1,a\nr2\nr3,b\n")
    summary = run(world, csv, tmp_path / "out.parquet")
    assert summary.failed == 1
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == ["r1", "1", "r3"]


def test_half_a_character_spoils_its_own_row_only(world, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a \\ud83d"}\n{"prompt": "a"}\n')
    assert run(world, path, tmp_path / "out.jsonl").failed == 1
    assert "an unpaired surrogate" in read(tmp_path / "out.jsonl")[0]["error"]


def test_an_input_without_rows_gives_an_output_without_rows(world, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert run(world, tmp_path / "empty.jsonl", tmp_path / "out.jsonl").rows == 0
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_as_a_library(world):
    with Predictor.load(
        ["models:/one/1", "models:/one/2"], settings=world.settings, tracking_uri=world.settings.tracking_uri
    ) as predictor:
        rows = [{"prompt": "Price"}, {"prompt": "Price"}, {"prompt": "Price"}]
        models = ["models:/one/1", "models:/one/2", "models:/three/1"]
        answers = predictor.predict(rows, models=models, max_new_tokens=3)
    assert [answer.model for answer in answers] == models
    assert answers[0].adapter_sha256 != answers[1].adapter_sha256
    assert answers[2].error == "model models:/three/1 is not loaded; loaded models: models:/one/1, models:/one/2"


def test_the_command_prints_the_file_and_exits_with_1_where_rows_failed(world, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(
        predict, ["--model", "models:/one/1", "--max-new-tokens", "3", str(rows), str(out)], standalone_mode=False
    )
    assert (result.return_value, result.stdout) == (0, f"{out}\n")
    assert "models:/one@champion resolved to models:/one/1" in result.stderr
    assert "7 of 7 rows answered" in result.stderr
    rows.write_text('{"prompt": ""}\n')
    result = CliRunner().invoke(
        predict, ["--model", "models:/one/1", "--json", "--overwrite", str(rows), str(out)], standalone_mode=False
    )
    assert result.return_value == 1
    assert json.loads(result.stdout)["failed"] == 1
    assert "1 rows failed" in result.stderr
