from __future__ import annotations

from rankwise.tracking.values import DatasetRecord


def record(**changes):
    values = {"name": "d", "digest": "sha256:" + "ab" * 32, "source": "x", "source_type": "local", "context": "eval"}
    return DatasetRecord(**{**values, **changes})


def test_the_digest_fits_mlflows_column_and_is_whole_in_a_tag():
    entity = record().entity()
    assert entity.dataset.digest == ("ab" * 32)[:36]
    assert {tag.key: tag.value for tag in entity.tags}["rankwise.digest"] == "sha256:" + "ab" * 32


def test_a_commit_is_a_digest_too():
    assert record(digest="c" * 40).entity().dataset.digest == "c" * 36


def test_credentials_in_a_source_are_taken_out():
    assert "pa55" not in record(source="https://ann:pa55@host/x.csv").entity().dataset.source


def test_what_is_not_known_is_left_out():
    entity = record().entity()
    assert entity.dataset.schema is None
    assert entity.dataset.profile is None
