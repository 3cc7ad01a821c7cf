"""What one caller may hold: explicit sessions by number, sessions by bytes, pins by share of the budget.

A caller at a limit loses the least recently used of their own sessions first; only where all of them
are pinned or at work is a request refused. Nobody else notices. Pins are limited for all callers together as
well, since pinned memory is nobody else's.
"""

from __future__ import annotations

import logging

from turboserve.cache.idle import IdleConversations
from turboserve.cache.interfaces import Key
from turboserve.cache.ledger import Ledger
from turboserve.cache.sessions import Conversation, Session
from turboserve.cache.sizes import peak_bytes
from turboserve.cache.tally import Tally
from turboserve.cache.verdicts import Ask
from turboserve.errors import QuotaExceededError

log = logging.getLogger(__name__)

# Pinned memory never gives way, so that much of the budget always stays for everybody's requests.
MAX_PINNED_SHARE = 0.5

RETRY_AFTER_S = 60


class Quotas:
    """Over one memory's conversations. A limit of 0 is none."""

    def __init__(
        self,
        ledger: Ledger,
        idle: IdleConversations,
        tally: Tally,
        *,
        max_sessions: int,
        max_session_bytes: int,
        has_one_caller: bool,
    ) -> None:
        """max_sessions, max_session_bytes: of one caller. has_one_caller: nobody else ever pins anything."""
        self._ledger, self._idle, self._tally = ledger, idle, tally
        self._max_sessions, self._max_session_bytes = max_sessions, max_session_bytes
        self._has_one_caller = has_one_caller

    def check_admission(self, ask: Ask, kv_format: str) -> Conversation | None:
        """Whom a new named session pushes out, None: nobody. Raises QuotaExceededError."""
        request, most = ask.request, self._max_session_bytes
        pushed_out = None if request.session_id is None else self.check_new_session(request.tenant, request.session_id)
        needed = peak_bytes(self._ledger.family.runtime(kv_format), ask.num_tokens)
        if request.session_id is not None and ask.order is None:  # not of one that was preempted
            self._check_pinned_growth((request.tenant, request.session_id), needed)
        pinned = sum(c.kv_bytes for c in self._idle.of(request.tenant) if c.session.is_pinned)
        if most and needed + pinned > most:
            raise self._refuse(
                f"This request needs {needed:,} bytes of KV cache beside {pinned:,} pinned ones; one caller may hold "
                f"{most:,}. Shorten the prompt, lower max_tokens or unpin sessions.",
                "max_session_bytes_per_caller",
            )
        return pushed_out

    def _check_pinned_growth(self, key: Key, num_bytes: int) -> None:
        held = self._idle.get(*key)
        if held is not None and held.session.is_pinned:
            self.check_growth(key, num_bytes)

    def check_new_session(self, salt: str, session_id: str, source: Session | None = None) -> Conversation | None:
        """Who must go before there may be a session of that name, None: nobody.

        Raises QuotaExceededError when the caller has too many named sessions and none but `source` could go.
        """
        most = self._max_sessions
        if not most or self._idle.get(salt, session_id) is not None:
            return None
        running = {x.conversation_id for x in self._ledger.leases if x.salt == salt and x.session.is_explicit}
        if session_id in running:
            return None
        named = [c for c in self._idle.of(salt) if c.session.is_explicit]
        if len(running | {c.conversation_id for c in named}) < most:
            return None
        busy = running | ({source.session_id} if source is not None else set())
        may_go = [c for c in named if not c.session.is_pinned and c.conversation_id not in busy]
        if not may_go:
            raise self._refuse(
                f"All of this caller's {most:,} sessions are pinned or at work: delete or unpin one.",
                "max_sessions_per_caller",
            )
        return min(may_go, key=lambda c: c.session.last_used_s)

    def check_pin(self, key: Key, num_bytes: int) -> None:
        """Raises QuotaExceededError when a session of that size, pinned, would leave others too little.

        All callers together may pin MAX_PINNED_SHARE of the budget, one of several callers half of what the others'
        pins leave of that: so there always is something left to pin for who comes next.
        """
        mine, others = self._pinned(key)
        most = self._most_pinned
        if others + mine + num_bytes > most:
            raise self._refuse_pin(num_bytes, others + mine, f"{most:,} that may be pinned in this server")
        if not self._is_alone(key) and mine + num_bytes > (most - others) // 2:
            share = (most - others) // 2
            raise self._refuse_pin(num_bytes, mine, f"{share:,} that one caller may pin now in this server")

    def check_growth(self, key: Key, num_bytes: int) -> None:
        """The same of one that is pinned already; what others have pinned since is not held against it."""
        mine, others = self._pinned(key)
        most = self._most_grown(key, others)
        if mine + num_bytes > most:
            raise self._refuse_pin(num_bytes, mine, f"{most:,} that its caller may pin in this server")

    def unpin_if_too_large(self, kept: Conversation) -> None:
        """Of an answer whose length was not known when it began; pinned bytes stay within the limit."""
        if not kept.session.is_pinned:
            return
        mine, others = self._pinned(kept.key)
        if mine + kept.kv.total > self._most_grown(kept.key, others):
            kept.session.is_pinned = False
            log.warning("a session of %s bytes has outgrown what may be pinned, and is unpinned", f"{kept.kv.total:,}")

    def _most_grown(self, key: Key, others_bytes: int) -> int:
        """What a caller's pinned sessions may grow to beside those of others."""
        most = self._most_pinned
        return min(most - others_bytes, most if self._is_alone(key) else most // 2)

    @property
    def _most_pinned(self) -> int:
        return int(MAX_PINNED_SHARE * self._ledger.budget_bytes)

    def _is_alone(self, key: Key) -> bool:
        """Whether there can be no other caller; without keys all are one."""
        return self._has_one_caller or not key[0]

    def _pinned(self, but: Key) -> tuple[int, int]:
        """Pinned bytes of that session's caller, itself left out, and of all others.

        What lies on disk counts too, for it is read back by its next request.
        """
        held = {c.key: c.kv.total for c in self._idle if c.session.is_pinned}
        for lease in self._ledger.leases:
            if lease.session.is_pinned:
                held[lease.key] = max(held.get(lease.key, 0), lease.reserved_bytes)
        held.pop(but, None)
        mine = sum(num_bytes for (salt, _), num_bytes in held.items() if salt == but[0])
        return mine, sum(held.values()) - mine

    def _refuse_pin(self, num_bytes: int, pinned_bytes: int, allowed: str) -> QuotaExceededError:
        return self._refuse(
            f"{num_bytes:,} pinned bytes beside {pinned_bytes:,} would pass the {allowed}: unpin a session.",
            "kv_budget",
        )

    def shrink(self, newest: Conversation) -> None:
        """Forget the oldest conversations of the newest one's caller until their bytes are within the quota.

        Nameless ones go first.
        """
        most = self._max_session_bytes
        if not most:
            return
        mine = [c for c in self._idle.of(newest.salt) if c.caches is not None]
        held = sum(c.kv_bytes for c in mine)
        may_go = [c for c in mine if c is not newest and not c.session.is_pinned]
        for conversation in sorted(may_go, key=lambda c: (c.session.is_explicit, c.session.last_used_s)):
            if held <= most:
                return
            held -= conversation.kv_bytes
            self._idle.evict(conversation, "quota")

    def _refuse(self, message: str, param: str) -> QuotaExceededError:
        self._tally.refusals["quota"] += 1
        return QuotaExceededError(message, param=param, retry_after_s=RETRY_AFTER_S)
