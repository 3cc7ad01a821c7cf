"""A running request's caches as the cache manager sees them, wherever the runner keeps them now."""

from __future__ import annotations

from dataclasses import dataclass

from turboserve.cache.runtime import CacheBytes, Caches
from turboserve.engine.runner import Runner
from turboserve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class RunningSequence:
    """Implements cache.holders.RunningCaches."""

    sequence: Sequence
    runner: Runner

    def held_len(self) -> int:
        return self.sequence.cache_len

    def held_tokens(self) -> list[int]:
        return self.sequence.tokens(0, self.sequence.cache_len)

    def usable_prefix(self, length: int) -> int:
        return self.runner.usable_prefix(self.sequence, length)

    def fork(self, length: int) -> Caches:
        return self.runner.fork(self.sequence, length)

    def measure(self) -> CacheBytes:
        return self.runner.measure(self.sequence)
