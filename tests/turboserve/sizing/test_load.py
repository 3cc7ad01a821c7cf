"""Users of one machine: the closed loop adds up, more of them get less, and machines follow from memory or speed."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import pytest

from turboserve.sizing.load import Habits, Wanted, machines_for, most_users, seen_by
from turboserve.sizing.speeds import Speeds

SPEEDS = Speeds(0.010, 0.0005, 1e-11, 4000.0)
HABITS = Habits(200, 300, 60.0, 1e8)
WANTED = Wanted(8.0, 3.0, 64)


def test_one_user_sees_the_machine_alone() -> None:
    seen = seen_by(1, SPEEDS, HABITS)
    assert seen.tokens_per_s == pytest.approx(1 / SPEEDS.step_s(1, HABITS.kv_bytes), rel=0.01)
    assert seen.ttft_s == pytest.approx(200 / 4000 + SPEEDS.step_s(1, HABITS.kv_bytes), rel=0.01)


@pytest.mark.parametrize("users", [1, 10, 100, 400])
def test_streams_users_and_times_agree(users: int) -> None:
    """Little's law over a whole round."""
    seen = seen_by(users, SPEEDS, HABITS)
    answer_s = HABITS.answer_tokens / seen.tokens_per_s
    assert seen.streams == pytest.approx(users * answer_s / (seen.ttft_s + answer_s + HABITS.think_s), rel=0.01)


def test_more_users_get_less_each() -> None:
    found = [seen_by(users, SPEEDS, HABITS) for users in (1, 5, 20, 80, 200)]
    assert [one.tokens_per_s for one in found] == sorted((one.tokens_per_s for one in found), reverse=True)
    assert [one.ttft_s for one in found] == sorted(one.ttft_s for one in found)


def test_the_most_users_suit_and_one_more_does_not() -> None:
    best = most_users(SPEEDS, HABITS, WANTED)
    assert best.users > 1 and best.suits(WANTED)
    assert not seen_by(best.users + 1, SPEEDS, HABITS).suits(WANTED)


def test_what_nobody_gets_is_told_by_what_one_user_would_see() -> None:
    need = machines_for(10, 1 << 40, SPEEDS, HABITS, replace(WANTED, min_tokens_per_s=1e6))
    assert (need.machines, need.by, need.users_by_speed) == (0, "speed", 0)
    assert need.seen.tokens_per_s == pytest.approx(1 / SPEEDS.step_s(1, HABITS.kv_bytes), rel=0.01)
    assert machines_for(10, 10, SPEEDS, HABITS, WANTED).by == "memory"


def test_memory_or_speed_decides_and_users_are_spread() -> None:
    by_memory = machines_for(1000, int(20 * HABITS.kv_bytes), SPEEDS, HABITS, WANTED)
    assert (by_memory.machines, by_memory.by) == (50, "memory")
    assert by_memory.seen.users == 20
    by_speed = machines_for(1000, 1 << 50, SPEEDS, HABITS, WANTED)
    assert by_speed.by == "speed" and by_speed.machines == -(-1000 // by_speed.users_by_speed)
    assert by_speed.seen.suits(WANTED)


def test_a_simulated_machine_sees_what_was_computed() -> None:
    """Event by event: users think, prompts are read one at a time, and all answers grow by one token a step."""
    rng = np.random.default_rng(11)
    users, habits = 60, Habits(400, 100, 20.0, 1e8)
    expected = seen_by(users, SPEEDS, habits)
    now, thinking = 0.0, [(float(rng.uniform(0, habits.think_s)), i) for i in range(users)]
    heapq.heapify(thinking)
    queue: list[tuple[float, int]] = []
    running: dict[int, int] = {}
    ttft, rates, begun = [], [], {}
    streams_s = 0.0
    while now < 3000:
        while thinking and thinking[0][0] <= now:
            asked, user = heapq.heappop(thinking)
            queue.append((asked, user))
        if not queue and not running:
            now = thinking[0][0]
            continue
        if queue:  # a prompt, then a step, in turn
            asked, user = queue.pop(0)
            now += habits.question_tokens / SPEEDS.prefill_tokens_per_s
            running[user] = 0
            begun[user] = now
            ttft.append(now - asked)
        step_s = SPEEDS.step_s(len(running), habits.kv_bytes)
        now += step_s
        streams_s += step_s * len(running)
        for user in list(running):
            running[user] += 1
            if running[user] == habits.answer_tokens:
                del running[user]
                rates.append(habits.answer_tokens / (now - begun.pop(user)))
                heapq.heappush(thinking, (now + float(rng.exponential(habits.think_s)), user))
    assert expected.tokens_per_s == pytest.approx(float(np.mean(rates)), rel=0.1)
    assert expected.ttft_s == pytest.approx(float(np.mean(ttft)), rel=0.25)
