"""Which models make way for another one. Pure: knows figures, stops nobody."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Holder:
    """A model that holds memory, or has been promised some."""

    name: str
    need_bytes: int
    last_used: float  # on any clock that all holders share
    may_be_stopped: bool


def victims(needed_bytes: int, budget_bytes: int, holders: Iterable[Holder]) -> list[str] | None:
    """Names to stop so that `needed_bytes` more fit, the least recently used first; None when it cannot be done.

    None of them is stopped in vain: one without which there would be room as well stays.
    """
    holders = list(holders)
    excess = sum(holder.need_bytes for holder in holders) + needed_bytes - budget_bytes
    chosen: list[Holder] = []
    for holder in sorted((h for h in holders if h.may_be_stopped), key=lambda h: h.last_used):
        if excess <= 0:
            break
        chosen.append(holder)
        excess -= holder.need_bytes
    if excess > 0:
        return None
    for holder in reversed(list(chosen)):  # the most recently used of them is spared first
        if excess + holder.need_bytes <= 0:
            chosen.remove(holder)
            excess += holder.need_bytes
    return [holder.name for holder in chosen]
