"""Sessions as their callers see and command them: list, inspect, fork, export, import, pin, limit in time, delete.

A command names its caller's salt, and nothing beyond that is seen. Raises the errors that HTTP shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from turboserve.cache.idle import IdleConversations
from turboserve.cache.interfaces import Caches
from turboserve.cache.ledger import Ledger
from turboserve.cache.persistence import Persistence
from turboserve.cache.prefix_index import Match, PrefixIndex
from turboserve.cache.quota import Quotas
from turboserve.cache.radix import Tokens
from turboserve.cache.room import Need, Room
from turboserve.cache.session_tree import page_counts, prefix_nodes
from turboserve.cache.sessions import Conversation, Holder, Lease, Session, new_id
from turboserve.cache.tally import Tally
from turboserve.cache.transfers import Transfers
from turboserve.errors import OverloadedError, SessionBusyError, SessionExistsError, SessionNotFoundError
from turboserve.messages import (
    CheckImport,
    DeleteSession,
    ExportedSession,
    ExportSession,
    ForkSession,
    GetSession,
    GetSessionTree,
    ImportSession,
    ListSessions,
    SessionCommand,
    SessionInfo,
    SessionPage,
    SessionTree,
    UpdateSession,
)

# Counting references walks all pages of a session between two steps of everybody's requests, which must not be felt:
# so many of 128K tokens each take about 20 ms.
MAX_TREE_SESSIONS = 100

SessionAnswer = SessionInfo | SessionPage | SessionTree | ExportedSession | None


class SessionCommands:
    """Callers' commands on one memory's sessions. None of them can preempt a request."""

    def __init__(
        self,
        ledger: Ledger,
        index: PrefixIndex,
        idle: IdleConversations,
        room: Room,
        quotas: Quotas,
        persistence: Persistence,
        tally: Tally,
        transfers: Transfers,
    ) -> None:
        self._ledger, self._index, self._idle, self._room = ledger, index, idle, room
        self._quotas, self._persistence, self._tally, self._transfers = quotas, persistence, tally, transfers

    def answer(self, command: SessionCommand, now_s: float) -> SessionAnswer:
        """Do it, and answer as messages.py says of each command.

        Raises SessionNotFoundError, SessionBusyError, SessionExistsError, SessionImportError, KVFormatError,
        QuotaExceededError, OverloadedError.
        """
        match command:
            case ListSessions():
                return self._list(command)
            case GetSession():
                return self._info(self._holder(command.tenant, command.session_id))
            case ForkSession():
                return self._fork(command, now_s)
            case UpdateSession():
                return self._update(command)
            case DeleteSession():
                self._delete(command)
                return None
            case GetSessionTree():
                return self._tree(command.tenant)
            case ExportSession():
                return self._transfers.copy_of(self._holder(command.tenant, command.session_id))
            case CheckImport():
                self._transfers.check(command.fields)
                with self._new_name(command.tenant, command.session_id):
                    return None
            case ImportSession():
                return self._import(command, now_s)

    def _tree(self, salt: str) -> SessionTree:
        holders = self._newest_first(salt)
        shown = holders[:MAX_TREE_SESSIONS]
        return SessionTree(
            sessions=tuple((self._info(holder), page_counts(self._ledger.family, holder)) for holder in shown),
            nodes=prefix_nodes(self._index, salt, shown),
            has_more=len(shown) < len(holders),
        )

    def _newest_first(self, salt: str) -> list[Holder]:
        return sorted(
            self._holders(salt).values(), key=lambda h: (h.session.last_used_s, h.session.session_id), reverse=True
        )

    def _list(self, command: ListSessions) -> SessionPage:
        salt, after = command.tenant, command.after
        holders = self._newest_first(salt)
        start = 0
        if after is not None:
            self._holder(salt, after)
            start = 1 + next(i for i, h in enumerate(holders) if h.session.session_id == after)
        end = start + command.limit
        return SessionPage(tuple(self._info(h) for h in holders[start:end]), has_more=end < len(holders))

    def _fork(self, command: ForkSession, now_s: float) -> SessionInfo:
        """A named session with the same tokens, sharing all pages."""
        salt = command.tenant
        holder = self._holder(salt, command.session_id)
        name = command.new_id or new_id()
        with self._new_name(salt, name):
            return self._fork_as(name, holder, now_s)

    def _fork_as(self, name: str, holder: Holder, now_s: float) -> SessionInfo:
        salt = holder.salt
        pushed_out = self._quotas.check_new_session(salt, name, holder.session)
        caches, tokens = self._fork_caches(holder, now_s)
        runtime = self._ledger.family.runtime(holder.kv_format)
        session = Session(name, salt, now_s, now_s, is_explicit=True, cache_key=holder.session.cache_key)
        forked = Conversation(
            session,
            tokens,
            holder.kv_format,
            holder.wanted_format,
            caches,
            runtime.measure(caches),
            adapter=holder.adapter,
        )
        holder.session.hits += 1
        self._take_in(forked, pushed_out, now_s)
        return self._info(forked)

    @contextmanager
    def _new_name(self, salt: str, name: str) -> Iterator[None]:
        """The name is a new session's. Raises SessionExistsError where there is one, here or in a shared folder.

        What other servers have stored is looked at once none of them can store more.
        """
        with self._persistence.claimed(salt, name) as is_free:
            if not is_free:
                raise SessionExistsError(
                    f"Another server writes a session {name[:128]!r} now: choose another id, or try again later.",
                    param="id",
                )
            self._idle.look_up(salt, name)
            if name in self._holders(salt):
                raise SessionExistsError(
                    f"There is a session {name[:128]!r} already: choose another id, or delete it first.", param="id"
                )
            yield

    def _import(self, command: ImportSession, now_s: float) -> SessionInfo:
        """A named session with what another server computed; all is checked again, for time has passed."""
        self._transfers.check(command.fields)
        with self._new_name(command.tenant, command.session_id):
            return self._take(command, now_s)

    def _take(self, command: ImportSession, now_s: float) -> SessionInfo:
        pushed_out = self._quotas.check_new_session(command.tenant, command.session_id)
        num_bytes = sum(array.nbytes for array in command.arrays)
        if not self._room.make(Need(num_bytes), now_s):
            raise self._no_room(num_bytes)
        taken = self._transfers.restore(command, now_s)
        self._take_in(taken, pushed_out, now_s)
        return self._info(taken)

    def _fork_caches(self, holder: Holder, now_s: float) -> tuple[Caches, Tokens]:
        """Caches of all that is there now."""
        if isinstance(holder, Lease):
            running = holder.running
            length = running.usable_prefix(running.held_len()) if running is not None else 0
            if running is None or length == 0:
                raise SessionBusyError("This session has nothing to fork yet: its first request is being read.")
            return running.fork(length), np.asarray(running.held_tokens()[:length], np.int32)
        if holder.caches is None:
            self._load(holder, now_s)
        assert holder.caches is not None
        return self._ledger.family.runtime(holder.kv_format).fork(holder.caches, len(holder.tokens)), holder.tokens

    def _load(self, conversation: Conversation, now_s: float) -> None:
        """From disk to memory. With a file that cannot be read the session is gone."""
        if not self._room.make(Need(conversation.kv.total), now_s):
            raise self._no_room(conversation.kv.total)
        if not self._idle.load(conversation):
            raise SessionNotFoundError(conversation.conversation_id)

    def _take_in(self, forked: Conversation, pushed_out: Conversation | None, now_s: float) -> None:
        """Hold it; what it shares is booked already, so that only its own bytes need room.

        pushed_out: the session that makes way for it, if it is taken in.
        """
        self._idle.add(forked)
        need = Need(source=Match(forked, 0, is_continuation=False), over_quota=pushed_out)
        relief = self._room.plan(need, now_s)  # which may come to what was just added, and then costs nobody anything
        is_kept = relief is not None and all(step.key != forked.key for step in relief.steps)
        has_room = is_kept and self._room.make(need, now_s)
        if not has_room or forked not in self._idle:
            if forked in self._idle:
                self._idle.discard(forked)
            raise self._no_room(forked.kv.exact + forked.kv.uncompressed)
        self._quotas.shrink(forked)
        self._idle.write_ahead_if_worthwhile(forked)
        self._room.make(Need(), now_s)

    def _no_room(self, num_bytes: int) -> OverloadedError:
        self._tally.refusals["no_room"] += 1
        return self._ledger.no_room(num_bytes, -self._ledger.missing_bytes())

    def _update(self, command: UpdateSession) -> SessionInfo:
        holder = self._holder(command.tenant, command.session_id)
        session, idle = holder.session, self._idle.get(*holder.key)
        if command.is_pinned and not session.is_pinned:
            running = holder.reserved_bytes if isinstance(holder, Lease) else 0
            self._quotas.check_pin(holder.key, max(running, idle.kv.total if idle is not None else 0))
        session.is_pinned = session.is_pinned if command.is_pinned is None else command.is_pinned
        session.ttl_s = session.ttl_s if command.ttl_s is None else (command.ttl_s or None)
        if idle is not None:
            self._persistence.rewrite(idle)
        self._ledger.may_fall()  # what was unpinned may give way now
        return self._info(self._holder(command.tenant, command.session_id))

    def _delete(self, command: DeleteSession) -> None:
        holder = self._holder(command.tenant, command.session_id)
        if any(lease.session is holder.session for lease in self._ledger.leases):
            raise SessionBusyError("A request is running in this session: cancel it first, or try again later.")
        assert isinstance(holder, Conversation)
        self._idle.evict(holder, "deleted")

    def _holders(self, salt: str) -> dict[str, Holder]:
        """By name; a running request counts before the idle cache that it began with."""
        found: dict[str, Holder] = {c.conversation_id: c for c in self._idle.of(salt)}
        found.update({x.conversation_id: x for x in self._ledger.leases if x.salt == salt})
        return found

    def _holder(self, salt: str, session_id: str) -> Holder:
        holder = self._holders(salt).get(session_id)
        if holder is None:
            raise SessionNotFoundError(session_id)
        return holder

    def _info(self, holder: Holder) -> SessionInfo:
        """As its caller sees it; of a running one, the cache as it is now."""
        session, idle = holder.session, self._idle.get(*holder.key)
        wall_offset_s = self._persistence.wall_offset()
        return SessionInfo(
            session_id=session.session_id,
            is_explicit=session.is_explicit,
            tokens=holder.held_len,
            kv=holder.measure() if isinstance(holder, Lease) else holder.kv,
            kv_format=holder.kv_format,
            tier=holder.tier,
            hits=session.hits,
            created_unix_s=session.created_s + wall_offset_s,
            last_used_unix_s=session.last_used_s + wall_offset_s,
            is_pinned=session.is_pinned,
            ttl_s=session.ttl_s,
            requests=session.num_requests,
            disk_bytes=idle.disk_bytes if idle is not None else 0,
        )
