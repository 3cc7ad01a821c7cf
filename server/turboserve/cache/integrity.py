"""Whether pools, references, trees and accounting agree. Callable at any time between two steps; changes nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from turboserve.cache.holders import Lease
from turboserve.cache.ledger import committed_bytes
from turboserve.cache.runtime import CacheFamily, Caches, total_bytes
from turboserve.cache.sessions import SessionStore


class CacheIntegrityError(AssertionError):
    """The manager's figures and the runtime's disagree: a bug in this project."""


def check(
    family: CacheFamily, store: SessionStore, leases: list[Lease], budget_bytes: int, running: Sequence[Caches]
) -> None:
    """Raises CacheIntegrityError. `running`: the caches of all leases, or of those that have any."""
    try:
        store.check_integrity(leases)
    except CacheIntegrityError:
        raise
    except AssertionError as exc:
        raise CacheIntegrityError(str(exc)) from exc
    _check_figures(family, store)
    committed = committed_bytes(family, store, leases)
    if committed > budget_bytes:
        raise CacheIntegrityError(f"{committed} bytes committed of a budget of {budget_bytes}")
    _check_pages(family, store, running)
    family.check_integrity()


def _check_figures(family: CacheFamily, store: SessionStore) -> None:
    """What was booked for each idle conversation is what it holds."""
    for conversation in store:
        if conversation.caches is None:
            if conversation.disk_key is None:
                raise CacheIntegrityError("a conversation is neither in memory nor on disk")
            continue
        measured = family.runtime(conversation.kv_format).measure(conversation.caches)
        if total_bytes(measured) != conversation.kv_bytes:
            raise CacheIntegrityError(
                f"{conversation.kv_bytes} bytes booked, {total_bytes(measured)} held by a conversation"
            )
        if measured.tokens != len(conversation.tokens):
            raise CacheIntegrityError(f"{measured.tokens} tokens cached, {len(conversation.tokens)} known")


def _check_pages(family: CacheFamily, store: SessionStore, running: Sequence[Caches]) -> None:
    """Every page in use has a holder, and no fewer references than holders."""
    idle = [c.caches for c in store if c.caches is not None]
    holders: dict[tuple[Hashable, int], int] = {}
    used = 0
    for caches in (*idle, *running):
        pages = family.held_pages(caches)
        if pages is None:
            continue
        for page, references in zip(pages.ids.tolist(), pages.references.tolist(), strict=True):
            key = (pages.pool, page)
            used += pages.page_bytes if key not in holders else 0
            holders[key] = holders.get(key, 0) + 1
            if holders[key] > references:
                raise CacheIntegrityError(f"page {page} has {references} references and more holders")
    totals = family.totals()
    if totals.compressed != used:
        raise CacheIntegrityError(f"{totals.compressed} bytes of pages in use, {used} held by anyone")
    exact = sum(c.kv.exact for c in store if c.caches is not None)
    exact += sum(family.runtime(family.default).measure(caches).exact for caches in running)
    if totals.exact > exact:
        raise CacheIntegrityError(f"{totals.exact} bytes of exact rows in use, {exact} held by anyone")
