"""The predictor as a library: streams, threads, closing, errors; two stored adapters over a tiny base."""

from __future__ import annotations

from itertools import count
from threading import Event, Thread

import pytest
from helpers.bases import inject
from helpers.flavored import make_world

import rankwise.flavor as flavor
from rankwise.exceptions import ConfigError, JobError
from rankwise.inference import Predictor
from rankwise.inference import predictor as module
from rankwise.modeling.lora.lean import is_dequantized

TEXTS = ["a", "carat 0.23, cut Ideal", "0 1 2", "Price", "How much is this diamond?", "b c d e f g", "user"]
ROWS = [{"prompt": text} for text in TEXTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("predictor"))
    base = world.load_base()
    inject(base.model, "arm-2", seed=7, r=2)
    second = world.root / "second"
    flavor.save_model(base.model, second, base.tokenizer, base=base, settings=world.settings, adapter_name="arm-2")
    return world, [str(world.saved), str(second)]


@pytest.fixture
def predictor(models):
    world, names = models
    with Predictor.load(names, settings=world.settings) as loaded:
        yield loaded


@pytest.fixture
def named(models):
    """The model of each row, by turns."""
    return [models[1][at % 2] for at in range(len(ROWS))]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20, "seed": 3}])
def test_a_stream_gives_what_predict_gives_in_the_order_of_the_rows(predictor, named, options):
    expected = predictor.predict(ROWS, models=named, max_new_tokens=6, **options)
    assert len({answer.adapter_sha256 for answer in expected}) == 2
    for window in (1, 3, 100):
        streamed = predictor.stream(iter(ROWS), models=iter(named), window=window, max_new_tokens=6, **options)
        assert list(streamed) == expected


def test_a_stream_reads_no_further_than_its_window(predictor):
    read = []

    def endless():
        for number in count():
            read.append(number)
            yield {"prompt": f"carat {number}"}

    stream = predictor.stream(endless(), window=4, max_new_tokens=2)
    for _ in range(3):
        assert next(stream).error is None
    assert len(read) == 4
    next(stream)
    next(stream)
    assert len(read) == 8


def test_drawing_from_one_token_is_greedy(predictor):
    greedy = predictor.predict(ROWS, max_new_tokens=6)
    assert predictor.predict(ROWS, max_new_tokens=6, temperature=2.0, top_k=1) == greedy
    assert predictor.predict(ROWS, max_new_tokens=6, temperature=2.0) != greedy


def test_a_stop_text_is_one_and_not_its_letters(predictor):
    (free,) = predictor.predict(ROWS[:1], max_new_tokens=12)
    stop = free.text[3:5]
    (cut,) = predictor.predict(ROWS[:1], max_new_tokens=12, stop=stop)
    assert cut.text == free.text[: free.text.find(stop)]


def test_rows_that_cannot_be_answered_say_so_in_their_place(predictor, models):
    rows = [ROWS[0], {"prompt": b"7"}, ROWS[2], {"prompt": "word " * 600}, ROWS[3]]
    named = [None, None, "models:/other/1", None, models[1][1]]
    answers = list(predictor.stream(rows, models=named, max_new_tokens=3))
    assert [answer.error is None for answer in answers] == [True, False, False, False, True]
    assert "column 'prompt' holds bytes" in answers[1].error
    assert "model models:/other/1 is not loaded; loaded models:" in answers[2].error
    assert "exceed the 512 positions" in answers[3].error
    assert answers[1].text is None
    made = predictor.predict([{"prompt": "half \ud83d"}, "text", None, ROWS[0]], max_new_tokens=3)
    assert "the prompt has an unpaired surrogate" in made[0].error
    assert made[1].error == "a row must be a mapping of columns, got str"
    assert made[2].error == "a row must be a mapping of columns, got NoneType"
    assert made[3] == answers[0]
    with pytest.raises(JobError, match="row 1: column 'prompt' holds bytes"):
        predictor.predict(rows, fail_fast=True)
    with pytest.raises(JobError, match="row 1: column 'prompt' holds bytes"):
        next(predictor.stream(rows, fail_fast=True))


def test_wrong_options_are_refused_by_name(predictor):
    with pytest.raises(ConfigError, match=r"top_k must be 0 .* got -1"):
        predictor.predict(ROWS, top_k=-1)
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        predictor.predict(ROWS, batch_size=0)
    with pytest.raises(ConfigError, match="window must be 1 or more, got 0"):
        next(predictor.stream(ROWS, window=0))
    with pytest.raises(TypeError, match="unknown options: max_tokens; known options: prompt, max_new_tokens"):
        predictor.predict(ROWS, max_tokens=3)
    with pytest.raises(ValueError, match="zip"):
        list(predictor.stream(ROWS, models=[None], max_new_tokens=1))


def test_several_threads_predict_at_a_time(predictor, named):
    expected = predictor.predict(ROWS, models=named, max_new_tokens=6)
    results = {}

    def work(name, rows, models):
        results[name] = list(predictor.stream(rows, models=models, max_new_tokens=6, batch_size=2))

    threads = [
        Thread(target=work, args=("there", ROWS, named)),
        Thread(target=work, args=("back", ROWS[::-1], named[::-1])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"there": expected, "back": expected[::-1]}


def test_closing_waits_for_calls_in_progress_and_later_ones_are_refused(predictor, monkeypatch):
    working, go_on, closed = Event(), Event(), Event()
    generate_each = module.generate_each

    def slow(*args, **kwargs):
        working.set()
        assert go_on.wait(30)
        yield from generate_each(*args, **kwargs)

    monkeypatch.setattr(module, "generate_each", slow)
    results = []
    worker = Thread(target=lambda: results.extend(predictor.predict(ROWS, max_new_tokens=2)))
    worker.start()
    assert working.wait(30)
    closer = Thread(target=lambda: (predictor.close(), closed.set()))
    closer.start()
    assert not closed.wait(0.2)
    assert is_dequantized(predictor.base.model)
    go_on.set()
    worker.join()
    closer.join()
    assert len(results) == len(ROWS)
    assert not is_dequantized(predictor.base.model)
    with pytest.raises(ValueError, match="this predictor is closed"):
        predictor.predict(ROWS)
    predictor.close()


def test_a_stream_whose_predictor_was_closed_ends_with_an_error_and_not_in_silence(predictor):
    stream = predictor.stream(ROWS, max_new_tokens=2, window=2)
    next(stream)
    predictor.close()
    with pytest.raises(ValueError, match="this predictor is closed"):
        list(stream)
