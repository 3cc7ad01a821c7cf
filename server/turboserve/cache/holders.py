"""Who holds caches: sessions, their idle conversations, and the leases of running requests. Plain data.

A `Session` is what has a name, a time to live and a pin. Its cache is a `Conversation` while idle (in
memory or on disk) and belongs to a `Lease` while a request runs in it. Times are seconds of the
engine's clock.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Protocol

from turboserve.cache.policy import Tokens
from turboserve.cache.runtime import CacheBytes, CacheRuntime, Caches, pages_bytes, total_bytes


def new_id() -> str:
    """Opaque: carries nothing of the conversation."""
    return secrets.token_hex(8)


@dataclass(slots=True, eq=False)
class Session:
    """What stays when caches come and go. `session_id` is unique under its salt (the server's view of a caller)."""

    session_id: str
    salt: str
    created_s: float
    last_used_s: float
    is_explicit: bool = False  # its caller chose the name, or forked it by name
    is_pinned: bool = False
    ttl_s: float | None = None  # its own; None: the server's
    hits: int = 0
    num_requests: int = 0
    cache_key: str | None = None  # the caller's hint of what belongs together
    public_id: str = field(default_factory=new_id)  # for statistics, which everyone may read


@dataclass(slots=True, eq=False)
class Conversation:
    """An idle cache. `tokens` (int32, (T,)) are exactly those whose keys and values it holds.

    wanted_format is what its requests asked for and where it is looked up; kv_format what it is in now,
    one or more steps lower once memory was short. `caches` is None while it is only on disk.
    """

    session: Session
    tokens: Tokens
    kv_format: str
    wanted_format: str
    caches: Caches | None
    kv: CacheBytes
    disk_key: str | None = None  # of its file, when that holds exactly these caches
    disk_bytes: int = 0

    @property
    def conversation_id(self) -> str:
        return self.session.session_id

    @property
    def salt(self) -> str:
        return self.session.salt

    @property
    def kv_bytes(self) -> int:
        """In memory now."""
        return 0 if self.caches is None else total_bytes(self.kv)

    @property
    def is_requantised(self) -> bool:
        return self.kv_format != self.wanted_format


class RunningCaches(Protocol):
    """A running request's caches, which belong to whoever runs it."""

    def held_len(self) -> int:
        """Tokens whose keys and values are there now."""
        ...

    def held_tokens(self) -> list[int]:
        """Those tokens."""
        ...

    def usable_prefix(self, length: int) -> int: ...

    def fork(self, length: int) -> Caches: ...

    def measure(self) -> CacheBytes: ...


@dataclass(slots=True, eq=False)
class Lease:
    """Room for one running request.

    `caches` are handed over at the start; from `attach` on, `running` tells how far they have grown.
    """

    session: Session
    prompt: Tokens  # what it is found by while it runs
    kv_format: str
    wanted_format: str
    runtime: CacheRuntime
    caches: Caches
    cached_len: int
    reserved_tokens: int
    reserved_bytes: int
    order: int  # of admission; the youngest has the highest
    source: Session | None = None  # whose cache it began with
    running: RunningCaches | None = None

    @property
    def conversation_id(self) -> str:
        return self.session.session_id

    @property
    def salt(self) -> str:
        return self.session.salt

    @property
    def hits(self) -> int:
        return self.session.hits

    @property
    def held_len(self) -> int:
        return self.cached_len if self.running is None else self.running.held_len()

    @property
    def open_bytes(self) -> int:
        """Reserved and not yet in pages; its exact rows and uncompressed layers stay reserved to the end."""
        return max(0, self.reserved_bytes - pages_bytes(self.runtime, self.held_len))


Holder = Conversation | Lease
