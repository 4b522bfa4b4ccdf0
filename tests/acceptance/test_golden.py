"""What commands print, what MLflow stores and what the report says are as in `tests/golden/`, key by key, word by word.

One tiny sweep goes through all commands with `--json`. After a change that is wanted:

    RANKWISE_UPDATE_GOLDEN=1 pytest tests/acceptance/test_golden.py

rewrites the files, and `git diff tests/golden` shows what users will see. Only the command line and MLflow's own API
are used, so moving code never changes this test. `rankwise cluster` is not covered: it needs Ray.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import golden, warm
from helpers.project import Project, sums, write_rows
from mlflow import MlflowClient

TESTS = Path(__file__).parents[1]
# Pinned: the base is a file of the repository and the rows are these, so that spec hashes are the same everywhere.
BASE_REVISION = "sha256:d5b35b5d8e4d6588da192f5a749aca08da2ecd751b468b90f751fe2005ad8765"
ROWS_REVISION = "sha256:f15efa19fa51f0ccca4b066e779f8a56f22ed32bb01f1815ed75bc7ab0b2afbb"
DEFINITION = f"""\
version: 1
name: tiny
description: Which rank learns to add?
base_model: ./base
base_model_revision: {BASE_REVISION}
lora: {{r: 4, lora_alpha: 2*r, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}}
dataset:
  train: ./rows.jsonl
  train_revision: {ROWS_REVISION}
  eval: {{split_from: train, rows: 12, seed: 0}}
  prompt: "{{a}} plus {{b}}"
  completion: "{{sum}}"
training: {{max_steps: 6, per_device_train_batch_size: 4, learning_rate: 1e-2, max_length: 64, save_steps: 2}}
sweep: {{parameters: {{lora.r: [2, 4]}}}}
evaluation: {{metrics: [loss, token_accuracy, exact_match, number], primary_metric: eval.loss, max_new_tokens: 4}}
promotion: {{min_examples: 5, max_overlap: 0.5}}
register: {{name: tiny-adder, alias: best}}
"""
# On a machine with a GPU as on one without.
ENVIRONMENT = {"RANKWISE_COMPUTE_DTYPE": "float32", "CUDA_VISIBLE_DEVICES": ""}
# What `doctor` says of these depends on the machine and on the versions of libraries.
OF_THE_MACHINE = {"python", "libraries", "memory", "gpu.driver", "queue.clock", "ray"}
ASK = ["--model", "models:/tiny-adder@best", "--prompt", "{a} plus {b}", "--max-new-tokens", "4", "ask.jsonl"]


class Recorder:
    """Runs commands in a project and keeps what they print, masked, by the name of its golden file."""

    def __init__(self, directory: Path) -> None:
        self.project = Project(directory)
        shutil.copytree(TESTS / "helpers" / "tiny_base", directory / "base")
        write_rows(directory / "rows.jsonl", sums(80))
        write_rows(
            directory / "ask.jsonl", [{"a": 1, "b": 2}, {"a": 3, "b": 4, "model": "models:/tiny-adder/1"}, {"a": 5}]
        )
        (directory / "tiny.yaml").write_text(DEFINITION)
        self.masks = golden.Masks(
            directory, [BASE_REVISION.removeprefix("sha256:"), ROWS_REVISION.removeprefix("sha256:")]
        )
        self.documents: dict[str, str] = {}

    def run(self, *arguments: str, code: int = 0, **env: str) -> str:
        done = self.project.run(*arguments, env={**ENVIRONMENT, **env})
        assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, code: str) -> str:
        """What a program prints that imports rankwise."""
        project = self.project
        done = warm.run(["-c", code], cwd=project.directory, env=project.environment(ENVIRONMENT), timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def keep(self, name: str, document, *, measured: bool = True) -> None:
        self.documents[f"{name}.json"] = golden.as_json(self.masks.document(document, measured=measured))

    def json(self, name: str, *arguments: str, code: int = 0, masked=(), measured: bool = True, **env: str):
        """Run a command with `--json`, keep the document, and return it; `masked`: more keys with values to hide."""
        document = json.loads(self.run(*arguments, "--json", code=code, **env))
        self.keep(name, golden.without(masked, document, "<masked>"), measured=measured)
        return document


# Definitions with the hashes of their arms, which say what is trained already: settings that change `tiny.yaml`.
VARIANTS = {
    "8 bit, all linear layers": [
        "quantization={load_in_4bit: false, load_in_8bit: true}", "lora.target_modules=all-linear",
    ],
    "epochs, warmup as a share": [
        "training={num_train_epochs: 2, learning_rate: 2e-4, warmup_steps: 0.1, lr_scheduler_type: linear}",
    ],
    "every option of training": [
        "training={max_steps: 50, per_device_train_batch_size: 2, gradient_accumulation_steps: 4, weight_decay: 0.01, "
        "max_grad_norm: 0.5, gradient_checkpointing: true, optim: adamw_bnb_8bit, "
        "train_sampling_strategy: group_by_length}", "register.checkpoint=best", "training.eval_steps=10",
    ],
    "hub base, hub data, chats": [
        "base_model=org/base", "base_model_revision=0123456789abcdef0123456789abcdef01234567",
        "dataset={train: org/rows, train_revision: 0123456789abcdef0123456789abcdef01234567, messages: messages, "
        "eval: {split_from: train, rows: 100, seed: 3}, limit: {train: 1000}}",
    ],
    "seeds, alpha, dropout, rslora": [
        "lora.use_rslora=true", "sweep.parameters={seed: [0, 1], lora.r: [8], lora.lora_dropout: [0, 0.05], "
        "lora.lora_alpha: [16, 4*r]}",
    ],
    "arms by hand": ["sweep={arms: [{lora.r: 2}, {lora.r: 16, training.learning_rate: 3e-4}]}"],
}  # fmt: skip
# Prints the help of every command, and of every command of a group.
HELP = """
import contextlib, io, re
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="rankwise")
main = command.load()
def show(*names):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*names, "--help"])
    print(out.getvalue())
    _, _, listed = out.getvalue().partition("Commands:\\n")
    for name in re.findall("^  ([a-z][a-z-]*)  ", listed, re.M):
        show(*names, name)
show()
"""
# Prints what the modules that users import export, with the parameters of functions and of methods.
API = """
import importlib, inspect, json
def of(item):
    if inspect.isclass(item):
        methods = {name: of(member) for name, member in vars(item).items() if name[0] != "_" and callable(member)}
        return {"class": [base.__name__ for base in item.__mro__[1:-1]], **({"methods": methods} if methods else {})}
    if not callable(item):
        return type(item).__name__
    parameters = inspect.signature(item).parameters.values()
    return [str(each.replace(annotation=inspect.Parameter.empty)) for each in parameters]
found = {}
for name, public in {
    "rankwise.flavor": None,
    "rankwise.inference": None,
    "rankwise.evaluation.metrics": ["NOT_COUNTED", "Sample", "metric"],
}.items():
    module = importlib.import_module(name)
    found[name] = {each: of(getattr(module, each)) for each in sorted(public or module.__all__)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """All documents, by the name of their golden file."""
    recorder = Recorder(tmp_path_factory.mktemp("golden"))
    the_definition(recorder)
    the_sweep(recorder)
    decisions(recorder)
    predictions(recorder)
    adapters(recorder)
    what_mlflow_stores(recorder)
    upkeep(recorder)
    return recorder.documents


def the_definition(recorder):
    recorder.documents["validate.txt"] = recorder.run("validate", "tiny.yaml")
    planned = recorder.json("plan", "plan", "tiny.yaml", measured=False)
    recorder.masks.known += [arm["spec_hash"] for arm in planned["arms"]]
    recorder.keep("plan", planned, measured=False)
    hashes = {"tiny.yaml": planned}
    for name, settings in VARIANTS.items():
        overrides = [part for setting in settings for part in ("--set", setting)]
        hashes[name] = json.loads(recorder.run("plan", "tiny.yaml", *overrides, "--no-estimates", "--json"))
    for file in sorted((TESTS.parent / "experiments").glob("*.yaml")):
        hashes[file.name] = json.loads(recorder.run("plan", str(file), "--no-estimates", "--json"))
    document = {name: {arm["label"]: arm["spec_hash"] for arm in planned["arms"]} for name, planned in hashes.items()}
    recorder.documents["spec-hashes.json"] = golden.as_json(document)
    recorder.documents["plan.txt"] = recorder.masks.table(recorder.run("plan", "tiny.yaml"))
    recorder.keep("schema", json.loads(recorder.run("schema")), measured=False)
    recorder.documents["help.txt"] = recorder.python(HELP)
    recorder.keep("api", json.loads(recorder.python(API)), measured=False)


def the_sweep(recorder):
    submitted = json.loads(recorder.run("submit", "tiny.yaml", "--json"))
    # The hash of an evaluation says which jobs are done already: it must stay, as the hash of an arm must.
    recorder.masks.known += [job["spec_hash"] for job in submitted["jobs"]]
    recorder.keep("submit", submitted)
    recorder.json("status-queued", "status")
    recorder.json("jobs-show-queued", "jobs", "show", "3")
    recorder.json("compare-queued", "compare", "tiny")
    recorder.json("run", "run", "tiny.yaml")
    recorder.json("status", "status")
    recorder.json("jobs-list", "jobs", "list")
    recorder.json("jobs-show", "jobs", "show", "1")
    lines = recorder.run("jobs", "logs", "1", "--json").splitlines()
    recorder.keep("jobs-logs", [json.loads(line) for line in lines])
    recorder.json("compare", "compare", "tiny")
    recorder.documents["compare.csv"] = recorder.masks.csv(recorder.run("compare", "tiny", "--csv"))
    recorder.documents["compare.txt"] = recorder.masks.table(recorder.run("compare", "tiny"))
    recorder.run("report", "tiny", "--output", "report.html")
    page = (recorder.project.directory / "report.html").read_text()
    recorder.documents["report.html"] = recorder.masks.html(page)
    recorder.run("submit", "tiny.yaml", "--set", "name=later", "--set", "seed=1", "--no-preflight")
    recorder.json("jobs-cancel", "jobs", "cancel", "--experiment", "later")
    recorder.json("jobs-retry", "jobs", "retry", "6")
    recorder.json("cancel", "cancel", "6")


def decisions(recorder):
    models = ["models:/tiny-adder@best", "models:/tiny-adder/1"]
    evaluated = json.loads(recorder.run("evaluate", *models, "--json"))
    # Of the rows alone.
    recorder.masks.known += [model["data"]["digest"].removeprefix("sha256:") for model in evaluated["models"]]
    recorder.keep("evaluate", evaluated)
    meter = ["models:/tiny-adder/2", "--quantization", "nf4,none", "--metrics", "loss", "--no-tracking"]
    recorder.json("evaluate-meter", "evaluate", *meter)
    forced = ["--candidate", "1", "--force", "--reason", "somebody must begin"]
    recorder.json("promote-forced", "promote", "tiny-adder", *forced)
    recorder.json("promote-refused", "promote", "tiny-adder", "--candidate", "2", code=1)
    recorder.json("rollback", "rollback", "tiny-adder")


def predictions(recorder):
    recorder.json("predict", "predict", *ASK, "answers.jsonl", code=1, masked=["completion_tokens"])
    recorder.json("predict-submit", "predict", *ASK, "queued.jsonl", "--submit", "--shards", "2")
    recorder.run("worker", "--drain")
    recorder.json("jobs-show-predict", "jobs", "show", "11", masked=["completion_tokens"])
    local, queued = ((recorder.project.directory / name).read_text() for name in ("answers.jsonl", "queued.jsonl"))
    assert local == queued
    rows = [json.loads(line) for line in local.splitlines()]
    recorder.keep("answers", golden.without(["text", "finish_reason", "completion_tokens"], rows, "<generated>"))


def adapters(recorder):
    best = "models:/tiny-adder@best"
    recorder.json("inspect", "inspect", best, "--html", "anatomy.html")
    page = (recorder.project.directory / "anatomy.html").read_text()
    recorder.documents["anatomy.html"] = recorder.masks.html(page)
    # Where this paragraph wraps depends on how long the project's path is.
    shown = re.sub(
        "trained over .*?not signed",
        lambda found: " ".join(found[0].split()),
        recorder.run("inspect", best),
        flags=re.DOTALL,
    )
    recorder.documents["inspect.txt"] = recorder.masks.table(shown)
    planned = ["--base", "base", "--r", "4", "--target-modules", "q_proj,v_proj"]
    recorder.json("inspect-planned", "inspect", *planned)
    recorder.json("keys-new", "keys", "new", "keys", "--name", "team")
    recorder.json("keys-show", "keys", "show", "keys/team.pub")
    key = str(recorder.project.directory / "keys" / "team.key")
    recorder.json("keys-sign", "keys", "sign", "models:/tiny-adder/1", RANKWISE_SIGNING_KEY=key)
    recorder.json("pull", "pull", best, "pulled")
    recorder.json("import", "import", "pulled", "--name", "imported")
    recorder.json("export", "export", best, "merged", "--format", "merged", masked=["tokens"])


def what_mlflow_stores(recorder):
    uri = f"sqlite:///{recorder.project.home / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    runs = [described(client, run) for run in client.search_runs([experiment.experiment_id])]
    runs.sort(key=lambda run: (run["tags"]["rankwise.kind"], run["name"], run["params"].get("model", "")))
    recorder.keep("mlflow-runs", runs)
    versions = sorted(client.search_model_versions("name = 'tiny-adder'"), key=lambda found: int(found.version))
    recorder.keep(
        "mlflow-versions",
        [
            {"version": found.version, "aliases": found.aliases, "tags": dict(sorted(found.tags.items())),
             "description": found.description}
            for found in versions
        ],
    )  # fmt: skip
    directory = Path(client.get_model_version_download_uri("tiny-adder", "1").removeprefix("file://"))
    model = golden.without(["versions"], yaml.safe_load((directory / "MLmodel").read_text()), "<versions>")
    recorder.keep("MLmodel", model, measured=False)
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    recorder.documents["model-files.txt"] = recorder.masks.text("\n".join(files) + "\n", measured=False)


def described(client, run):
    """What a run has, without what MLflow and the machine add."""
    ours = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "note": run.data.tags.get("mlflow.note.content"),
        "tags": dict(sorted(ours.items())),
        "params": dict(sorted(run.data.params.items())),
        "metrics": sorted(key for key in run.data.metrics if not key.startswith("system/")),
        "inputs": [
            {"name": used.dataset.name, "source_type": used.dataset.source_type,
             "tags": {tag.key: tag.value for tag in used.tags}}
            for used in run.inputs.dataset_inputs
        ],
        "files": list(files_of(client, run.info.run_id)),
    }  # fmt: skip


def files_of(client, run_id, below=None):
    for item in client.list_artifacts(run_id, below):
        if item.is_dir:
            yield from files_of(client, run_id, item.path)
        else:
            yield item.path


def upkeep(recorder):
    recorder.json("bases-add", "bases", "add", "base")
    recorder.json("bases-list", "bases", "list", masked=["bytes"])
    recorder.json("bases-verify", "bases", "verify", masked=["bytes"])
    recorder.json("sync", "sync")
    recorder.json("gc-dry-run", "gc", "--dry-run", "--older-than", "0", masked=["bytes"])
    recorder.json("gc", "gc", "--older-than", "0", masked=["bytes"])
    recorder.json("db-check", "db", "check")
    recorder.json("db-upgrade", "db", "upgrade")
    done = json.loads(recorder.project.run("doctor", "--json", env=ENVIRONMENT).stdout)
    for finding in done["findings"]:
        if finding["name"] in OF_THE_MACHINE or finding["name"].startswith(("disk.", "compute.")):
            finding.update(dict.fromkeys(("state", "seen", "advice"), "<machine>"))
    recorder.keep("doctor", {**done, "state": "<machine>"})


def test_what_users_and_programs_see_is_as_in_the_golden_files(documents):
    problems = golden.compare_with(TESTS / "golden", documents)
    assert not problems, f"{len(problems)} golden files differ:\n" + "\n\n".join(problems)


def test_a_changed_word_a_missing_file_and_a_file_too_many_are_reported(tmp_path, monkeypatch):
    monkeypatch.delenv(golden.UPDATE, raising=False)
    for name, text in {"same": "a\n", "changed": "one\ntwo\n", "left": "x\n"}.items():
        (tmp_path / name).write_text(text)
    problems = golden.compare_with(tmp_path, {"same": "a\n", "changed": "one\n2\n", "new": "y\n"})
    assert [problem.splitlines()[0] for problem in problems] == [
        "--- golden/changed",
        "--- golden/left",
        "--- golden/new",
    ]
    assert problems[0].splitlines()[-2:] == ["-two", "+2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "left", "same"]


def test_masks_hide_measurements_and_keep_keys_settings_and_words(tmp_path):
    masks = golden.Masks(tmp_path, ["ab" * 32])
    document = {
        "loss": 1.25, "n": 3, "params": {"rate": 0.01}, "text": f"{tmp_path}/x: 1.2 ±0.3, 4.5 kB in 0.1 s, ok",
        "run_id": "0123456789abcdef0123456789abcdef", "spec_hash": "ab" * 32, "other": "c1" * 32,
    }  # fmt: skip
    assert masks.document(document) == {
        "loss": "<float>", "n": 3, "params": {"rate": 0.01}, "text": "<project>/x: <value>, <size> in <duration>, ok",
        "run_id": "<id 1>", "spec_hash": "ab" * 32, "other": "<digest 1>",
    }  # fmt: skip
