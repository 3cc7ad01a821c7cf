"""Idle conversations, found again by their longest common token prefix.

Owns the caches of conversations that nobody is working on. Each lives under a salt (the
server's view of the caller) and is invisible under any other. Bytes and eviction are the
manager's business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from turboserve.cache.policy import Tokens, common_prefix_len
from turboserve.cache.runtime import CacheBytes, CacheRuntime, Caches, total_bytes

# A shorter match saves less than forking costs, and says only that both use the same chat template.
MIN_REUSED_TOKENS = 16


@dataclass(slots=True, eq=False)
class Conversation:
    """`tokens` (int32, (T,)) are exactly those whose keys and values `caches` hold."""

    conversation_id: str
    salt: str
    tokens: Tokens
    caches: Caches
    kv: CacheBytes
    last_used_s: float
    hits: int = 0

    @property
    def kv_bytes(self) -> int:
        return total_bytes(self.kv)


class Match(NamedTuple):
    conversation: Conversation
    usable_len: int  # tokens whose cache can be reused without loss
    is_continuation: bool  # all of the conversation's tokens begin the prompt, not just some


class SessionStore:
    """Conversations by salt and id."""

    def __init__(self, runtime: CacheRuntime) -> None:
        self._runtime = runtime
        self._by_salt: defaultdict[str, dict[str, Conversation]] = defaultdict(dict)

    def __iter__(self) -> Iterator[Conversation]:
        return (c for conversations in self._by_salt.values() for c in conversations.values())

    def __contains__(self, conversation: Conversation) -> bool:
        return self._by_salt.get(conversation.salt, {}).get(conversation.conversation_id) is conversation

    def ids(self) -> set[str]:
        return {c.conversation_id for c in self}

    def find(self, salt: str, prompt: Tokens) -> Match | None:
        """The conversation that saves most of `prompt`, whose last token is never among the saved.

        Computing at least one token is what gives the logits of the first answer token.
        """
        mine = self._by_salt.get(salt, {}).values()
        ranked = sorted(((common_prefix_len(c.tokens, prompt), c) for c in mine), key=lambda x: x[0], reverse=True)
        best: Match | None = None
        for common, conversation in ranked:
            if best is not None and common <= best.usable_len:
                break
            usable = self._runtime.usable_prefix(conversation.caches, min(common, len(prompt) - 1))
            if usable >= MIN_REUSED_TOKENS and (best is None or usable > best.usable_len):
                best = Match(conversation, usable, common == len(conversation.tokens))
        return best

    def superseded_by(self, salt: str, tokens: Tokens, caches: Caches) -> list[Conversation]:
        """Conversations that are a beginning of `tokens` and can be had from its caches."""
        return [
            c
            for c in self._by_salt.get(salt, {}).values()
            if len(c.tokens) <= len(tokens)
            and common_prefix_len(c.tokens, tokens) == len(c.tokens)
            and (len(c.tokens) == len(tokens) or self._runtime.usable_prefix(caches, len(c.tokens)) > 0)
        ]

    def continuation_of(self, salt: str, tokens: Tokens) -> Conversation | None:
        """A longer conversation that begins with `tokens` and from which they can be had."""
        for c in self._by_salt.get(salt, {}).values():
            is_longer = len(c.tokens) > len(tokens) and common_prefix_len(c.tokens, tokens) == len(tokens)
            if is_longer and self._runtime.usable_prefix(c.caches, len(tokens)) > 0:
                return c
        return None

    def add(self, conversation: Conversation) -> None:
        mine = self._by_salt[conversation.salt]
        assert conversation.conversation_id not in mine, "conversation ids are unique"
        mine[conversation.conversation_id] = conversation

    def remove(self, conversation: Conversation) -> None:
        """Forget it and give its pages back."""
        mine = self._by_salt[conversation.salt]
        del mine[conversation.conversation_id]
        if not mine:
            del self._by_salt[conversation.salt]
        self._runtime.release(conversation.caches)
