"""How a caller's sessions hang together: the tree of their tokens, and the pages that they share. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection

from turboserve.cache.interfaces import CacheFamily
from turboserve.cache.prefix_index import PrefixIndex
from turboserve.cache.radix import Branch
from turboserve.cache.sessions import Conversation, Holder
from turboserve.messages import PageCounts, PrefixNode


def prefix_nodes(index: PrefixIndex, salt: str, shown: Collection[Holder]) -> tuple[PrefixNode, ...]:
    """The caller's trees one after the other, less what leads to none of the shown ones."""
    wanted = {id(holder) for holder in shown}
    nodes: list[PrefixNode] = []
    for kv_format, branches in index.outlines(salt):
        nodes += _leading_to(wanted, branches, kv_format, len(nodes))
    return tuple(nodes)


def _leading_to(wanted: set[int], branches: list[Branch[Holder]], kv_format: str, first: int) -> list[PrefixNode]:
    """`first`: how many nodes are in the list before these."""
    leads = [any(id(holder) in wanted for holder in branch.holders) for branch in branches]
    for place in reversed(range(len(branches))):
        parent = branches[place].parent
        if leads[place] and parent is not None:
            leads[parent] = True
    new_places: dict[int, int] = {}
    nodes: list[PrefixNode] = []
    for place, branch in enumerate(branches):
        if leads[place]:
            new_places[place] = first + len(nodes)
            parent = None if branch.parent is None else new_places[branch.parent]
            names = tuple(holder.session.session_id for holder in branch.holders if id(holder) in wanted)
            nodes.append(PrefixNode(parent, branch.end, kv_format, names))
    return nodes


def page_counts(family: CacheFamily, holder: Holder) -> PageCounts | None:
    """Of an idle conversation in memory; None of others: a running one's pages change while they are counted."""
    if not isinstance(holder, Conversation) or holder.caches is None:
        return None
    held, fmt = family.held_pages(holder.caches), family.runtime(holder.kv_format).fmt
    if held is None or fmt is None:
        return PageCounts(compressed=0, shared=0, exact_tokens=holder.held_len)
    pages = max(held.each(), key=lambda of_pool: len(of_pool.ids))
    return PageCounts(
        compressed=len(pages.ids),
        shared=int((pages.references > 1).sum()),
        exact_tokens=holder.held_len - (pages.first + len(pages.ids)) * int(fmt.page_tokens),
    )
