"""RunningRow: one request's caches as the memory sees them, wherever the runner keeps them now."""

from __future__ import annotations

from dataclasses import dataclass

from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.interfaces import Caches
from turboserve.engine.generation import Generation
from turboserve.engine.runner import Runner


@dataclass(frozen=True, slots=True)
class RunningRow:
    """Implements cache.interfaces.RunningCaches; tokens in flight are written, but not known, so not held."""

    generation: Generation
    runner: Runner

    def held_len(self) -> int:
        return self.generation.cache_len

    def written_len(self) -> int:
        return self.generation.cache_len + self.runner.num_in_flight(self.generation)

    def held_tokens(self) -> list[int]:
        return self.generation.tokens(0, self.generation.cache_len)

    def usable_prefix(self, length: int) -> int:
        return self.runner.usable_prefix(self.generation, length)

    def fork(self, length: int) -> Caches:
        return self.runner.fork(self.generation, length)

    def measure(self) -> KVBytes:
        return self.runner.measure(self.generation)
