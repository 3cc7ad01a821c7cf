"""What one caller may hold: explicit sessions by number, sessions by bytes, pins by share of the budget.

A caller at a limit loses the least recently used of their own sessions first; only where all of them
are pinned or at work is a request refused. Nobody else notices.
"""

from __future__ import annotations

from turboserve.cache.idle import IdleConversations
from turboserve.cache.ledger import Ledger
from turboserve.cache.sessions import Conversation, Session
from turboserve.cache.sizes import peak_bytes
from turboserve.cache.tally import Tally
from turboserve.cache.verdicts import Ask
from turboserve.errors import QuotaExceededError

# Pinned memory never gives way, so that much of the budget always stays for everybody's requests.
MAX_PINNED_SHARE = 0.5

RETRY_AFTER_S = 60


class Quotas:
    """Over one memory's conversations. A limit of 0 is none."""

    def __init__(
        self, ledger: Ledger, idle: IdleConversations, tally: Tally, *, max_sessions: int, max_session_bytes: int
    ) -> None:
        """max_sessions, max_session_bytes: of one caller."""
        self._ledger, self._idle, self._tally = ledger, idle, tally
        self._max_sessions, self._max_session_bytes = max_sessions, max_session_bytes

    def check_admission(self, ask: Ask, kv_format: str) -> Conversation | None:
        """Whom a new named session pushes out, None: nobody. Raises QuotaExceededError."""
        request, most = ask.request, self._max_session_bytes
        pushed_out = None if request.session_id is None else self.check_new_session(request.tenant, request.session_id)
        needed = peak_bytes(self._ledger.family.runtime(kv_format), ask.num_tokens)
        pinned = sum(c.kv_bytes for c in self._idle.of(request.tenant) if c.session.is_pinned)
        if most and needed + pinned > most:
            raise self._refuse(
                f"This request needs {needed:,} bytes of KV cache beside {pinned:,} pinned ones; one caller may hold "
                f"{most:,}. Shorten the prompt, lower max_tokens or unpin sessions.",
                "max_session_bytes_per_caller",
            )
        return pushed_out

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

    def check_pin(self, conversation: Conversation) -> None:
        """Raises QuotaExceededError when pinning this one would leave too little for requests."""
        pinned = sum(c.kv_bytes for c in self._idle if c.session.is_pinned and c is not conversation)
        most = int(MAX_PINNED_SHARE * self._ledger.budget_bytes)
        if pinned + conversation.kv_bytes > most:
            raise self._refuse(
                f"Pinning {conversation.kv_bytes:,} bytes beside {pinned:,} would pass the {most:,} that may be "
                "pinned in this server.",
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
