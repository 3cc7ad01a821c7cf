"""Leases: what a running request is given to begin with, and the room that it reserves.

Owns their life: opened, grown, begun anew from a longer prefix, closed. Whether there is room is decided
before (memory.py) and made elsewhere (room.py); without it nothing in here goes through.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from turboserve.cache.idle import IdleConversations
from turboserve.cache.interfaces import CacheFamily, CacheRuntime, Caches
from turboserve.cache.ledger import Ledger
from turboserve.cache.prefix_index import Match, PrefixIndex
from turboserve.cache.sessions import Conversation, Lease, Session, new_id
from turboserve.cache.sizes import pages_bytes, peak_bytes
from turboserve.cache.tally import Tally
from turboserve.cache.verdicts import Ask


class Beginning(NamedTuple):
    """Caches that hold the first `length` tokens of a prompt, and where they come from."""

    kv_format: str
    runtime: CacheRuntime
    caches: Caches
    length: int
    match: Match | None


class Leases:
    """All leases of one memory; the ledger has their list, and counts them."""

    def __init__(self, ledger: Ledger, index: PrefixIndex, idle: IdleConversations, tally: Tally) -> None:
        self._ledger, self._index, self._idle, self._tally = ledger, index, idle, tally
        self._orders = itertools.count()

    @property
    def _family(self) -> CacheFamily:
        return self._ledger.family

    def bytes_to_open(self, ask: Ask, wanted_format: str, match: Match | None) -> int:
        """What a lease that begins there adds to the committed bytes; reading it from disk, if it lies there, too."""
        if match is None:
            return peak_bytes(self._family.runtime(wanted_format), ask.num_tokens)
        holder = match.holder
        runtime = self._family.runtime(holder.kv_format)
        to_load = holder.kv.total if isinstance(holder, Conversation) and holder.caches is None else 0
        return to_load + max(0, peak_bytes(runtime, ask.num_tokens) - pages_bytes(runtime, match.usable_len))

    def is_there(self, match: Match) -> bool:
        """Whether what was found still is: a preempted request's cache is an idle conversation's by now."""
        holder = match.holder
        is_held = holder in self._ledger.leases if isinstance(holder, Lease) else holder in self._idle
        return is_held and self._index.usable(holder, match.usable_len) >= match.usable_len

    def begin(self, wanted_format: str, match: Match | None) -> Beginning:
        """Caches to begin with, sharing what was found in memory; they are the caller's to release."""
        if match is None:
            runtime = self._family.runtime(wanted_format)
            return Beginning(wanted_format, runtime, runtime.make_cache(), 0, None)
        holder, length = match.holder, match.usable_len
        runtime = self._family.runtime(holder.kv_format)
        if isinstance(holder, Lease):
            assert holder.running is not None
            caches = holder.running.fork(length)
        else:
            assert holder.caches is not None
            caches = runtime.fork(holder.caches, length)
        return Beginning(holder.kv_format, runtime, caches, length, match)

    def open(self, ask: Ask, wanted_format: str, begun: Beginning, now_s: float) -> Lease:
        """A new lease that owns these caches; there must be room for it."""
        match = begun.match
        lease = Lease(
            request=ask.request,
            session=self._session_for(ask, match),
            prompt=np.asarray(ask.prompt, np.int32),
            kv_format=begun.kv_format,
            wanted_format=wanted_format,
            runtime=begun.runtime,
            caches=begun.caches,
            cached_len=begun.length,
            reserved_tokens=ask.num_tokens,
            reserved_bytes=peak_bytes(begun.runtime, ask.num_tokens),
            order=next(self._orders) if ask.order is None else ask.order,
            adapter=ask.adapter,
            source=match.holder.session if match is not None else None,
        )
        self._ledger.open(lease)
        self._index.add(lease)
        self._note_use(lease, now_s, is_new=ask.order is None)
        return lease

    def _note_use(self, lease: Lease, now_s: float, *, is_new: bool) -> None:
        """is_new: else its request was preempted, and has been counted."""
        session, source = lease.session, lease.source
        session.created_s = session.created_s or now_s
        session.last_used_s = now_s
        if not is_new:
            return
        if source is not None:
            source.hits += 1
            source.last_used_s = now_s
        self._tally.look_up(len(lease.prompt), lease.cached_len, is_hit=source is not None)

    def _session_for(self, ask: Ask, match: Match | None) -> Session:
        """The session that the answer will belong to; times are set when it is used."""
        request = ask.request
        if request.session_id is not None:
            session = self._named(request.tenant, request.session_id)
            if session is None:
                session = Session(request.session_id, request.tenant, 0.0, 0.0, cache_key=request.cache_key)
            session.is_explicit = True  # also one that had an opaque id so far: its caller asked for it by that
            return session
        if match is not None and match.is_continuation and not match.holder.session.is_explicit:
            return match.holder.session
        session_id = new_id()
        return Session(session_id, request.tenant, 0.0, 0.0, cache_key=request.cache_key, public_id=session_id)

    def _named(self, salt: str, session_id: str) -> Session | None:
        """A session of that name, idle or at work."""
        held = self._idle.get(salt, session_id)
        if held is not None:
            return held.session
        return next((x.session for x in self._ledger.leases if x.key == (salt, session_id)), None)

    def grow(self, lease: Lease, num_tokens: int) -> None:
        """Reserve room for `num_tokens` in all; there must be room."""
        lease.reserved_bytes = max(lease.reserved_bytes, peak_bytes(lease.runtime, num_tokens))
        lease.reserved_tokens = num_tokens

    def longer_start(self, lease: Lease) -> Match | None:
        """A longer prefix of its prompt than it holds, in memory and in the same format."""
        match = self._index.find(
            lease.request,
            lease.prompt,
            lease.wanted_format,
            adapter=lease.adapter,
            must_be_exact=True,
            in_memory_only=True,
        )
        if match is None or match.holder is lease or match.usable_len <= lease.held_len:
            return None
        return match if match.holder.kv_format == lease.kv_format else None

    def restart(self, lease: Lease, match: Match) -> None:
        """Give it caches that begin there; those that it had are the caller's to release."""
        gained = match.usable_len - lease.held_len
        lease.caches, lease.cached_len = self.begin(lease.wanted_format, match).caches, match.usable_len
        lease.source = match.holder.session
        match.holder.session.hits += 1
        self._tally.prefix_hit_tokens += gained
        self._ledger.may_fall()  # what it computed itself is now held twice, and soon once

    def close(self, lease: Lease) -> None:
        """It ends; its caches are the caller's."""
        self._index.remove(lease)
        self._ledger.close(lease)
