from helpers.local_store import local_settings

from rankwise.cli.jobs import add_queued_arms, open_queue


def test_a_reader_without_a_queue_is_told_so_and_makes_none(tmp_path, capsys):
    settings = local_settings(tmp_path / "home")
    assert add_queued_arms(settings, None, "what MLflow has", everything=False) == "what MLflow has"
    assert "queued arms are not shown: the database (RANKWISE_DATABASE_URL" in capsys.readouterr().err
    assert not settings.home.exists()


def test_a_reader_reads_on_when_the_queue_is_away(tmp_path, capsys):
    settings = local_settings(tmp_path / "home")
    settings.home.mkdir()
    (settings.home / "rankwise.db").write_text("no database " * 100)
    assert add_queued_arms(settings, None, "what MLflow has", everything=False) == "what MLflow has"
    told = capsys.readouterr().err
    assert told.startswith("queued arms are not shown: reading the revision of the queue: ")
    assert "the queue's database failed" in told


def test_arms_that_wait_are_added_where_there_is_a_queue(tmp_path, capsys, monkeypatch):
    settings = local_settings(tmp_path / "home")
    with open_queue(settings):
        pass
    monkeypatch.setattr(
        "rankwise.tasks.sweep_lifecycle.with_queued_arms",
        lambda store, queue, comparison, everything: (comparison, everything),
    )
    assert add_queued_arms(settings, None, "what MLflow has", everything=True) == ("what MLflow has", True)
    assert capsys.readouterr().err == ""
