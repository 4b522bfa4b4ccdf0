from __future__ import annotations

import json
import subprocess

import pytest

from rankwise.tracking.provenance import collect, git_state


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example"]
    subprocess.run(["git", "-C", str(directory), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    directory = tmp_path / "repo"
    directory.mkdir()
    git(directory, "init", "--initial-branch=main")
    (directory / "run.py").write_text("x = 1\n")
    git(directory, "add", ".")
    git(directory, "commit", "-m", "first")
    return directory


def test_a_clean_repository_has_a_commit_and_no_diff(repository):
    state = git_state(repository)
    assert len(state.commit) == 40
    assert state.branch == "main"
    assert state.remote is None
    assert (state.dirty, state.diff, state.untracked, state.problem) == (False, "", (), None)


def test_changes_are_kept_as_a_diff_that_applies_again(repository):
    (repository / "run.py").write_text("x = 2\n")
    (repository / "new.py").write_text("")
    state = git_state(repository)
    assert state.dirty
    assert "-x = 1\n+x = 2" in state.diff
    assert state.untracked == ("new.py",)
    git(repository, "checkout", "run.py")
    applied = subprocess.run(
        ["git", "-C", str(repository), "apply", "-"], input=state.diff + "\n", text=True, check=False
    )
    assert applied.returncode == 0
    assert (repository / "run.py").read_text() == "x = 2\n"


def test_staged_changes_are_in_the_diff_too(repository):
    (repository / "run.py").write_text("x = 3\n")
    git(repository, "add", "run.py")
    assert "+x = 3" in git_state(repository).diff


def test_secrets_are_taken_out_of_diff_and_remote(repository):
    git(repository, "remote", "add", "origin", "https://ann:pa55@host.example/repo.git")
    (repository / "run.py").write_text(f'token = "hf_{"a" * 30}"\n')
    state = git_state(repository)
    assert state.remote == "https://[redacted]@host.example/repo.git"
    assert "hf_" not in state.diff
    assert "[redacted]" in state.diff


def test_a_directory_without_a_repository_says_so(tmp_path):
    state = git_state(tmp_path)
    assert state.commit is None
    assert "not a git repository" in state.problem


def test_a_repository_without_a_commit_says_so(tmp_path):
    git(tmp_path, "init")
    state = git_state(tmp_path)
    assert state.commit is None
    assert state.problem


def test_a_machine_without_git_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path).problem == "git is not installed"


def test_facts_name_versions_and_machine_and_no_environment(repository, monkeypatch):
    monkeypatch.setenv("RANKWISE_TEST_SECRET", "do-not-store-me")
    facts = collect(repository)
    text = json.dumps(facts.to_dict())
    assert "do-not-store-me" not in text
    assert set(facts.libraries) >= {"torch", "transformers", "peft", "mlflow"}
    assert facts.cpu_count >= 1
    assert facts.memory_bytes > 1e8
    assert "diff" not in facts.to_dict()["git"]


def test_tags_use_mlflows_names_and_leave_out_what_is_unknown(repository, tmp_path):
    tags = collect(repository).tags()
    assert tags["mlflow.source.git.commit"] == git_state(repository).commit
    assert tags["mlflow.source.git.dirty"] == "false"
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags["mlflow.user"]
    assert all(isinstance(value, str) and value for value in tags.values())
    assert "mlflow.source.git.commit" not in collect(tmp_path).tags()
