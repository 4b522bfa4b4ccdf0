"""A home, an output or a disk that cannot be written: a message and exit code 3 in every command, never a traceback."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.project import make_project, write_rows

from rankwise.cli.main import _COMMANDS

URI = "models:/tiny-adder@best"
COMPOSE = Path(__file__).parents[2] / "compose.yaml"

# Every command in the forms that write. `OUT` is an output; `home` says whether the command needs the home.
TABLE = {
    "examples": (["examples", "diamonds-rank", "--out", "OUT/x.yaml"], False),
    "validate": (["validate", "tiny.yaml"], False),
    "preview": (["preview", "tiny.yaml", "--html", "OUT/p.html"], False),
    "plan": (["plan", "tiny.yaml"], False),
    "schema": (["schema"], False),
    "run": (["run", "tiny.yaml"], True),
    "submit": (["submit", "tiny.yaml"], True),
    "worker": (["worker", "--drain"], True),
    "compare": (["compare", "tiny"], True),
    "report": (["report", "tiny", "--output", "OUT/r.html"], True),
    "jobs": (["jobs", "list"], True),
    "jobs show": (["jobs", "show", "1"], True),
    "jobs logs": (["jobs", "logs", "1"], True),
    "status": (["status"], True),
    "cancel": (["cancel", "1"], True),
    "retry": (["retry", "1"], True),
    "cluster": (["cluster", "status", "--address", "127.0.0.1:1"], True),
    "db": (["db", "upgrade"], True),
    "db check": (["db", "check"], True),
    "evaluate": (["evaluate", URI, "--experiment", "tiny.yaml"], True),
    "promote": (["promote", "tiny-adder", "--candidate", "1", "--force", "--reason", "x"], True),
    "rollback": (["rollback", "tiny-adder"], True),
    "predict": (["predict", "in.jsonl", "OUT/o.jsonl", "--model", URI, "--prompt", "{a}"], True),
    "predict --submit": (["predict", "in.jsonl", "OUT/o.jsonl", "--model", URI, "--prompt", "{a}", "--submit"], True),
    "inspect": (["inspect", URI, "--html", "OUT/a.html"], True),
    "pull": (["pull", URI, "OUT/pulled"], True),
    "import": (["import", "ADAPTER", "--name", "imported"], True),
    "export": (["export", URI, "OUT/merged", "--format", "merged", "--max-new-tokens", "2"], True),
    "keys": (["keys", "new", "OUT"], False),
    "keys sign": (["keys", "sign", URI], True),
    "bases": (["bases", "add", "./base"], False),
    "sync": (["sync"], True),
    "gc": (["gc"], True),
    "doctor": (["doctor"], False),
    "home": (["home", "relocate"], True),
    "ui": (["ui", "--port", "0"], True),
    "init-team": (["init-team", "--dir", "OUT"], False),
}
OUTPUTS = [name for name, (arguments, _) in TABLE.items() if any("OUT" in part for part in arguments)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = make_project(tmp_path_factory.mktemp("writing"))
    made.succeed("run", "tiny.yaml")
    write_rows(made.directory / "in.jsonl", [{"a": 1, "b": 2}])
    return made


def arguments_of(name, project, output):
    adapter = next(project.home.glob("artifacts/tiny/models/*/artifacts/adapter"))
    return [part.replace("OUT", str(output)).replace("ADAPTER", str(adapter)) for part in TABLE[name][0]]


def check(done, codes, name):
    assert "Traceback" not in done.stderr, f"{name}: {done.stderr}"
    assert done.returncode in codes, f"{name}: {done.returncode}: {done.stderr}"


def test_the_table_has_every_command():
    assert {name.split()[0] for name in TABLE} == set(_COMMANDS)


# `/proc/x` for every command; all open the home by the same few functions.
HOMES = {"/proc/x": list(TABLE), "file": ["run", "jobs", "compare", "predict", "sync"], "file/below": ["run", "pull"]}


@pytest.mark.parametrize("home", HOMES)
def test_a_home_that_cannot_be_made(project, tmp_path, home):
    (tmp_path / "file").write_text("")
    place = home if home.startswith("/") else str(tmp_path / home)
    for name in HOMES[home]:
        needs_home = TABLE[name][1]
        output = tmp_path / name.replace(" ", "-")
        output.mkdir()
        shutil.copy(COMPOSE, output)
        done = project.run(*arguments_of(name, project, output), env={"RANKWISE_HOME": place})
        # The doctor reports the problem; a cluster is looked for before the queue is opened; a home that is not there
        # cannot have moved.
        check(done, {"doctor": {1}, "home": {2}}.get(name, {3} if needs_home else {0}), name)
        if needs_home and name not in {"cluster", "db check", "home"}:
            assert f"cannot write {place.removesuffix('/below')}: " in done.stderr, name


@pytest.mark.parametrize("place", ["/proc/x", "file"])
def test_an_output_that_cannot_be_made(project, tmp_path, place):
    (tmp_path / "file").write_text("")
    output = place if place.startswith("/") else str(tmp_path / place)
    for name in OUTPUTS:
        done = project.run(*arguments_of(name, project, output))
        # click refuses a file as a directory; without a compose.yaml there is nothing to write secrets for.
        check(done, {2} if name == "init-team" or (name == "keys" and place == "file") else {3}, name)


def limited(project, arguments, size, env):
    """Run a command whose process may write no file of more than this many bytes, as on a disk that is full."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(
        [sys.executable, "-m", "rankwise", *arguments],
        cwd=project.directory,
        env=project.environment(env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=limit,
    )


@pytest.mark.parametrize("name", ["pull", "predict"])
def test_an_output_that_is_cut_off(project, tmp_path, name):
    home = tmp_path / "home"
    shutil.copytree(project.home, home)
    output = tmp_path / "out"
    # Less than the largest file of the output; databases and their logs are larger.
    done = limited(project, arguments_of(name, project, output), 400, {"RANKWISE_HOME": str(home)})
    check(done, {3}, name)
    assert not any(output.rglob("adapter_model.safetensors"))


def test_a_run_on_a_disk_that_is_full(project, tmp_path):
    done = limited(project, ["run", "tiny.yaml"], 100_000, {"RANKWISE_HOME": str(tmp_path / "home")})
    check(done, {3}, "run")


def test_a_machine_reads_results_only(project, tmp_path):
    done = project.run("pull", URI, "/proc/x/y", "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: storing models:/tiny-adder/")
    assert json.loads(project.succeed("jobs", "list", "--json"))["jobs"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_without_permission(project, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    for name in ("run", "sync", "predict", "pull"):
        home = {"RANKWISE_HOME": str(tmp_path / "closed" / "home")}
        done = project.run(*arguments_of(name, project, tmp_path / "out"), env=home)
        check(done, {3}, name)
        assert "Permission denied; make it writable" in done.stderr
