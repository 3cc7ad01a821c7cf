"""What the cache manager counted since start. Plain data; reasons are few and fixed, never a caller's text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class CacheCounts:
    """Prefix reuse, and every step taken under pressure by its reason.

    evictions        pressure | quota | expired | superseded | deleted | unreadable | out_of_memory
    requantisations  4/4 -> 4/3 and so on, as "4/4>4/3"
    spills           pressure | idle (written ahead, while still in memory)
    restores         request | failed (unreadable: computed again)
    preemptions      growth (an older answer needed the room)
    refusals         no_room | never_fits | quota
    """

    lookups: int = 0
    hits: int = 0
    query_tokens: int = 0
    cached_tokens: int = 0
    evictions: Counter[str] = field(default_factory=Counter)
    requantisations: Counter[str] = field(default_factory=Counter)
    spills: Counter[str] = field(default_factory=Counter)
    restores: Counter[str] = field(default_factory=Counter)
    preemptions: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    integrity_failures: int = 0


@dataclass(slots=True)
class AdmissionCounts:
    """Bytes reserved at admission beside those that ended requests really took."""

    num_requests: int = 0
    estimated_bytes: int = 0
    actual_bytes: int = 0
    last_estimated_bytes: int = 0
    last_actual_bytes: int = 0

    def add(self, estimated_bytes: int, actual_bytes: int) -> None:
        self.num_requests += 1
        self.estimated_bytes += estimated_bytes
        self.actual_bytes += actual_bytes
        self.last_estimated_bytes, self.last_actual_bytes = estimated_bytes, actual_bytes
