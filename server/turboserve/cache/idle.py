"""Idle conversations by caller and name, in memory or on disk only: how they come, change place and go.

Owns the list of names. Where their bytes are booked is ledger.py's business, how they are found
prefix_index.py's, what is in their files persistence.py's; who must go and why is decided elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.interfaces import Caches, Key
from turboserve.cache.ledger import Ledger
from turboserve.cache.persistence import Persistence
from turboserve.cache.prefix_index import PrefixIndex
from turboserve.cache.radix import common_prefix_len
from turboserve.cache.sessions import Conversation, Session, new_id
from turboserve.cache.tally import Tally

# A conversation that was found again is likely to be found after a restart too: worth a file.
HOT_HITS = 1


class IdleConversations:
    """Everything that can be continued and that no request works on."""

    def __init__(self, ledger: Ledger, index: PrefixIndex, persistence: Persistence, tally: Tally) -> None:
        """Begins with what an earlier process left on disk."""
        self._ledger, self._index, self._persistence, self._tally = ledger, index, persistence, tally
        self._by_salt: defaultdict[str, dict[str, Conversation]] = defaultdict(dict)
        for conversation in persistence.stored_conversations():
            self._adopt(conversation)

    def __iter__(self) -> Iterator[Conversation]:
        return (c for conversations in self._by_salt.values() for c in conversations.values())

    def __contains__(self, conversation: Conversation) -> bool:
        return self.get(*conversation.key) is conversation

    def of(self, salt: str) -> list[Conversation]:
        """All of one caller's."""
        return list(self._by_salt.get(salt, {}).values())

    def get(self, salt: str, session_id: str) -> Conversation | None:
        return self._by_salt.get(salt, {}).get(session_id)

    # --- coming

    def add(self, conversation: Conversation) -> None:
        """Hold one more; its id must be new."""
        mine = self._by_salt[conversation.salt]
        assert conversation.conversation_id not in mine, "session ids are unique"
        mine[conversation.conversation_id] = conversation
        self._index.add(conversation)
        if conversation.caches is not None:
            self._ledger.hold(conversation)

    def keep(self, kept: Conversation) -> Conversation | None:
        """Hold what a request leaves, whose lease has ended. Returns where it is found now.

        That is `kept`, or another one that holds as much already: then its caches are released. None: it is
        contained in another session's, or empty.
        """
        existing = self.get(*kept.key)
        if existing is not None and not kept.session.is_explicit and not _is_one_line(kept, existing):
            kept.session, existing = _branch_of(kept.session), None  # another branch of it ended first
        if self._is_held_already(kept, existing):
            assert kept.caches is not None
            self._ledger.family.runtime(kept.kv_format).release(kept.caches)
            return existing
        if existing is not None:
            self._supersede(existing, kept)
        self.add(kept)
        for old in self._index.superseded_by(kept):
            self._supersede(old, kept)
        return kept

    def _supersede(self, old: Conversation, kept: Conversation) -> None:
        """Forget `old`, but not its file before `kept` is durable: a kill in between must not cost both."""
        self._persistence.hand_over(old, kept)
        self.evict(old, "superseded")

    def _is_held_already(self, kept: Conversation, existing: Conversation | None) -> bool:
        if len(kept.tokens) == 0:
            return True
        if existing is not None:  # a request that was cancelled early must not shorten its session
            return len(kept.tokens) < len(existing.tokens) and _is_one_line(kept, existing)
        return self._index.continuation_of(kept) is not None

    def _adopt(self, conversation: Conversation) -> None:
        """From an earlier process's file; of two versions the later one counts."""
        held = self.get(*conversation.key)
        if held is not None:
            older, newer = sorted((held, conversation), key=lambda c: c.session.last_used_s)
            self._persistence.forget(older)
            if newer is held:
                return
            self._remove(held)
        self.add(conversation)

    # --- other servers that share the disk

    def look_up(self, salt: str, session_id: str) -> None:
        """Whatever another server has stored under this name counts from now on, if it is later."""
        found = self._persistence.look_up(salt, session_id)
        self.follow_others()  # what was deleted under this name came before
        if found is not None:
            self._take_over(found)

    def follow_others(self) -> None:
        """Learn what other servers have stored and deleted since the last time."""
        stored, gone = self._persistence.changes()
        if gone:  # before what was stored under the same names afterwards
            for conversation in [c for c in self if c.disk_key in gone]:
                self._remove(conversation)  # not the file: whatever there is of that name is a later session's
                self._tally.evictions["deleted"] += 1
        for conversation in stored:
            self._take_over(conversation)

    def _take_over(self, found: Conversation) -> None:
        held = self.get(*found.key)
        if held is not None and held.version == found.version:
            held.session.is_pinned, held.session.ttl_s = found.session.is_pinned, found.session.ttl_s
            return
        is_at_work = any(lease.key == found.key for lease in self._ledger.leases)
        if is_at_work or (held is not None and found.session.num_requests <= held.session.num_requests):
            return
        if held is not None:
            self._remove(held)
        self.add(found)

    # --- changing place

    def load(self, conversation: Conversation) -> bool:
        """From disk to memory; False when its file cannot be read: it is forgotten, or at an earlier turn again."""
        if self._persistence.load(conversation):
            self._ledger.hold(conversation)
            return True
        self.fall_back(conversation, "unreadable")
        return False

    def unload(self, conversation: Conversation) -> None:
        """Out of memory; its file must be there."""
        assert conversation.disk_key is not None
        self._ledger.give_up(conversation)
        self._tally.spills["pressure"] += 1

    def replace_caches(self, conversation: Conversation, caches: Caches, kv_format: str, kv: KVBytes) -> None:
        """Exchange its caches for the same tokens' in another format; its file keeps the old ones for now."""
        self._ledger.give_up(conversation)
        self._persistence.outdate(conversation)
        conversation.caches, conversation.kv_format, conversation.kv = caches, kv_format, kv
        conversation.version = new_id()
        self._ledger.hold(conversation)

    def write_ahead(self, conversation: Conversation) -> None:
        """A file for one in memory, if it has none and the disk takes it."""
        has_none = conversation.caches is not None and conversation.disk_key is None
        if has_none and self._persistence.save(conversation):
            self._tally.spills["idle"] += 1

    def write_ahead_if_worthwhile(self, conversation: Conversation) -> None:
        """A file for one that somebody named or pinned, or that was found again."""
        session = conversation.session
        if conversation in self and (session.is_explicit or session.is_pinned or session.hits >= HOT_HITS):
            self.write_ahead(conversation)

    def write_all(self) -> None:
        """Before the process ends: a file for each that has none, the last used first."""
        for conversation in sorted(self, key=lambda c: c.session.last_used_s, reverse=True):
            self.write_ahead(conversation)

    # --- going

    def evict(self, conversation: Conversation, reason: str) -> None:
        """Forget it, its file included."""
        self._persistence.forget(conversation)
        self._remove(conversation)
        self._tally.evictions[reason] += 1

    def fall_back(self, conversation: Conversation, reason: str) -> None:
        """Forget it as it is now; where its file holds an earlier state, the session stays on disk in that."""
        earlier = self._persistence.earlier_state(conversation)
        if earlier is None:
            self.evict(conversation, reason)
            return
        self._remove(conversation)
        self._tally.evictions[reason] += 1
        self.add(earlier)

    def discard(self, conversation: Conversation) -> None:
        """Take back one that was just added and found no room; nobody has seen it."""
        self._remove(conversation)

    def drop_all(self) -> None:
        """Give all memory back, as it ran out; what has a file stays there."""
        for conversation in list(self):
            if conversation.disk_key is not None:
                self._ledger.give_up(conversation)
            else:
                self.fall_back(conversation, "out_of_memory")

    def expire(self, now_s: float, default_ttl_s: float, busy: set[Key]) -> None:
        """Forget sessions past their time to live, pinned ones only if the time is their own. 0: no limit."""
        for conversation in list(self):
            session = conversation.session
            session.last_used_s = min(session.last_used_s, now_s)  # by a file of a time when the clock was ahead
            ttl_s = session.ttl_s or (0.0 if session.is_pinned else default_ttl_s)
            is_over = bool(ttl_s) and now_s - session.last_used_s > ttl_s and conversation.key not in busy
            if is_over or self._persistence.is_lost(conversation):
                self.evict(conversation, "expired")

    def check_integrity(self) -> None:
        """Raises AssertionError when one is listed under another name than its own."""
        for salt, mine in self._by_salt.items():
            assert all(c.key == (salt, name) for name, c in mine.items()), "a name is wrong"

    def _remove(self, conversation: Conversation) -> None:
        mine = self._by_salt[conversation.salt]
        del mine[conversation.conversation_id]
        if not mine:
            del self._by_salt[conversation.salt]
        self._index.remove(conversation)
        self._ledger.give_up(conversation)


def _is_one_line(a: Conversation, b: Conversation) -> bool:
    """Whether the longer one begins with all of the shorter, computed by the same adapter."""
    return a.adapter == b.adapter and common_prefix_len(a.tokens, b.tokens) == min(len(a.tokens), len(b.tokens))


def _branch_of(session: Session) -> Session:
    session_id = new_id()
    times = session.last_used_s, session.last_used_s
    return Session(session_id, session.salt, *times, cache_key=session.cache_key, public_id=session_id)
