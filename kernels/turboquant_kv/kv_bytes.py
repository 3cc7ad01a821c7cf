"""KVBytes: where the bytes of a KV cache are. The one record of it in library and server; no array library needed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Where a KV cache's bytes are. Sums of allocated arrays, not estimates.

    compressed: codes and scales of pages in use; exact: sink and tail windows as allocated;
    slack: allocated pages that hold no tokens; uncompressed: layers kept in mlx-lm's own caches.
    raw_equivalent: what the same tokens would take uncompressed in the model's dtype.
    """

    tokens: int = 0
    compressed: int = 0
    exact: int = 0
    slack: int = 0
    uncompressed: int = 0
    raw_equivalent: int = 0

    @property
    def total(self) -> int:
        return self.compressed + self.exact + self.slack + self.uncompressed

    @property
    def ratio(self) -> float:
        """Raw-equivalent over total; 1.0 for an empty cache."""
        return self.raw_equivalent / self.total if self.total else 1.0

    def __add__(self, other: KVBytes) -> KVBytes:
        return KVBytes(
            self.tokens + other.tokens,
            self.compressed + other.compressed,
            self.exact + other.exact,
            self.slack + other.slack,
            self.uncompressed + other.uncompressed,
            self.raw_equivalent + other.raw_equivalent,
        )


NO_BYTES = KVBytes()
