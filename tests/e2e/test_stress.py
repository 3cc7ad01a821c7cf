"""Sixty-four conversations over a budget for twelve, with cancels, forks, several formats and a kill in the middle.

Then streams that are left and a day in short, over HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.server import Server, running_server
from tests.stress.child import Answer
from tests.stress.day import FLAGS, KINDS, run_day
from tests.stress.run import Load, Outcome, StressError, compare, stress, summary
from tests.stress.streams import run_streams


def test_every_answer_is_the_unlimited_servers(tmp_path: Path, cache_dir: Path, seed: int) -> None:
    outcome: Outcome = stress(Load(seed=seed), tmp_path, cache_dir)
    print(summary(outcome))
    stats, watch = outcome.last["stats"], outcome.last["watch"]
    assert outcome.num_answers == 128
    assert watch["most_committed"] <= stats["kv_budget_bytes"] == outcome.budget_bytes
    assert watch["num_steps"] > 50
    # The run must have been what it claims to be: tight, and helped by the disk.
    events = stats["events"]
    assert sum(events["evictions"].values()) + sum(events["spills"].values()) > 20
    assert sum(events["restores"].values()) > 0
    assert events["prefix_hit_tokens"] > 0
    assert events["integrity_failures"] == 0


def test_a_different_answer_would_be_noticed() -> None:
    expected = {(0, 0): Answer("a", [1], [0.5]), (0, 1): Answer("bc", [2, 3], [0.5, 0.01])}
    assert compare(expected, dict(expected)) == 0
    assert compare(expected, {**expected, (0, 1): Answer("bd", [2, 4], [0.5, 0.01])}) == 1, "a tie"
    for other in (Answer("xc", [9, 3], [0.5, 0.01]), Answer("b", [2], [0.5]), Answer("lost", [2, 3], [0.5, 0.01])):
        with pytest.raises(StressError, match="1 of 2 answers differ"):
            compare(expected, {**expected, (0, 1): other})
    with pytest.raises(StressError, match="not answered"):
        compare(expected, {(0, 0): expected[0, 0]})


@pytest.fixture(scope="module")
def server(cache_dir: Path) -> Iterator[Server]:
    with running_server(cache_dir, *FLAGS) as server:
        yield server


def test_half_of_the_streams_may_leave(server: Server, seed: int) -> None:
    figures = run_streams(server, 24, seed)
    print(figures)
    assert (figures.num_whole, figures.num_left) == (12, 12)


def test_a_day_in_short_leaves_nothing_behind(server: Server, seed: int) -> None:
    """Descriptors; what memory does shows only in a longer run (python -m tests.stress.day)."""
    day = run_day(server, 200, 8, seed)
    assert sum(day.statuses.values()) == 200
    assert {kind for kind, _ in day.statuses} == set(KINDS)
