from __future__ import annotations

import io
import json
import logging
import os
import threading

import pytest
from structlog.contextvars import clear_contextvars

from rankwise import logs
from rankwise.exceptions import ConfigError
from rankwise.settings import Settings, set_log_level

logger = logging.getLogger("rankwise.somewhere")


@pytest.fixture(autouse=True)
def _clean():
    root, own = logging.getLogger(), logging.getLogger("rankwise")
    before, level = list(root.handlers), own.level
    clear_contextvars()  # Other tests make steps.
    yield
    root.handlers[:] = before
    own.setLevel(level)
    clear_contextvars()


@pytest.fixture
def settings(tmp_path):
    return Settings.load({"RANKWISE_HOME": str(tmp_path)})


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_is_json_where_stderr_is_no_terminal_with_what_is_bound(capsys):
    logs.configure("INFO")
    logs.bind(job=7, attempt=2)
    with logs.bound(arm="ab12", step=40):
        logger.info("saved %d bytes", 12)
    logger.warning("later", extra={"path": "/tmp/x"})
    first, second = lines(capsys.readouterr().err)
    assert first["timestamp"].endswith("Z")
    del first["timestamp"], second["timestamp"]
    assert first == {
        "level": "info",
        "logger": "rankwise.somewhere",
        "event": "saved 12 bytes",
        "job": 7,
        "attempt": 2,
        "arm": "ab12",
        "step": 40,
    }
    assert second["path"] == "/tmp/x"
    assert "step" not in second


def test_a_line_for_a_person_is_a_text(capsys):
    logs.configure("WARNING", as_json=False)
    logger.info("not shown")
    with logs.bound(job=7):
        logger.warning("the cache is damaged")
    text = capsys.readouterr().err
    assert "the cache is damaged" in text
    assert "job=7" in text
    assert "not shown" not in text
    assert "{" not in text


def test_progress_bars_that_replace_stderr_get_the_lines(monkeypatch):
    logs.configure()
    bars = io.StringIO()
    monkeypatch.setattr("sys.stderr", bars)
    logger.warning("above the bars")
    assert "above the bars" in bars.getvalue()


def test_configuring_again_does_not_double_lines(capsys):
    logs.configure()
    logs.configure()
    logger.warning("once")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_secrets_are_taken_out_of_text_values_and_tracebacks(capsys):
    logs.configure()
    secret = "hf_" + "a" * 30
    with logs.bound(arm=f"token={secret}"):
        logger.warning("fetching https://ann:pa55w0rd@host/x with %s", secret)
    try:
        raise ValueError(f"api_key='{secret}'")
    except ValueError:
        logger.exception("failed")
    text = capsys.readouterr().err
    assert secret not in text
    assert "pa55w0rd" not in text
    assert "ValueError" in lines(text)[1]["exception"]


def test_a_jobs_file_has_what_all_threads_said_in_all_attempts(settings):
    logs.configure("ERROR")
    with logs.job_log(settings, 7, attempt=1, arm="ab12") as path:
        logger.info("one")
        thread = threading.Thread(target=logger.warning, args=("two",))
        thread.start()
        thread.join()
        logger.debug("too little")
    logger.info("outside")
    with logs.job_log(settings, 7, attempt=2, arm="ab12"):
        logger.info("three")
    assert path == settings.home / "logs" / "jobs" / "7.log"
    found = lines(path.read_text())
    assert [(line["event"], line["attempt"]) for line in found] == [("one", 1), ("two", 1), ("three", 2)]
    assert {(line["job"], line["arm"]) for line in found} == {(7, "ab12")}


def test_lines_bound_to_one_job_of_a_pack_go_to_its_file_only(settings):
    logs.configure()
    with logs.job_log(settings, 1, arm="aa") as first, logs.job_log(settings, 2, arm="bb") as second:
        logger.info("of the pack")
        with logs.bound(arm="aa", step=3):
            logger.info("of the first")
        with logs.bound(job=2):
            logger.info("of the second")
    assert [line["event"] for line in lines(first.read_text())] == ["of the pack", "of the first"]
    assert [line["event"] for line in lines(second.read_text())] == ["of the pack", "of the second"]


def test_a_disk_that_fills_up_loses_lines_and_nothing_else(settings, capsys):
    logs.configure("ERROR")
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    path = logs.job_log_path(settings, 9)
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    with logs.job_log(settings, 9):
        logger.info("lost")
    assert capsys.readouterr().err == ""


def test_a_json_line_is_told_to_a_person_and_other_text_stays(settings):
    with logs.job_log(settings, 3, arm="ab12") as path:
        logs.configure()
        logger.info("bf16: %s", "CUDA capability 9.0")
    assert logs.format_line(path.read_text()).endswith(" info    bf16: CUDA capability 9.0 job=3 arm=ab12")
    assert logs.format_line("Fatal Python error: Segmentation fault\n") == "Fatal Python error: Segmentation fault"
    assert logs.format_line('["a list"]') == '["a list"]'


def test_the_level_comes_from_the_environment_and_another_word_is_an_error(monkeypatch):
    assert Settings.load({"RANKWISE_LOG_LEVEL": "debug"}).log_level == "DEBUG"
    assert Settings.load({}).log_level == "WARNING"
    with pytest.raises(ConfigError, match="RANKWISE_LOG_LEVEL must be one of DEBUG, INFO, WARNING, ERROR, got 'loud'"):
        Settings.load({"RANKWISE_LOG_LEVEL": "loud"})
    monkeypatch.setenv("RANKWISE_LOG_LEVEL", "ERROR")
    set_log_level("info")
    assert Settings.load().log_level == "INFO"


def test_what_ended_a_job_is_added_to_its_log_by_another_process(settings):
    path = logs.job_log_path(settings, 7)
    logs.log_job_error(settings, 7, "it was killed", attempt=2, exception="last words of postgresql://me:pa55word@db/q")
    (line,) = path.read_text().splitlines()
    entry = json.loads(line)
    assert (entry["job"], entry["attempt"], entry["level"], entry["event"]) == (7, 2, "error", "it was killed")
    assert "pa55word" not in line
    assert "error   it was killed" in logs.format_line(line)
    assert logs.format_line(line).endswith("last words of postgresql://[redacted]@db/q")
