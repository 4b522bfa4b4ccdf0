import io

import pytest

from rankwise.worker.protocol import Writer, read


@pytest.mark.parametrize("text", ["é ✓ \U0001f600", "no file caf\udce9.csv", 'a "line"\nand\0more'])
def test_a_message_arrives_as_it_was_sent(text):
    stream = io.BytesIO()
    assert Writer(stream).send({"event": "failed", "text": text})
    stream.seek(0)
    assert list(read(stream)) == [{"event": "failed", "text": text}]


def test_a_line_that_a_death_cut_off_is_left_out():
    assert list(read(io.BytesIO(b'{"event": "done"}\n{"eve'))) == [{"event": "done"}]
