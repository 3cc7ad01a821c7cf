"""Opening, starting and growing leases: what a request is given to begin with, and the room it reserves.

The manager's other half: it owns the state, this the order of the steps. A lease is opened first, with
all that it shares already in its hands, and then the ladder makes room; without room it is closed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from turboserve.cache.holders import Conversation, Lease, Session, new_id
from turboserve.cache.pressure import Need
from turboserve.cache.runtime import Caches, pages_bytes, peak_bytes, total_bytes
from turboserve.cache.sessions import Match, Wanted

if TYPE_CHECKING:
    from turboserve.cache.manager import CacheManager


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for a lease. `num_tokens`: prompt and answer. kv_format None: the session's own, else the server's."""

    salt: str
    prompt: Sequence[int]
    num_tokens: int
    kv_format: str | None = None
    session_id: str | None = None
    cache_key: str | None = None
    order: int | None = None  # of its first admission, when it was preempted


def try_lease(manager: CacheManager, ask: Ask, now_s: float) -> Lease | None:
    """Room for an ask, starting from the longest prefix that its caller has; None: wait.

    Raises ContextLengthError when it could not be had with the whole budget, QuotaExceededError, and
    OverloadedError when waiting would free nothing.
    """
    manager.expire(now_s)
    wanted = Wanted(
        salt=ask.salt,
        kv_format=manager.format_for(ask.salt, ask.session_id, ask.kv_format),
        tokens=np.asarray(ask.prompt, np.int32),
        session_id=ask.session_id,
        cache_key=ask.cache_key,
        exact_format=ask.kv_format is not None,
    )
    manager.check_can_fit(ask.num_tokens, wanted.kv_format)
    manager.quotas.check_admission(ask, wanted.kv_format)
    match = _find(manager, wanted, ask, now_s)
    lease = _open_lease(manager, ask, wanted, match)
    if not _make_room(manager, lease, match, now_s):
        return None
    _count_lookup(manager, wanted, lease, match, now_s)
    return lease


def _find(manager: CacheManager, wanted: Wanted, ask: Ask, now_s: float) -> Match | None:
    """The best match, in memory by now; one on disk counts only if it can be brought back."""
    while True:
        match = manager.store.find(wanted)
        if match is None or not isinstance(match.holder, Conversation) or match.holder.caches is not None:
            return match
        if _restore(manager, match.holder, match.usable_len, ask.num_tokens, now_s):
            continue  # it is found again, and now its exact ends can be used too
        if match.holder in manager.store:  # no room for it and the request together now
            return None


def _restore(manager: CacheManager, conversation: Conversation, shared_len: int, num_tokens: int, now_s: float) -> bool:
    """From disk to memory, with room for a lease beside it; a file that cannot be read is forgotten."""
    runtime = manager.family.runtime(conversation.kv_format)
    own = total_bytes(conversation.kv)
    more = max(0, peak_bytes(runtime, num_tokens) - pages_bytes(runtime, shared_len))
    if own + more > manager.budget_bytes:
        return False
    return manager.ladder.relieve(Need(now_s, extra_bytes=more)) and manager.load(conversation, now_s)


def _open_lease(manager: CacheManager, ask: Ask, wanted: Wanted, match: Match | None) -> Lease:
    """Fork what was found and reserve; whether there is room for it is looked at afterwards."""
    holder = match.holder if match is not None else None
    kv_format = holder.kv_format if holder is not None else wanted.kv_format
    runtime = manager.family.runtime(kv_format)
    usable_len = match.usable_len if match is not None else 0
    lease = Lease(
        session=_session_for(manager, ask, match),
        prompt=wanted.tokens,
        kv_format=kv_format,
        wanted_format=wanted.kv_format,
        runtime=runtime,
        caches=_fork(manager, holder, usable_len) if holder is not None else runtime.make_cache(),
        cached_len=usable_len,
        reserved_tokens=ask.num_tokens,
        reserved_bytes=peak_bytes(runtime, ask.num_tokens),
        order=next(manager.orders) if ask.order is None else ask.order,
        source=holder.session if holder is not None else None,
    )
    manager.leases.append(lease)
    manager.store.enter(lease)
    return lease


def _fork(manager: CacheManager, holder: Conversation | Lease, length: int) -> Caches:
    if isinstance(holder, Lease):
        assert holder.running is not None
        return holder.running.fork(length)
    assert holder.caches is not None
    return manager.family.runtime(holder.kv_format).fork(holder.caches, length)


def _session_for(manager: CacheManager, ask: Ask, match: Match | None) -> Session:
    """The session that the answer will belong to; times are set when the lease is certain."""
    if ask.session_id is not None:
        session = _named(manager, ask.salt, ask.session_id)
        if session is None:
            session = Session(ask.session_id, ask.salt, 0.0, 0.0, cache_key=ask.cache_key)
        session.is_explicit = True  # also one that had an opaque id so far: its caller asked for it by that
        return session
    if match is not None and match.is_continuation and not match.holder.session.is_explicit:
        return match.holder.session
    session_id = new_id()
    return Session(session_id, ask.salt, 0.0, 0.0, cache_key=ask.cache_key, public_id=session_id)


def _named(manager: CacheManager, salt: str, session_id: str) -> Session | None:
    """A session of that name, idle or at work."""
    held = manager.store.get(salt, session_id)
    if held is not None:
        return held.session
    return next((x.session for x in manager.leases if x.salt == salt and x.conversation_id == session_id), None)


def _make_room(manager: CacheManager, lease: Lease, match: Match | None, now_s: float) -> bool:
    """Whether the ladder found room for a lease just opened; without, it is closed again."""
    source = match.holder if match is not None and isinstance(match.holder, Conversation) else None
    ladder, need = manager.ladder, Need(now_s, lease=lease, source=source, may_preempt=True)
    evictions = sum(manager.counts.evictions.values()) + sum(manager.counts.spills.values())
    has_room = ladder.relieve(need)
    if sum(manager.counts.evictions.values()) + sum(manager.counts.spills.values()) > evictions:
        manager.changes += 1
    if has_room:
        return True
    missing = ladder.shortfall(need)
    manager.close_lease(lease, has_freed=False)
    lease.runtime.release(lease.caches)
    if not manager.leases:  # only what is pinned stands in the way
        manager.counts.refusals["no_room"] += 1
        raise manager.no_room(lease.reserved_bytes, lease.reserved_bytes - missing)
    return False


def _count_lookup(manager: CacheManager, wanted: Wanted, lease: Lease, match: Match | None, now_s: float) -> None:
    session = lease.session
    session.created_s = session.created_s or now_s
    session.last_used_s = now_s
    if match is not None:
        match.holder.session.hits += 1
        match.holder.session.last_used_s = now_s
    manager.counts.lookups += 1
    manager.counts.hits += match is not None
    manager.counts.query_tokens += len(wanted.tokens)
    manager.counts.cached_tokens += lease.cached_len


def better_start(manager: CacheManager, lease: Lease) -> tuple[Caches, int] | None:
    """(caches, length) of a longer prefix than the lease holds, once another request computed one; the caller swaps."""
    wanted = Wanted(lease.salt, lease.wanted_format, lease.prompt, exact_format=True)
    match = manager.store.find(wanted)
    if match is None or match.holder is lease or match.usable_len <= lease.held_len:
        return None
    if match.holder.kv_format != lease.kv_format:
        return None
    if isinstance(match.holder, Conversation) and match.holder.caches is None:
        return None
    gained = match.usable_len - lease.held_len
    caches = _fork(manager, match.holder, match.usable_len)
    lease.caches, lease.cached_len, lease.source = caches, match.usable_len, match.holder.session
    match.holder.session.hits += 1
    manager.counts.cached_tokens += gained
    return caches, match.usable_len


def try_extend(manager: CacheManager, lease: Lease, num_tokens: int, now_s: float) -> bool:
    """Grow a lease to `num_tokens`, at the cost of younger ones if need be; False leaves it as it was."""
    before = lease.reserved_bytes
    lease.reserved_bytes = max(before, peak_bytes(lease.runtime, num_tokens))
    if not manager.ladder.relieve(Need(now_s, lease=lease, may_preempt=True)):
        lease.reserved_bytes = before
        return False
    lease.reserved_tokens = num_tokens
    manager.changes += 1
    return True
