"""The KV caches that mlx-lm models see: one conversation, or a batch of them, in one layer.

They speak mlx-lm's cache verbs (update_and_fetch, make_mask, trim, merge, extend, filter, extract,
prepare, finalize, state, nbytes, ...) over `LayerSequence`; how attention reaches them is attending.py's
business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from turboquant_kv.backends.base import LayerShape, Means, SequenceView
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.cache import saving
from turboquant_kv.cache.attending import AttendingCache, BatchRows, UnsupportedModelError
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.sequence import LayerSequence
from turboquant_kv.codec.format import KVFormat


class PoolSource:
    """Where a layer's pool comes from: it is made when the first keys tell the layer's geometry."""

    def __init__(self, fmt: KVFormat, backend: str, means: Means | None = None) -> None:
        self.fmt, self._backend, self.means = fmt, backend, means
        self.pool: PagePool | None = None

    def get(self, shape: LayerShape) -> PagePool:
        """Raises UnsupportedModelError when a later sequence has another geometry."""
        if self.pool is None:
            self.pool = PagePool(choose_backend(self._backend), shape, self.fmt, self.means)
        elif self.pool.shape != shape:
            raise UnsupportedModelError(f"a layer's cache changed from {self.pool.shape} to {shape}")
        return self.pool


class CompressedCache(AttendingCache):
    """A cache over one layer's page pool: the single and the batched one."""

    source: PoolSource

    def _attend(
        self,
        keys: mx.array,
        values: mx.array,
        queries: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array:
        pool = self.source.pool
        if pool is None or not pool.shape.fits(keys, values):
            pool = self.source.get(_geometry(keys, values))
        pool.backend.wait_for([queries, keys, values])
        views = self._append(pool, keys, values)
        array_mask = None if mask is None or isinstance(mask, str) else mask
        return pool.backend.attend(queries, views, pool.storage, scale=scale, mask=array_mask, sinks=sinks)

    def _append(self, pool: PagePool, keys: mx.array, values: mx.array) -> list[SequenceView]:
        raise TypeError(f"{type(self).__name__} cannot append")

    def _evaluate(self, sequences: Sequence[LayerSequence | None]) -> None:
        if self.source.pool is not None:
            self.source.pool.backend.evaluate([a for s in sequences if s is not None for a in s.pending_arrays()])


def _geometry(keys: mx.array, values: mx.array) -> LayerShape:
    return LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)


class TurboQuantKVCache(CompressedCache):
    """One conversation in one layer, compressed (mlx-lm's KVCache is its uncompressed counterpart)."""

    def __init__(self, source: PoolSource, sequence: LayerSequence | None = None) -> None:
        self.source = source
        self.sequence = sequence

    @property
    def offset(self) -> int:
        """Tokens held, which is the next token's position."""
        return self._num_pending + (0 if self.sequence is None else len(self.sequence))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys (1, H, T, D) and values (1, H, T, Dv); returns just these."""
        if keys.shape[0] != 1:
            raise ValueError(f"a single cache got a batch of {keys.shape[0]}; merge caches first")
        self._hold(keys, values)
        return keys, values

    def _append(self, pool: PagePool, keys: mx.array, values: mx.array) -> list[SequenceView]:
        if self.sequence is None:
            self.sequence = LayerSequence(pool)
        from_mlx = pool.backend.from_mlx
        # squeezed: MLX would make a copy of `keys[0]`
        return [self.sequence.append(from_mlx(keys).squeeze(0), from_mlx(values).squeeze(0))]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """As mlx-lm asks for it; columns of an array mask are absolute positions."""
        if return_array or (window_size is not None and self.offset + N > window_size):
            mask: mx.array = create_causal_mask(N, self.offset, window_size=window_size)
            return mask
        return None if N == 1 else "causal"

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens; returns how many. Into a compressed page the cut is lossy (sequence.py)."""
        n = min(n, self.offset)
        surplus = self._trim_pending(n)
        if self.sequence is not None and surplus:
            self.sequence.cut(len(self.sequence) - surplus)
        return n

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Not offered: it would be a full-precision copy of the history. Raises UnsupportedModelError."""
        raise UnsupportedModelError(
            "this model shares raw keys and values between layers, which a compressed cache does not hold; "
            "serve it with --kv-format f16"
        )

    def fork(self) -> TurboQuantKVCache:
        """The same tokens again; pages and exact rows are shared until written."""
        return TurboQuantKVCache(self.source, None if self.sequence is None else self.sequence.fork())

    def __deepcopy__(self, memo: dict[int, Any]) -> TurboQuantKVCache:
        return self.fork()

    def evaluate(self) -> None:
        self._evaluate([self.sequence])

    def release(self) -> None:
        """Give all memory back now; the cache is empty afterwards."""
        if self.sequence is not None:
            self.sequence.release()
            self.sequence = None
        self._pending = None

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantKVCache]) -> BatchTurboQuantKVCache:
        """A batch cache over forks of these caches."""
        return BatchTurboQuantKVCache(caches[0].source, [c.fork().sequence for c in caches])

    @property
    def nbytes(self) -> int:
        """Bytes allocated for this conversation: pages and exact buffers."""
        return 0 if self.sequence is None else self.sequence.compressed_bytes + self.sequence.exact_bytes

    @property
    def state(self) -> tuple[Any, ...]:
        """Everything that `from_state` needs, as MLX arrays and one string (mlx-lm saves such trees)."""
        return saving.save_state(self)

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> TurboQuantKVCache:
        """A cache with a pool of its own. Raises ValueError when the arrays contradict their header."""
        return saving.load_states([state])[0]


class BatchTurboQuantKVCache(CompressedCache, BatchRows):
    """Several conversations in one layer. Rows are page lists, so nothing is padded, moved or copied."""

    def __init__(self, source: PoolSource, sequences: Sequence[LayerSequence | None]) -> None:
        self.source = source
        self.sequences = list(sequences)

    @property
    def _held_lengths(self) -> list[int]:
        return [0 if s is None else len(s) for s in self.sequences]

    def _append(self, pool: PagePool, keys: mx.array, values: mx.array) -> list[SequenceView]:
        k, v = pool.backend.from_mlx(keys), pool.backend.from_mlx(values)
        views = []
        for b, n in enumerate(self._take(keys.shape[2])):
            sequence = self.sequences[b] or LayerSequence(pool)
            self.sequences[b] = sequence
            views.append(sequence.append(k[b, :, :n], v[b, :, :n]))
        return views

    def _cut_rows(self, num_tokens: int) -> None:
        for sequence in self.sequences:
            if sequence is not None:
                sequence.cut(len(sequence) - num_tokens)

    def evaluate(self) -> None:
        self._evaluate(self.sequences)

    def release(self) -> None:
        """Give all rows' memory back now; the batch is empty afterwards."""
        self.filter([])
        self._pending = None

    def extend(self, other: BatchTurboQuantKVCache) -> None:
        """Take over the other batch's rows; it is empty afterwards."""
        self.sequences += other.sequences
        other.sequences = []

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these rows, in this order; the others' memory is given back."""
        indices = [int(i) for i in batch_indices]
        kept = [self.sequences[i] for i in indices]
        for i, sequence in enumerate(self.sequences):
            if sequence is not None and i not in indices:
                sequence.release()
        self.sequences = kept

    def extract(self, idx: int) -> TurboQuantKVCache:
        """Row `idx` as a single cache, sharing its pages."""
        sequence = self.sequences[idx]
        return TurboQuantKVCache(self.source, None if sequence is None else sequence.fork())

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchTurboQuantKVCache:
        copy = BatchTurboQuantKVCache(self.source, [None if s is None else s.fork() for s in self.sequences])
        copy._remaining = None if self._remaining is None else list(self._remaining)
        return copy

    @classmethod
    def merge(cls, caches: Sequence[TurboQuantKVCache]) -> BatchTurboQuantKVCache:
        return TurboQuantKVCache.merge(caches)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all rows; pages that rows share count once."""
        rows = [s for s in self.sequences if s is not None]
        if not rows:
            return 0
        pages = {int(page) for s in rows for page in s.page_ids}
        return len(pages) * rows[0].pool.page_bytes + sum(s.exact_bytes for s in rows)

    @property
    def state(self) -> list[tuple[Any, ...]]:
        """One saved state per row."""
        return [saving.save_state(self.extract(i)) for i in range(len(self.sequences))]

    @classmethod
    def from_state(cls, state: Sequence[Sequence[Any]]) -> BatchTurboQuantKVCache:
        """A batch with a pool of its own. Raises ValueError when the arrays contradict their header."""
        return TurboQuantKVCache.merge(saving.load_states(state))
