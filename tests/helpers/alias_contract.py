"""What the book of aliases must do. A test module subclasses `AliasContract` and gives a `store` fixture."""

from __future__ import annotations

import threading

import pytest


class AliasContract:
    def test_moves_are_kept_in_order_and_apart(self, store):
        for name, alias, before, after in (
            ("m", "a", None, 1),
            ("m", "b", None, 7),
            ("m", "a", 1, 2),
            ("n", "a", 4, None),
        ):
            with store.aliases.moving(name, alias) as moving:
                moving.note(before, after, run_id="r", reason="better", moved_by="me")
        moves = store.aliases.history("m", "a")
        assert [(move.from_version, move.to_version) for move in moves] == [(None, 1), (1, 2)]
        assert moves[0].moved_at <= moves[1].moved_at
        assert (moves[0].run_id, moves[0].reason, moves[0].moved_by) == ("r", "better", "me")
        assert store.aliases.history("n", "a")[0].to_version is None
        assert store.aliases.history("n", "b") == []

    def test_a_move_that_fails_is_not_noted(self, store):
        with pytest.raises(RuntimeError), store.aliases.moving("m", "a") as moving:  # noqa: PT012
            moving.note(None, 1, run_id=None, reason="", moved_by="me")
            raise RuntimeError("the registry refused")
        assert store.aliases.history("m", "a") == []

    def test_one_alias_is_moved_by_one_at_a_time(self, store):
        inside, worst = [], []

        def move(number):
            with store.aliases.moving("m", "a") as moving:
                inside.append(number)
                worst.append(len(inside))
                before = len(moving.history())
                moving.note(before, before + 1, run_id=None, reason="", moved_by=str(number))
                inside.remove(number)

        threads = [threading.Thread(target=move, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(worst) == 1
        assert [(move.from_version, move.to_version) for move in store.aliases.history("m", "a")] == [
            (number, number + 1) for number in range(8)
        ]
