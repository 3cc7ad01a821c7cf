"""Sessions, and who holds their caches: an idle conversation, or the lease of a running request. Plain data.

A `Session` is what has a name, a time to live and a pin. Its cache is a `Conversation` while idle (in
memory or on disk; idle.py owns those) and belongs to a `Lease` while a request runs in it (leases.py
owns those). Times are seconds of the engine's clock.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.interfaces import CacheRuntime, Caches, Key, RunningCaches
from turboserve.cache.radix import Tokens
from turboserve.cache.sizes import pages_bytes
from turboserve.messages import CacheTier, Request


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


class _OfSession:
    """Is found by the names of its session."""

    __slots__ = ()
    session: Session

    @property
    def conversation_id(self) -> str:
        return self.session.session_id

    @property
    def salt(self) -> str:
        return self.session.salt

    @property
    def key(self) -> Key:
        return self.session.salt, self.session.session_id


@dataclass(slots=True, eq=False)
class Conversation(_OfSession):
    """An idle cache. `tokens` (int32, (T,)) are exactly those whose keys and values it holds.

    wanted_format is what its requests asked for and where it is looked up; kv_format what it is in now,
    one or more steps lower once memory was short. `caches` is None while it is only on disk.
    """

    session: Session
    tokens: Tokens
    kv_format: str
    wanted_format: str
    caches: Caches | None
    kv: KVBytes
    disk_key: str | None = None  # of its file, when that holds exactly these caches
    disk_bytes: int = 0
    earlier_key: str | None = None  # of its file, when that holds an earlier state, which the next write replaces
    version: str = field(default_factory=new_id)  # of these caches; tells whether a file holds them

    @property
    def held_len(self) -> int:
        return len(self.tokens)

    @property
    def tier(self) -> CacheTier:
        return "disk" if self.caches is None else "memory"

    @property
    def kv_bytes(self) -> int:
        """In memory now."""
        return 0 if self.caches is None else self.kv.total

    @property
    def is_requantised(self) -> bool:
        return self.kv_format != self.wanted_format


@dataclass(slots=True, eq=False)
class Lease(_OfSession):
    """Room for one running request.

    `caches` are handed over at the start; once `running` is set, it tells how far they have grown.
    """

    request: Request
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
    def tier(self) -> CacheTier:
        return "running"

    @property
    def held_len(self) -> int:
        """Tokens whose keys and values are there now."""
        return self.cached_len if self.running is None else self.running.held_len()

    @property
    def written_len(self) -> int:
        """Tokens that take room now: held ones, and one that is fed before it is known."""
        return self.cached_len if self.running is None else self.running.written_len()

    @property
    def open_bytes(self) -> int:
        """Reserved and not yet in pages; its exact rows and uncompressed layers stay reserved to the end."""
        return max(0, self.reserved_bytes - pages_bytes(self.runtime, self.written_len))

    def measure(self) -> KVBytes:
        """Bytes of its caches as they are now."""
        return self.runtime.measure(self.caches) if self.running is None else self.running.measure()


Holder = Conversation | Lease
