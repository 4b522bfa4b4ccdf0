from __future__ import annotations

import pytest

from rankwise.doctor.finding import ProbeError, run_probe


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(text):
        (tmp_path / "asked.py").write_text(text)
        return "asked"

    return write


def test_the_last_line_is_the_answer(module):
    assert run_probe(module("print('a warning of a library'); print('{\"a\": 1}')"), timeout=30) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", "signal 11: no output on stderr"),
        ("raise RuntimeError('no kernel')", "exit code 1: RuntimeError: no kernel"),
        ("print('[1]')", "exit code 0: no output on stderr"),
        ("import time; time.sleep(60)", "no answer within 1 seconds"),
    ],
)
def test_a_program_without_an_answer_is_an_error(module, text, message):
    with pytest.raises(ProbeError, match=f"^{message}$"):
        run_probe(module(text), timeout=1 if "sleep" in text else 30)
