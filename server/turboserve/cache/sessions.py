"""Idle conversations and running requests, found by name or by their longest common token prefix.

Owns the index: sessions by caller and name, and one radix tree per caller and wanted format. What
lives under one salt (the server's view of the caller) is invisible under any other: there is no
structure that spans salts but their list. Bytes, eviction and files are the manager's business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from turboserve.cache.holders import Conversation, Holder, Lease, Session
from turboserve.cache.policy import Tokens
from turboserve.cache.radix import RadixTree
from turboserve.cache.runtime import CacheFamily, usable_estimate

# A shorter match saves less than forking costs, and says only that both use the same chat template.
MIN_REUSED_TOKENS = 16

# Reading a file costs about as much as computing this many tokens of a small model: a conversation on
# disk must save that much more than one in memory.
DISK_HANDICAP_TOKENS = 64


class Match(NamedTuple):
    holder: Holder
    usable_len: int  # tokens whose cache can be reused without loss
    is_continuation: bool  # all of an idle conversation's tokens begin the prompt, not just some


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request looks for."""

    salt: str
    kv_format: str
    tokens: Tokens
    session_id: str | None = None  # preferred among equals
    cache_key: str | None = None  # likewise
    exact_format: bool = False  # the request named its format, so nothing requantised will do


class SessionStore:
    """Everything that can be found."""

    def __init__(self, family: CacheFamily) -> None:
        self._family = family
        self._by_salt: defaultdict[str, dict[str, Conversation]] = defaultdict(dict)
        self._trees: dict[tuple[str, str], RadixTree[Holder]] = {}

    def __iter__(self) -> Iterator[Conversation]:
        return (c for conversations in self._by_salt.values() for c in conversations.values())

    def __contains__(self, conversation: Conversation) -> bool:
        return self._by_salt.get(conversation.salt, {}).get(conversation.conversation_id) is conversation

    def of(self, salt: str) -> list[Conversation]:
        return list(self._by_salt.get(salt, {}).values())

    def get(self, salt: str, session_id: str) -> Conversation | None:
        return self._by_salt.get(salt, {}).get(session_id)

    def find(self, wanted: Wanted) -> Match | None:
        """The holder that saves most of the tokens, whose last one is never among the saved.

        Computing at least one token is what gives the logits of the first answer token.
        """
        tree = self._trees.get((wanted.salt, wanted.kv_format))
        if tree is None:
            return None
        best: Match | None = None
        best_rank = (0, 0)
        for found in tree.find(wanted.tokens):
            limit = min(found.common_len, len(wanted.tokens) - 1)
            if limit < max(best_rank[0], MIN_REUSED_TOKENS):
                break
            if wanted.exact_format and _is_requantised(found.holder):
                continue
            usable = self._usable(found.holder, limit)
            rank = _rank(found.holder, usable, wanted)
            if usable >= MIN_REUSED_TOKENS and rank > best_rank:
                is_whole = found.is_whole and isinstance(found.holder, Conversation)
                best, best_rank = Match(found.holder, usable, is_whole), rank
        return best

    def _usable(self, holder: Holder, limit: int) -> int:
        if isinstance(holder, Lease):
            running = holder.running
            return 0 if running is None else running.usable_prefix(min(limit, running.held_len()))
        runtime = self._family.runtime(holder.kv_format)
        if holder.caches is not None:
            return runtime.usable_prefix(holder.caches, limit)
        can_cut = self._family.can_cut(holder.kv_format)
        return usable_estimate(runtime, len(holder.tokens), limit, can_cut=can_cut)

    def superseded_by(self, kept: Conversation) -> list[Conversation]:
        """Nameless conversations that are a beginning of this one and can be had from its caches."""
        tree = self._trees.get((kept.salt, kept.wanted_format))
        found = tree.on_path(kept.tokens) if tree is not None else []
        return [c for c in found if isinstance(c, Conversation) and c is not kept and self._is_within(c, kept)]

    def continuation_of(self, conversation: Conversation) -> Conversation | None:
        """A longer conversation that begins with this one's tokens and from which they can be had."""
        tree = self._trees.get((conversation.salt, conversation.wanted_format))
        found = tree.beyond(conversation.tokens) if tree is not None else []
        return next((c for c in found if isinstance(c, Conversation) and self._is_within(conversation, c)), None)

    def _is_within(self, part: Conversation, whole: Conversation) -> bool:
        """Whether nothing but a fraction of a page is lost when only `whole` stays."""
        session = part.session
        if session.is_explicit or session.is_pinned or whole.is_requantised or whole.caches is None:
            return False
        return len(part.tokens) == len(whole.tokens) or self._usable(whole, len(part.tokens)) > 0

    def add(self, conversation: Conversation) -> None:
        mine = self._by_salt[conversation.salt]
        assert conversation.conversation_id not in mine, "session ids are unique"
        mine[conversation.conversation_id] = conversation
        self._tree_of(conversation).insert(conversation.tokens, conversation)

    def remove(self, conversation: Conversation) -> None:
        """Forget it and give its pages back."""
        mine = self._by_salt[conversation.salt]
        del mine[conversation.conversation_id]
        if not mine:
            del self._by_salt[conversation.salt]
        self._drop_from_tree(conversation, conversation.tokens)
        self.unload(conversation)

    def unload(self, conversation: Conversation) -> None:
        """Give its pages back and keep the entry."""
        if conversation.caches is not None:
            self._family.runtime(conversation.kv_format).release(conversation.caches)
            conversation.caches = None

    def enter(self, lease: Lease) -> None:
        """Let a running request be found by its prompt."""
        self._tree_of(lease).insert(lease.prompt, lease)

    def leave(self, lease: Lease) -> None:
        self._drop_from_tree(lease, lease.prompt)

    def _tree_of(self, holder: Holder) -> RadixTree[Holder]:
        return self._trees.setdefault((holder.salt, holder.wanted_format), RadixTree())

    def _drop_from_tree(self, holder: Holder, tokens: Tokens) -> None:
        key = (holder.salt, holder.wanted_format)
        self._trees[key].remove(tokens, holder)
        if not self._trees[key].num_holders:
            del self._trees[key]

    def check_integrity(self, leases: list[Lease]) -> None:
        """Raises AssertionError unless trees and names hold the same conversations, and exactly these leases."""
        in_trees: set[int] = set()
        for (salt, wanted_format), tree in self._trees.items():
            tree.check_integrity()
            for num_tokens, holder in tree.holders():
                tokens = holder.prompt if isinstance(holder, Lease) else holder.tokens
                assert (holder.salt, holder.wanted_format) == (salt, wanted_format), "a holder is in a foreign tree"
                assert num_tokens == len(tokens), "a holder hangs at the wrong length"
                in_trees.add(id(holder))
        listed = {id(c) for c in self} | {id(lease) for lease in leases}
        assert in_trees == listed, f"{len(in_trees)} holders in trees, {len(listed)} known"
        for salt, mine in self._by_salt.items():
            assert all(c.salt == salt and c.conversation_id == name for name, c in mine.items()), "a name is wrong"


def _is_requantised(holder: Holder) -> bool:
    return holder.kv_format != holder.wanted_format


def _rank(holder: Holder, usable_len: int, wanted: Wanted) -> tuple[int, int]:
    """Longer is better; among equals the caller's own choice of conversation."""
    is_on_disk = isinstance(holder, Conversation) and holder.caches is None
    session: Session = holder.session
    preference = 2 * (session.session_id == wanted.session_id) + (
        wanted.cache_key is not None and session.cache_key == wanted.cache_key
    )
    return usable_len - (DISK_HANDICAP_TOKENS if is_on_disk else 0), 1 + preference
