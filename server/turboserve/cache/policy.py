"""Pure decisions of the cache manager: what matches, what must go and in which order, what could ever fit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

# The newest conversations, up to this share of the budget, stay while anything else can give way: whoever
# just answered is about to go on, and one large conversation must not push out everybody else's.
SHIELD_SHARE = 0.125

# Formats under pressure, best first. What is below 3/3 changes answers too often (docs/quality.md).
FORMAT_STEPS = ("f16", "8/8", "8/4", "4/4", "4/3", "3/3")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An idle conversation that may give way. `owner` is its caller."""

    conversation_id: str
    owner: str
    kv_bytes: int
    age_s: float
    hits: int
    is_source: bool = False  # the request that needs the room continues it


class VictimOrder(NamedTuple):
    """Who gives way first, and who only when the request could not run at all otherwise."""

    ordinary: list[str]
    last_resort: list[str]


def common_prefix_len(a: Tokens, b: Tokens) -> int:
    """Number of leading tokens that both have."""
    num = min(len(a), len(b))
    differs = np.flatnonzero(a[:num] != b[:num])
    return int(differs[0]) if len(differs) else num


def eviction_score(candidate: Candidate) -> float:
    """Higher goes first: long unused, seldom found again, large.

    Bytes count by their fourth root only: a large cache frees more, but costs as much more to compute again.
    """
    return (1.0 + candidate.age_s) * math.sqrt(math.sqrt(1.0 + candidate.kv_bytes)) / (1.0 + candidate.hits)


def order_victims(candidates: Iterable[Candidate], budget_bytes: int) -> VictimOrder:
    """Best scores first, but callers who hold more than an equal share of the budget before all others."""
    everyone = list(candidates)
    shielded = _shielded(everyone, budget_bytes)
    ordinary = [c for c in everyone if c.conversation_id not in shielded and not c.is_source]
    sources = [c.conversation_id for c in everyone if c.is_source]
    last = sorted((c for c in everyone if c.conversation_id in shielded), key=eviction_score, reverse=True)
    # The source frees only what the request does not share, so it goes after all ordinary ones.
    return VictimOrder([*_fair_order(ordinary, everyone, budget_bytes), *sources], [c.conversation_id for c in last])


def _shielded(candidates: list[Candidate], budget_bytes: int) -> set[str]:
    left, chosen = SHIELD_SHARE * budget_bytes, set()
    for candidate in sorted(candidates, key=lambda c: c.age_s):
        left -= candidate.kv_bytes
        if left < 0:
            break
        if not candidate.is_source:
            chosen.add(candidate.conversation_id)
    return chosen


def _fair_order(ordinary: list[Candidate], everyone: list[Candidate], budget_bytes: int) -> list[str]:
    held: defaultdict[str, int] = defaultdict(int)
    for candidate in everyone:
        held[candidate.owner] += candidate.kv_bytes
    fair_bytes = budget_bytes / max(1, len(held))
    # Ascending, so that the next victim of an owner is popped from the end.
    queues: defaultdict[str, list[Candidate]] = defaultdict(list)
    for candidate in sorted(ordinary, key=eviction_score):
        queues[candidate.owner].append(candidate)
    order = []
    while queues:
        greedy = [owner for owner in queues if held[owner] > fair_bytes]
        if greedy:
            owner = max(greedy, key=lambda o: held[o])
        else:
            owner = max(queues, key=lambda o: eviction_score(queues[o][-1]))
        victim = queues[owner].pop()
        held[owner] -= victim.kv_bytes
        order.append(victim.conversation_id)
        if not queues[owner]:
            del queues[owner]
    return order


def next_format_down(name: str) -> str | None:
    """One step down, or None at the end of the ladder and for formats that are not on it."""
    index = FORMAT_STEPS.index(name) if name in FORMAT_STEPS else len(FORMAT_STEPS)
    return FORMAT_STEPS[index + 1] if index + 1 < len(FORMAT_STEPS) else None


def largest_fitting(bytes_for: Callable[[int], int], budget_bytes: int, most: int) -> int:
    """The largest n <= most with bytes_for(n) <= budget; 0 when not even one token fits.

    `bytes_for` must not fall as n grows.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_for(middle) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low
