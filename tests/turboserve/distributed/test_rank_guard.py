"""What rank 0 does when the ranks do not go on together: once, and never waiting for what does not end."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from turboserve.api.drain import Drain
from turboserve.cli import rank_guard
from turboserve.cli.rank_guard import Guard
from turboserve.engine.distributed.place import Place


class Engine:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.is_stuck = False
        self.given_up: list[str] = []
        self.told = threading.Event()

    def give_up(self, why: str, within_s: float) -> None:
        self.given_up.append(why)
        self.told.set()


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reasons for which the process would have been ended."""
    reasons: list[str] = []
    for name in ("WATCH_S", "LINGER_S"):
        monkeypatch.setattr(rank_guard, name, 0.02)
    monkeypatch.setattr(rank_guard, "END_S", 0.2)
    monkeypatch.setattr(rank_guard, "end_now", reasons.append)
    return reasons


def guard_of(engine: Any) -> tuple[Guard, Drain]:
    guard, drain = Guard(Place(0, "127.0.0.1")), Drain()
    guard.watch(engine, drain)
    return guard, drain


def wait_until(what: Any) -> None:
    ends_s = time.monotonic() + 60
    while not what():
        assert time.monotonic() < ends_s
        time.sleep(0.01)


def test_a_lost_rank_ends_requests_then_drains_and_ends_the_process_in_any_case(ended: list[str]) -> None:
    engine = Engine()
    guard, drain = guard_of(engine)
    guard.on_lost("rank 1 is gone")
    guard.on_lost("rank 2 is gone")  # because of it
    guard.on_death()
    assert engine.given_up == ["rank 1 is gone"] and drain.draining and guard.why == "rank 1 is gone"
    wait_until(lambda: ended == ["rank 1 is gone"])


def test_a_step_that_takes_too_long_is_taken_for_a_lost_rank(ended: list[str]) -> None:
    engine = Engine()
    guard, drain = guard_of(engine)
    time.sleep(0.1)
    assert guard.why is None and not drain.draining
    engine.is_stuck = True
    assert engine.told.wait(60) and "stuck_step_s" in engine.given_up[0]
    wait_until(lambda: ended)


def test_an_engine_that_died_by_itself_ends_all_ranks(ended: list[str]) -> None:
    engine = Engine()
    guard, drain = guard_of(engine)
    guard.on_death()
    wait_until(lambda: drain.draining and ended)
    assert guard.why == "the engine of rank 0 died" and not engine.given_up
