"""What the cache memory counted since start: the one mutable place, which leaves as `messages.CacheEvents`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from turboserve.messages import AdmissionStats, CacheEvents


@dataclass(slots=True)
class Tally:
    """Prefix reuse, and every step taken under pressure by its reason; the reasons are `CacheEvents`' own."""

    evictions: Counter[str] = field(default_factory=Counter)
    requantisations: Counter[str] = field(default_factory=Counter)
    spills: Counter[str] = field(default_factory=Counter)
    restores: Counter[str] = field(default_factory=Counter)
    preemptions: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    prefix_lookups: int = 0
    prefix_hits: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    integrity_failures: int = 0
    admission: AdmissionStats = field(default_factory=AdmissionStats)

    def look_up(self, num_tokens: int, num_found: int, *, is_hit: bool) -> None:
        """One request's prompt, of which `num_found` tokens need not be computed."""
        self.prefix_lookups += 1
        self.prefix_hits += is_hit
        self.prefix_query_tokens += num_tokens
        self.prefix_hit_tokens += num_found

    def events(self) -> CacheEvents:
        """A copy that no longer changes; reasons that never occurred count 0."""
        return CacheEvents(
            evictions=Counter(self.evictions),
            requantisations=Counter(self.requantisations),
            spills=Counter(self.spills),
            restores=Counter(self.restores),
            preemptions=Counter(self.preemptions),
            refusals=Counter(self.refusals),
            prefix_lookups=self.prefix_lookups,
            prefix_hits=self.prefix_hits,
            prefix_query_tokens=self.prefix_query_tokens,
            prefix_hit_tokens=self.prefix_hit_tokens,
            integrity_failures=self.integrity_failures,
        )
