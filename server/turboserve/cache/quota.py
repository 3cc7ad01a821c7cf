"""What one caller may hold: explicit sessions by number, sessions by bytes, pins by share of the budget.

A caller at a limit loses the least recently used of their own sessions first; only where all of them
are pinned or at work is a request refused. Nobody else notices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from turboserve.cache.holders import Conversation, Session
from turboserve.cache.runtime import peak_bytes
from turboserve.errors import QuotaExceededError

if TYPE_CHECKING:
    from turboserve.cache.manager import Ask, CacheManager

# Pinned memory never gives way, so that much of the budget always stays for everybody's requests.
MAX_PINNED_SHARE = 0.5

RETRY_AFTER_S = 60


class Quotas:
    """Over one manager's conversations."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager

    def check_admission(self, ask: Ask, kv_format: str) -> None:
        """Makes room for a new named session by number. Raises QuotaExceededError."""
        if ask.session_id is not None:
            self.check_new_session(ask.salt, ask.session_id)
        most = self._manager.limits.max_session_bytes_per_caller
        needed = peak_bytes(self._manager.family.runtime(kv_format), ask.num_tokens)
        pinned = sum(c.kv_bytes for c in self._manager.store.of(ask.salt) if c.session.is_pinned)
        if most and needed + pinned > most:
            raise self._refuse(
                f"This request needs {needed:,} bytes of KV cache beside {pinned:,} pinned ones; one caller may hold "
                f"{most:,}. Shorten the prompt, lower max_tokens or unpin sessions.",
                "max_session_bytes_per_caller",
            )

    def check_new_session(self, salt: str, session_id: str, source: Session | None = None) -> None:
        """Raises QuotaExceededError when a caller has too many named sessions and none but `source` could go."""
        most, store = self._manager.limits.max_sessions_per_caller, self._manager.store
        if not most or store.get(salt, session_id) is not None:
            return
        running = {x.conversation_id for x in self._manager.leases if x.salt == salt and x.session.is_explicit}
        if session_id in running:
            return
        named = [c for c in store.of(salt) if c.session.is_explicit]
        if len(running | {c.conversation_id for c in named}) < most:
            return
        busy = running | ({source.session_id} if source is not None else set())
        may_go = [c for c in named if not c.session.is_pinned and c.conversation_id not in busy]
        if not may_go:
            raise self._refuse(
                f"All of this caller's {most:,} sessions are pinned or at work: delete or unpin one.",
                "max_sessions_per_caller",
            )
        self._manager.evict(min(may_go, key=lambda c: c.session.last_used_s), "quota")

    def check_pin(self, conversation: Conversation) -> None:
        """Raises QuotaExceededError when pinning this one would leave too little for requests."""
        manager = self._manager
        pinned = sum(c.kv_bytes for c in manager.store if c.session.is_pinned and c is not conversation)
        most = int(MAX_PINNED_SHARE * manager.budget_bytes)
        if pinned + conversation.kv_bytes > most:
            raise self._refuse(
                f"Pinning {conversation.kv_bytes:,} bytes beside {pinned:,} would pass the {most:,} that may be "
                "pinned in this server.",
                "kv_budget",
            )

    def shrink(self, salt: str, newest: Conversation) -> None:
        """Forget a caller's oldest conversations, nameless ones first, until their bytes are within the quota."""
        most = self._manager.limits.max_session_bytes_per_caller
        if not most:
            return
        mine = [c for c in self._manager.store.of(salt) if c.caches is not None]
        held = sum(c.kv_bytes for c in mine)
        may_go = [c for c in mine if c is not newest and not c.session.is_pinned]
        for conversation in sorted(may_go, key=lambda c: (c.session.is_explicit, c.session.last_used_s)):
            if held <= most:
                return
            held -= conversation.kv_bytes
            self._manager.evict(conversation, "quota")

    def _refuse(self, message: str, param: str) -> QuotaExceededError:
        self._manager.counts.refusals["quota"] += 1
        return QuotaExceededError(message, param=param, retry_after_s=RETRY_AFTER_S)
