"""A registered adapter as an MLflow model: `mlflow models predict` on files, and as a Spark UDF."""

from __future__ import annotations

import json
import os
import sys

import mlflow
import pandas as pd
import pytest
from helpers import warm
from helpers.flavored import make_world

import rankwise.flavor as flavor

PROMPTS = ["carat 0.23", "carat 0.9, cut Ideal", "How much is this diamond?"]
URI = "models:/predicted@champion"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("predict"))
    world.register("predicted")
    return world


@pytest.fixture
def environment(world, monkeypatch):
    world.enter(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    yield
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def wanted(world):
    """What the model answers in this process, with the parameters' defaults."""
    from rankwise.flavor.pyfunc import QloraModel

    return QloraModel(flavor.load_model(world.saved, settings=world.settings)).predict(PROMPTS)


@pytest.mark.proof
def test_mlflow_models_predict_answers_a_json_and_a_csv_file(world, environment, wanted, tmp_path):
    frame = pd.DataFrame({"prompt": PROMPTS})
    frame.to_csv(tmp_path / "in.csv", index=False)
    (tmp_path / "in.json").write_text(json.dumps({"inputs": PROMPTS}))
    (tmp_path / "table.json").write_text(json.dumps({"dataframe_split": frame.to_dict(orient="split")}))
    for name, kind in (("in.json", "json"), ("table.json", "json"), ("in.csv", "csv")):
        done = warm.run(
            ["-m", "mlflow", "models", "predict", "-m", URI, "-i", name, "-t", kind, "-o", f"{name}.out",
             "--env-manager", "local"],
            cwd=tmp_path, env=dict(os.environ), timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers = json.loads((tmp_path / f"{name}.out").read_text())["predictions"]
        assert [answer["0"] if isinstance(answer, dict) else answer for answer in answers] == wanted, name


@pytest.mark.proof
@pytest.mark.filterwarnings(
    r"ignore:PySpark does not yet fully support pandas >= 3\.0\.0\. Some features may not work correctly\. It is "
    r"recommended to use pandas < 3\.0\.0 for now\.:FutureWarning"
)
def test_a_spark_udf_answers_a_column_of_prompts(world, environment, wanted, monkeypatch, tmp_path):
    sql = pytest.importorskip("pyspark.sql", reason="`make proofs` installs pyspark; it needs Java 17")
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    spark = (
        sql.SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.warehouse.dir", str(tmp_path))
        .getOrCreate()
    )
    try:
        predict = mlflow.pyfunc.spark_udf(spark, URI, result_type="string", env_manager="local")
        rows = spark.createDataFrame([(index, text) for index, text in enumerate(PROMPTS)], ["id", "prompt"])
        answered = rows.withColumn("answer", predict(sql.functions.struct("prompt"))).orderBy("id").collect()
        assert [row["answer"] for row in answered] == wanted
    finally:
        spark.stop()
