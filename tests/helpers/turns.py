"""Whether threads take turns in a function that must not run twice at a time."""

from threading import Thread
from time import sleep


def count_together(monkeypatch, module, name):
    """Slow down a function of a module; the list says after each call how many ran at its beginning."""
    function, running, together = getattr(module, name), [], []

    def slow(*args, **options):
        running.append(args)
        together.append(len(running))
        sleep(0.05)
        try:
            return function(*args, **options)
        finally:
            running.pop()

    monkeypatch.setattr(module, name, slow)
    return together


def in_threads(call, values):
    """Call with each value in a thread of its own; the results by value."""
    results = {}
    threads = [Thread(target=lambda value=value: results.update({value: call(value)})) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
