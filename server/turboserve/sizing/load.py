"""What users of one machine see, and how many it serves: a closed loop of asking, waiting, reading and thinking.

A user asks (so many new tokens), waits, gets an answer at the machine's pace, thinks, and asks again. Streams that run
at the same time follow from that: users * time in service / time of a whole round. Prompts take their share of the
machine, which decode steps then lack, and wait for each other as in a queue with fixed service times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from turboserve.sizing.speeds import Speeds

MAX_PREFILL_SHARE = 0.8  # of the machine's time; beyond it a queue of prompts does not end
_ROUNDS = 200  # of the fixed point, each half way to the next value


@dataclass(frozen=True, slots=True)
class Habits:
    """Of one user. Tokens are means; kv_bytes are those of one conversation at its usual length."""

    question_tokens: float
    answer_tokens: float
    think_s: float
    kv_bytes: float


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user must get at least, and most requests that a server decodes together."""

    min_tokens_per_s: float
    max_ttft_s: float
    max_running: int


@dataclass(frozen=True, slots=True)
class Seen:
    """By a user of a machine with so many of them."""

    users: float
    streams: float  # that run at the same time, on average
    ttft_s: float
    tokens_per_s: float  # of one user's answer
    prefill_share: float  # of the machine's time

    def suits(self, wanted: Wanted) -> bool:
        return (
            self.prefill_share <= MAX_PREFILL_SHARE
            and self.ttft_s <= wanted.max_ttft_s
            and self.tokens_per_s >= wanted.min_tokens_per_s
            and self.streams <= wanted.max_running
        )


def seen_by(users: float, speeds: Speeds, habits: Habits) -> Seen:
    """The steady state with so many users on one machine."""
    prompt_s = habits.question_tokens / speeds.prefill_tokens_per_s
    streams = min(users, 1.0)
    for _ in range(_ROUNDS):
        state = _state(users, max(streams, 1e-9), speeds, habits, prompt_s)
        streams += (state.streams - streams) / 2
    return state


def _state(users: float, streams: float, speeds: Speeds, habits: Habits, prompt_s: float) -> Seen:
    """What follows from so many streams: of these, how many there would be."""
    running = max(1.0, streams)  # whoever decodes is there; fewer than one is: now and then nobody is
    step_s = speeds.step_s(running, habits.kv_bytes)
    # a round's time decides how often prompts come, and these how much of the machine is left
    share = 0.0
    for _ in range(20):
        slowed_s = step_s / max(1e-6, 1 - min(share, 0.999))
        service_s = prompt_s / max(1e-6, 1 - min(share, 0.999)) + habits.answer_tokens * slowed_s
        share += (min(0.999, users * prompt_s / (service_s + habits.think_s)) - share) / 2
    waited_s = share * prompt_s / (2 * (1 - share))  # behind others' prompts
    ttft_s = waited_s + prompt_s + slowed_s
    round_s = ttft_s + habits.answer_tokens * slowed_s + habits.think_s
    return Seen(users, users * habits.answer_tokens * slowed_s / round_s, ttft_s, 1 / slowed_s, share)


def most_users(speeds: Speeds, habits: Habits, wanted: Wanted) -> Seen:
    """The largest whole number of users that get what is wanted; of 0 users, what one alone would see."""
    alone = seen_by(1, speeds, habits)
    if not alone.suits(wanted):
        return Seen(0, alone.streams, alone.ttft_s, alone.tokens_per_s, alone.prefill_share)
    low, high = 1, 2
    while seen_by(high, speeds, habits).suits(wanted) and high < 1 << 24:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seen_by(middle, speeds, habits).suits(wanted) else (low, middle)
    return seen_by(low, speeds, habits)


@dataclass(frozen=True, slots=True)
class Need:
    """Machines for so many users. `by`: what decides, memory or speed."""

    machines: int
    by: str
    users_by_memory: int
    users_by_speed: int
    seen: Seen


def machines_for(users: int, budget_bytes: int, speeds: Speeds, habits: Habits, wanted: Wanted) -> Need:
    """How many hold all conversations in memory and serve everybody as wanted; 0 machines: no number does.

    budget_bytes: for caches, of one machine.
    """
    by_memory = int(budget_bytes // habits.kv_bytes)
    fastest = most_users(speeds, habits, wanted)
    by_speed = int(fastest.users)
    each = min(by_memory, by_speed)
    if each == 0:
        return Need(0, "memory" if by_memory == 0 else "speed", by_memory, by_speed, fastest)
    machines = math.ceil(users / each)
    seen = seen_by(users / machines, speeds, habits)
    return Need(machines, "memory" if by_memory < by_speed else "speed", by_memory, by_speed, seen)
