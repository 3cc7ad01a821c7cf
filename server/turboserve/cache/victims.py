"""Which idle conversations give way first, and which format is one step down. Pure functions of figures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from turboserve.cache.interfaces import Key

# The newest conversations, up to this share of the budget, stay while anything else can give way: whoever
# just answered is about to go on, and one large conversation must not push out everybody else's.
SHIELD_SHARE = 0.125

# Formats under pressure, best first. What is below 3t/2t changes answers too often (docs/quality.md).
FORMAT_STEPS = ("f16", "8/8", "8/4", "4/4", "4t/3t", "3t/2t")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An idle conversation in memory, which may give way. `key` names its caller first."""

    key: Key
    kv_bytes: int  # all that it uses
    age_s: float  # since its last use
    hits: int
    own_bytes: int = 0  # the part of kv_bytes outside pages, booked for it alone
    is_named: bool = False
    is_pinned: bool = False
    has_file: bool = False  # of exactly these caches
    can_spill: bool = False  # the disk would take it, as far as is known
    is_source: bool = False  # the request that needs the room continues it

    @property
    def may_give_way(self) -> bool:
        """Pinned ones never go for good."""
        return not self.is_pinned or self.can_spill or self.has_file


class VictimOrder(NamedTuple):
    """Who gives way first, and who only when the request could not run at all otherwise."""

    ordinary: list[Candidate]
    last_resort: list[Candidate]


def eviction_score(candidate: Candidate) -> float:
    """Higher goes first: long unused, seldom found again, large.

    Bytes count by their fourth root only: a large cache frees more, but costs as much more to compute again.
    """
    return (1.0 + candidate.age_s) * math.sqrt(math.sqrt(1.0 + candidate.kv_bytes)) / (1.0 + candidate.hits)


def order_victims(candidates: Iterable[Candidate], budget_bytes: int) -> VictimOrder:
    """Best scores first, but callers who hold more than an equal share of the budget before all others."""
    everyone = list(candidates)
    shielded = _shielded(everyone, budget_bytes)
    ordinary = [c for c in everyone if c.key not in shielded and not c.is_source]
    sources = [c for c in everyone if c.is_source]
    last = sorted((c for c in everyone if c.key in shielded), key=eviction_score, reverse=True)
    # The source frees only what the request does not share, so it goes after all ordinary ones.
    return VictimOrder([*_fair_order(ordinary, everyone, budget_bytes), *sources], last)


def _shielded(candidates: list[Candidate], budget_bytes: int) -> set[Key]:
    left, chosen = SHIELD_SHARE * budget_bytes, set()
    for candidate in sorted(candidates, key=lambda c: c.age_s):
        left -= candidate.kv_bytes
        if left < 0:
            break
        if not candidate.is_source:
            chosen.add(candidate.key)
    return chosen


def _fair_order(ordinary: list[Candidate], everyone: list[Candidate], budget_bytes: int) -> list[Candidate]:
    held: defaultdict[str, int] = defaultdict(int)
    for candidate in everyone:
        held[candidate.key[0]] += candidate.kv_bytes
    fair_bytes = budget_bytes / max(1, len(held))
    # Ascending, so that the next victim of an owner is popped from the end.
    queues: defaultdict[str, list[Candidate]] = defaultdict(list)
    for candidate in sorted(ordinary, key=eviction_score):
        queues[candidate.key[0]].append(candidate)
    order = []
    while queues:
        greedy = [owner for owner in queues if held[owner] > fair_bytes]
        if greedy:
            owner = max(greedy, key=lambda o: held[o])
        else:
            owner = max(queues, key=lambda o: eviction_score(queues[o][-1]))
        victim = queues[owner].pop()
        held[owner] -= victim.kv_bytes
        order.append(victim)
        if not queues[owner]:
            del queues[owner]
    return order


def next_format_down(name: str) -> str | None:
    """One step down, or None for the last format and for those that are not in FORMAT_STEPS."""
    index = FORMAT_STEPS.index(name) if name in FORMAT_STEPS else len(FORMAT_STEPS)
    return FORMAT_STEPS[index + 1] if index + 1 < len(FORMAT_STEPS) else None
