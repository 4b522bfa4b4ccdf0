import numpy as np
import pytest
from helpers.data_rows import ask, make_renderer

from rankwise.data.tokens import Encoded, EncodedSet, encode, kept
from rankwise.reporter import SilentReporter
from rankwise.settings import Settings


def row(name, tokens, supervised):
    return Encoded(id=name, input_ids=np.array(tokens, np.int32), supervised=np.array(supervised, np.bool_))


ROWS = [row("a", [1, 2, 3], [0, 1, 1]), row("b", [4], [0]), row("c", [5, 6], [0, 1])]


def test_a_set_gives_back_its_rows():
    encoded = EncodedSet.of(ROWS)
    assert len(encoded) == 3
    assert [each.id for each in encoded] == ["a", "b", "c"]
    assert encoded[-1].input_ids.tolist() == [5, 6]
    assert encoded[0].supervised.tolist() == [False, True, True]
    assert [each.id for each in encoded[1:]] == ["b", "c"]
    assert encoded[0].input_ids.dtype == np.int32
    with pytest.raises(IndexError):
        encoded[3]


def test_a_set_counts_tokens():
    encoded = EncodedSet.of(ROWS)
    assert encoded.lengths.tolist() == [3, 1, 2]
    assert encoded.supervised_lengths.tolist() == [2, 0, 1]
    assert (encoded.tokens, encoded.supervised_tokens, encoded.longest) == (6, 3, 3)


def test_an_empty_set_counts_nothing():
    encoded = EncodedSet.of([])
    assert (len(encoded), encoded.tokens, encoded.supervised_tokens) == (0, 0, 0)
    assert encoded.supervised_lengths.tolist() == []


@pytest.mark.parametrize(
    "other",
    [
        EncodedSet.of(ROWS[:2]),
        EncodedSet.of([row("z", [1, 2, 3], [0, 1, 1]), *ROWS[1:]]),
        EncodedSet.of([row("a", [1, 2, 9], [0, 1, 1]), *ROWS[1:]]),
        EncodedSet.of([row("a", [1, 2, 3], [0, 0, 1]), *ROWS[1:]]),
        EncodedSet.of([row("a", [1, 2], [0, 1]), row("b", [3, 4], [1, 0]), ROWS[2]]),
        EncodedSet.of(ROWS, dropped=("x",)),
        EncodedSet.of(ROWS, cut=("x",)),
        EncodedSet.of(ROWS, longest=9),
    ],
)
def test_the_digest_changes_with_all_it_covers(other):
    assert EncodedSet.of(ROWS).digest == EncodedSet.of(list(ROWS)).digest
    assert other.digest != EncodedSet.of(ROWS).digest


def test_examples_that_did_not_fit_are_not_kept():
    renderer = make_renderer()
    examples = [ask(renderer, "a" * 300, "one", "long"), ask(renderer, "a", "one", "short")]
    assert [each.id for each in kept(examples, encode(examples, renderer, 64))] == ["short"]


def test_tokens_are_made_once_for_the_same_rows(tmp_path):
    settings = Settings.load({"RANKWISE_HOME": str(tmp_path / "home"), "RANKWISE_CACHE": str(tmp_path / "cache")})
    renderer = make_renderer()
    examples = [ask(renderer, f"carat {number}", "one", str(number)) for number in range(3)]
    first = encode(examples, renderer, 64, settings)
    (file,) = (tmp_path / "cache" / "tokens").glob("*.arrow")
    written = file.stat().st_mtime_ns
    again = encode(examples, renderer, 64, settings)
    assert again.digest == first.digest == encode(examples, renderer, 64).digest
    assert file.stat().st_mtime_ns == written
    assert [each.input_ids.tolist() for each in again] == [each.input_ids.tolist() for each in first]


class Recorder(SilentReporter):
    def __init__(self):
        self.tasks = []

    def task(self, description, total, unit="B"):
        self.tasks.append((description, total, unit))
        return super().task(description, total, unit)


def test_progress_is_told():
    renderer, recorder = make_renderer(), Recorder()
    encode([ask(renderer, "a", "one")], renderer, None, progress=recorder)
    assert recorder.tasks == [("tokenizing", 1, "rows")]
