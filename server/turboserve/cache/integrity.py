"""Whether pools, references, trees and accounting agree. Callable at any time between two steps; changes nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from turboserve.cache.idle import IdleConversations
from turboserve.cache.interfaces import CacheFamily, Caches
from turboserve.cache.ledger import Ledger
from turboserve.cache.prefix_index import PrefixIndex


class CacheIntegrityError(AssertionError):
    """The memory's figures and the runtime's disagree: a bug in this project."""


def check(ledger: Ledger, index: PrefixIndex, idle: IdleConversations, running: Sequence[Caches]) -> None:
    """Raises CacheIntegrityError. `running`: the caches of all leases, or of those that have any."""
    try:
        index.check_integrity([*idle, *ledger.leases])
        idle.check_integrity()
        ledger.check_integrity()
    except AssertionError as exc:
        raise CacheIntegrityError(str(exc)) from exc
    _check_figures(ledger, idle)
    committed = ledger.committed_bytes
    if committed > ledger.budget_bytes:
        raise CacheIntegrityError(f"{committed} bytes committed of a budget of {ledger.budget_bytes}")
    _check_pages(ledger, running)
    ledger.family.check_integrity()


def _check_figures(ledger: Ledger, idle: IdleConversations) -> None:
    """What was booked for each idle conversation is what it holds."""
    booked = {id(conversation) for conversation in ledger.in_memory}
    if booked != {id(conversation) for conversation in idle if conversation.caches is not None}:
        raise CacheIntegrityError("the ledger and the list of idle conversations disagree")
    for conversation in idle:
        if conversation.caches is None:
            if conversation.disk_key is None:
                raise CacheIntegrityError("a conversation is neither in memory nor on disk")
            continue
        measured = ledger.family.runtime(conversation.kv_format).measure(conversation.caches)
        if measured.total != conversation.kv_bytes:
            raise CacheIntegrityError(f"{conversation.kv_bytes} bytes booked, {measured.total} held by a conversation")
        counts_tokens = measured.tokens or measured.compressed or measured.exact  # recurrent state alone does not
        if counts_tokens and measured.tokens != len(conversation.tokens):
            raise CacheIntegrityError(f"{measured.tokens} tokens cached, {len(conversation.tokens)} known")


def _check_pages(ledger: Ledger, running: Sequence[Caches]) -> None:
    """Every page in use has a holder, and no fewer references than holders."""
    family: CacheFamily = ledger.family
    idle = [c.caches for c in ledger.in_memory if c.caches is not None]
    holders: dict[tuple[Hashable, int], int] = {}
    used = 0
    for caches in (*idle, *running):
        held = family.held_pages(caches)
        for pages in () if held is None else held.each():
            for page, references in zip(pages.ids.tolist(), pages.references.tolist(), strict=True):
                key = (pages.pool, page)
                used += pages.page_bytes if key not in holders else 0
                holders[key] = holders.get(key, 0) + 1
                if holders[key] > references:
                    raise CacheIntegrityError(f"page {page} has {references} references and more holders")
    totals = family.totals()
    if totals.compressed != used:
        raise CacheIntegrityError(f"{totals.compressed} bytes of pages in use, {used} held by anyone")
    exact = sum(c.kv.exact for c in ledger.in_memory)
    exact += sum(family.runtime(family.default).measure(caches).exact for caches in running)
    if totals.exact > exact:
        raise CacheIntegrityError(f"{totals.exact} bytes of exact rows in use, {exact} held by anyone")
