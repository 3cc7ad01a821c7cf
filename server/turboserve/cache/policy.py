"""Pure decisions of the cache manager: what matches, what must go, what could ever fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An idle conversation that eviction may drop, and the budget bytes that would free."""

    conversation_id: str
    gain_bytes: int
    last_used_s: float
    is_source: bool  # the request that needs the room shares its pages


def common_prefix_len(a: Tokens, b: Tokens) -> int:
    """Number of leading tokens that both have."""
    num = min(len(a), len(b))
    differs = np.flatnonzero(a[:num] != b[:num])
    return int(differs[0]) if len(differs) else num


def plan_evictions(candidates: Iterable[Candidate], needed_bytes: int) -> list[str] | None:
    """Conversations to drop, least recently used first; None when all of them are not enough.

    The conversation being continued goes last: dropping it frees only what the request does not share.
    """
    if needed_bytes <= 0:
        return []
    chosen, freed = [], 0
    for candidate in sorted(candidates, key=lambda c: (c.is_source, c.last_used_s)):
        if candidate.gain_bytes <= 0:
            continue
        chosen.append(candidate.conversation_id)
        freed += candidate.gain_bytes
        if freed >= needed_bytes:
            return chosen
    return None


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
