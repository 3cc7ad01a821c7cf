"""Sessions as their callers see and command them: list, inspect, fork, pin, set a time to live, delete.

Every method takes the caller's salt first and sees nothing beyond it. Raises errors that HTTP shows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from turboserve.cache.holders import Conversation, Holder, Lease, Session, new_id
from turboserve.cache.manager import CacheManager
from turboserve.cache.policy import Tokens
from turboserve.cache.runtime import CacheBytes, Caches
from turboserve.errors import OverloadedError, SessionBusyError, SessionExistsError, SessionNotFoundError


class SessionView(NamedTuple):
    """A session and where its cache is. A running one shows the running cache."""

    session: Session
    holder: Holder
    kv: CacheBytes
    num_tokens: int
    disk_bytes: int


class SessionDesk:
    """Commands on one manager's sessions."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager

    def list_page(self, salt: str, limit: int, after: str | None, now_s: float) -> tuple[list[SessionView], bool]:
        """At most `limit` sessions by last use, newest first, following `after`; whether more follow."""
        self._manager.expire(now_s)
        holders = sorted(
            self._holders(salt).values(), key=lambda h: (h.session.last_used_s, h.session.session_id), reverse=True
        )
        start = 0
        if after is not None:
            self._holder(salt, after)
            start = 1 + next(i for i, h in enumerate(holders) if h.session.session_id == after)
        return [_view(h, self._idle(h)) for h in holders[start : start + limit]], start + limit < len(holders)

    def get(self, salt: str, session_id: str, now_s: float) -> SessionView:
        self._manager.expire(now_s)
        holder = self._holder(salt, session_id)
        return _view(holder, self._idle(holder))

    def fork(self, salt: str, session_id: str, new_session_id: str | None, now_s: float) -> SessionView:
        """A named session with the same tokens, sharing all pages."""
        manager = self._manager
        holder = self._holder(salt, session_id)
        name = new_session_id or new_id()
        if name in self._holders(salt):
            raise SessionExistsError(f"There is a session {name[:128]!r} already.", param="session_id")
        manager.quotas.check_new_session(salt, name, holder.session)
        caches, tokens = self._fork_caches(holder, now_s)
        runtime = manager.family.runtime(holder.kv_format)
        session = Session(name, salt, now_s, now_s, is_explicit=True, cache_key=holder.session.cache_key)
        forked = Conversation(session, tokens, holder.kv_format, holder.wanted_format, caches, runtime.measure(caches))
        holder.session.hits += 1
        if not manager.try_take_in(forked, now_s):
            raise self._no_room(forked.kv.exact + forked.kv.uncompressed)
        return _view(forked, forked)

    def _fork_caches(self, holder: Holder, now_s: float) -> tuple[Caches, Tokens]:
        """Caches of all that is there now."""
        if isinstance(holder, Lease):
            running = holder.running
            length = running.usable_prefix(running.held_len()) if running is not None else 0
            if running is None or length == 0:
                raise SessionBusyError("This session has nothing to fork yet: its first request is being read.")
            return running.fork(length), np.asarray(running.held_tokens()[:length], np.int32)
        if holder.caches is None and not self._manager.load(holder, now_s):
            raise self._no_room(holder.kv.compressed + holder.kv.exact)
        assert holder.caches is not None
        runtime = self._manager.family.runtime(holder.kv_format)
        return runtime.fork(holder.caches, len(holder.tokens)), holder.tokens

    def _no_room(self, num_bytes: int) -> OverloadedError:
        manager = self._manager
        manager.counts.refusals["no_room"] += 1
        return manager.no_room(num_bytes, manager.budget_bytes - manager.committed_bytes)

    def update(
        self, salt: str, session_id: str, now_s: float, *, is_pinned: bool | None, ttl_s: float | None
    ) -> SessionView:
        """None leaves a value; a `ttl_s` of 0 takes the session's own limit away."""
        holder = self._holder(salt, session_id)
        session = holder.session
        idle = self._idle(holder)
        if is_pinned and not session.is_pinned and idle is not None:
            self._manager.quotas.check_pin(idle)
        session.is_pinned = session.is_pinned if is_pinned is None else is_pinned
        session.ttl_s = session.ttl_s if ttl_s is None else (ttl_s or None)
        if idle is not None:
            self._manager.persistence.rewrite(idle, self._manager.wall_offset_s)
        self._manager.changes += 1  # what was unpinned may give way now
        return self.get(salt, session_id, now_s)

    def delete(self, salt: str, session_id: str) -> None:
        holder = self._holder(salt, session_id)
        if any(lease.session is holder.session for lease in self._manager.leases):
            raise SessionBusyError("A request is running in this session: cancel it first, or try again later.")
        assert isinstance(holder, Conversation)
        self._manager.evict(holder, "deleted")

    def _holders(self, salt: str) -> dict[str, Holder]:
        """By name; a running request counts before the idle cache that it began with."""
        found: dict[str, Holder] = {c.conversation_id: c for c in self._manager.store.of(salt)}
        found.update({x.conversation_id: x for x in self._manager.leases if x.salt == salt})
        return found

    def _holder(self, salt: str, session_id: str) -> Holder:
        holder = self._holders(salt).get(session_id)
        if holder is None:
            raise SessionNotFoundError(session_id)
        return holder

    def _idle(self, holder: Holder) -> Conversation | None:
        return self._manager.store.get(holder.salt, holder.session.session_id)


def _view(holder: Holder, idle: Conversation | None) -> SessionView:
    disk_bytes = idle.disk_bytes if idle is not None else 0
    if isinstance(holder, Conversation):
        return SessionView(holder.session, holder, holder.kv, len(holder.tokens), disk_bytes)
    kv = holder.running.measure() if holder.running is not None else holder.runtime.measure(holder.caches)
    return SessionView(holder.session, holder, kv, holder.held_len, disk_bytes)
