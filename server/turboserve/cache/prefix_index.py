"""Idle conversations and running requests, found by their longest common token prefix.

Owns one radix tree per caller, adapter and wanted format. What lives under one salt (the server's view of the
caller) is invisible under any other, and so is what one adapter computed to any other: there is no structure that
spans them but their list. Who holds what, bytes, eviction and files are others' business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from turboserve.cache.interfaces import CacheFamily
from turboserve.cache.radix import Branch, RadixTree, Tokens
from turboserve.cache.sessions import Conversation, Holder, Lease
from turboserve.cache.sizes import usable_estimate
from turboserve.messages import Request

# A shorter match saves less than forking costs, and says only that both use the same chat template. Not where a request
# continues the session that it names: that is what its caller asked for, however short it is.
MIN_REUSED_TOKENS = 16

# Reading a file costs about as much as computing this many tokens of a small model: a conversation on
# disk must save that much more than one in memory.
DISK_HANDICAP_TOKENS = 64


class Match(NamedTuple):
    """A cache to begin with."""

    holder: Holder
    usable_len: int  # tokens whose cache can be reused without loss
    is_continuation: bool  # all of an idle conversation's tokens begin the prompt, not just some

    @property
    def is_on_disk(self) -> bool:
        """Whether it has to be read before it can be used."""
        return self.holder.tier == "disk"


class _Where(NamedTuple):
    """Which tree."""

    salt: str
    adapter: str
    wanted_format: str

    @classmethod
    def of(cls, holder: Holder) -> _Where:
        return cls(holder.salt, holder.adapter, holder.wanted_format)


class PrefixIndex:
    """Everything that can be found."""

    def __init__(self, family: CacheFamily) -> None:
        self._family = family
        self._trees: dict[_Where, RadixTree[Holder]] = {}

    def add(self, holder: Holder) -> None:
        """Let it be found: an idle conversation by its tokens, a running request by its prompt."""
        self._trees.setdefault(_Where.of(holder), RadixTree()).insert(_tokens_of(holder), holder)

    def remove(self, holder: Holder) -> None:
        """Raises KeyError when it is not in here."""
        key = _Where.of(holder)
        self._trees[key].remove(_tokens_of(holder), holder)
        if not self._trees[key].num_holders:
            del self._trees[key]

    def find(
        self,
        request: Request,
        tokens: Tokens,
        kv_format: str,
        *,
        adapter: str = "",
        must_be_exact: bool = False,
        in_memory_only: bool = False,
        without: Conversation | None = None,
    ) -> Match | None:
        """The holder that saves most of the tokens, whose last one is never among the saved.

        Computing at least one token is what gives the logits of the first answer token. kv_format: the one
        that its cache was wanted in; must_be_exact: and still is in, as also for a request that names one.
        adapter: the fingerprint of the one that computed it.
        """
        tree = self._trees.get(_Where(request.tenant, adapter, kv_format))
        if tree is None:
            return None
        must_be_exact = must_be_exact or request.kv_format is not None
        best: Match | None = None
        best_rank = (-DISK_HANDICAP_TOKENS, 0)
        least = MIN_REUSED_TOKENS if request.session_id is None else 1
        for found in tree.find(tokens):
            limit = min(found.common_len, len(tokens) - 1)
            if limit < max(best_rank[0], least):
                break
            holder = found.holder
            if (must_be_exact and holder.kv_format != holder.wanted_format) or holder is without:
                continue
            if in_memory_only and holder.tier == "disk":
                continue
            if _rank(holder, limit, request) <= best_rank:
                continue  # however much of it can be used: asking all that run is what bursts would wait for
            usable = self.usable(holder, limit)
            rank = _rank(holder, usable, request)
            is_own = holder.session.session_id == request.session_id
            is_long_enough = usable >= (1 if is_own and found.is_whole else MIN_REUSED_TOKENS)
            if rank > best_rank and is_long_enough and (is_own or rank > (0, 0)):
                best, best_rank = Match(holder, usable, found.is_whole and isinstance(holder, Conversation)), rank
        return best

    def usable(self, holder: Holder, limit: int) -> int:
        """The longest n <= limit of which its cache can be forked; for one on disk, an estimate from below."""
        if isinstance(holder, Lease):
            running = holder.running
            limit = min(limit, running.held_len()) if running is not None else 0
            return running.usable_prefix(limit) if running is not None and limit > 0 else 0
        runtime = self._family.runtime(holder.kv_format)
        if holder.caches is not None:
            return runtime.usable_prefix(holder.caches, limit)
        can_cut = self._family.can_cut(holder.kv_format)
        return usable_estimate(runtime, len(holder.tokens), limit, can_cut=can_cut)

    def superseded_by(self, kept: Conversation) -> list[Conversation]:
        """Nameless conversations that are a beginning of this one and can be had from its caches."""
        tree = self._trees.get(_Where.of(kept))
        found = tree.on_path(kept.tokens) if tree is not None else []
        return [c for c in found if isinstance(c, Conversation) and c is not kept and self._is_within(c, kept)]

    def continuation_of(self, conversation: Conversation) -> Conversation | None:
        """A longer conversation that begins with this one's tokens and from which they can be had."""
        tree = self._trees.get(_Where.of(conversation))
        found = tree.beyond(conversation.tokens) if tree is not None else []
        return next((c for c in found if isinstance(c, Conversation) and self._is_within(conversation, c)), None)

    def _is_within(self, part: Conversation, whole: Conversation) -> bool:
        """Whether nothing but a fraction of a page is lost when only `whole` stays."""
        session = part.session
        if session.is_explicit or session.is_pinned or whole.is_requantised or whole.caches is None:
            return False
        return len(part.tokens) == len(whole.tokens) or self.usable(whole, len(part.tokens)) > 0

    def outlines(self, salt: str) -> Iterator[tuple[str, list[Branch[Holder]]]]:
        """The wanted format and the outline of each of a caller's trees."""
        return ((where.wanted_format, tree.outline()) for where, tree in self._trees.items() if where.salt == salt)

    def check_integrity(self, holders: Iterable[Holder]) -> None:
        """Raises AssertionError unless the trees hold exactly these, each in its own tree and under its own tokens."""
        in_trees: set[int] = set()
        for where, tree in self._trees.items():
            tree.check_integrity()
            for num_tokens, holder in tree.holders():
                assert _Where.of(holder) == where, "a holder is in a foreign tree"
                assert num_tokens == len(_tokens_of(holder)), "a holder hangs at the wrong length"
                in_trees.add(id(holder))
        listed = {id(holder) for holder in holders}
        assert in_trees == listed, f"{len(in_trees)} holders in trees, {len(listed)} known"


def _tokens_of(holder: Holder) -> Tokens:
    return holder.prompt if isinstance(holder, Lease) else holder.tokens


def _rank(holder: Holder, usable_len: int, request: Request) -> tuple[int, int]:
    """Longer is better; among equals the caller's own choice of conversation."""
    session = holder.session
    preference = 2 * (session.session_id == request.session_id) + (
        request.cache_key is not None and session.cache_key == request.cache_key
    )
    return usable_len - (DISK_HANDICAP_TOKENS if holder.tier == "disk" else 0), 1 + preference
