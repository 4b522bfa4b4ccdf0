"""The program of a worker's child."""

import os
import subprocess
import sys


def test_a_bug_ends_the_child_with_its_traceback_and_no_abort_of_the_interpreter(tmp_path):
    code = "import sys; sys.modules['rankwise.tasks.commands'] = None; import rankwise.tasks.child as c; c.main()"
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--events", str(writer), "--stacks", str(tmp_path / "stacks")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[writer],
        text=True,
    )
    os.close(writer)
    try:
        assert process.wait(timeout=60) == 1
        said = process.stderr.read()
    finally:
        process.kill()
        process.communicate()
        os.close(reader)
    assert "Traceback" in said
    assert "rankwise.tasks.commands" in said
    assert "Fatal Python error" not in said
