"""The KV caches that mlx-lm models see: one conversation, or a batch of them, in one layer.

They speak mlx-lm's cache verbs (update_and_fetch, make_mask, trim, merge, extend, filter, extract,
prepare, finalize, state, nbytes, ...) over `LayerSequence`. Attention over them goes through
`attend`, which mlx-lm reaches by the one seam in attention.py; `update_and_fetch` therefore returns
only the new tokens' keys and values. There must be no attribute called `bits` here: mlx-lm would
take its own affine path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from turboquant_kv import saving
from turboquant_kv.backends import choose_backend
from turboquant_kv.backends.base import LayerShape, Means, SequenceView
from turboquant_kv.format import KVFormat
from turboquant_kv.pages import PagePool
from turboquant_kv.sequence import LayerSequence


class UnsupportedModelError(RuntimeError):
    """A model uses its cache in a way that compressed attention cannot serve."""


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


class CompressedCache:
    """What attention.py dispatches on: a cache that computes attention over itself.

    Keeps the books of one update followed by one attend, for the single and the batched cache. New
    tokens are appended when their queries arrive, so that an eager backend waits once a layer for
    queries, keys and values together.
    """

    source: PoolSource
    _pending: tuple[mx.array, mx.array] | None = None  # keys, values (B, H, T, D) of this step

    def attend(
        self, queries: mx.array, *, scale: float, mask: mx.array | str | None, sinks: mx.array | None
    ) -> mx.array:
        """Append this step's tokens; attention of queries (B, Hq, T, D) over all that is held, (B, Hq, T, Dv)."""
        if self._pending is None:
            raise UnsupportedModelError("attention was asked for without new keys in this cache")
        if mask is None and queries.shape[2] > 1:
            raise UnsupportedModelError("attention without a causal mask is not supported on a compressed cache")
        (keys, values), self._pending = self._pending, None
        pool = self.source.get(_geometry(keys, values))
        pool.backend.wait_for([queries, keys, values])
        views = self._append(pool, keys, values)
        array_mask = None if mask is None or isinstance(mask, str) else mask
        return pool.backend.attend(queries, views, pool.storage, scale=scale, mask=array_mask, sinks=sinks)

    def _append(self, pool: PagePool, keys: mx.array, values: mx.array) -> list[SequenceView]:
        raise TypeError(f"{type(self).__name__} cannot append")

    def _hold(self, keys: mx.array, values: mx.array) -> None:
        """Keep a step's keys and values until its queries come."""
        if self._pending is not None:
            raise UnsupportedModelError(
                "this model reads its KV cache without mlx-lm's scaled_dot_product_attention, "
                "so it cannot be compressed; serve it with --kv-format f16"
            )
        self._pending = keys, values

    @property
    def _num_pending(self) -> int:
        return 0 if self._pending is None else self._pending[0].shape[2]

    def _trim_pending(self, n: int) -> int:
        """Drop up to n tokens that no query has asked for yet; returns how many are left to drop."""
        held = self._num_pending
        if held > n > 0:
            assert self._pending is not None
            keys, values = self._pending
            self._pending = keys[:, :, : held - n], values[:, :, : held - n]
        elif held <= n:
            self._pending = None
        return max(0, n - held)


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
        return [self.sequence.append(pool.backend.from_mlx(keys)[0], pool.backend.from_mlx(values)[0])]

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


class BatchTurboQuantKVCache(CompressedCache):
    """Several conversations in one layer. Rows are page lists, so nothing is padded, moved or copied."""

    def __init__(self, source: PoolSource, sequences: Sequence[LayerSequence | None]) -> None:
        self.source = source
        self.sequences = list(sequences)
        self._remaining: list[int] | None = None  # valid tokens still to come per row, while right-padded

    @property
    def lengths(self) -> list[int]:
        """Tokens held per row, this step's included."""
        held = [0 if s is None else len(s) for s in self.sequences]
        return [n + new for n, new in zip(held, self._valid(self._num_pending), strict=True)]

    def _valid(self, num_new: int) -> list[int]:
        """How many of a step's tokens belong to each row; the rest is padding."""
        if self._remaining is None:
            return [num_new] * len(self.sequences)
        return [min(num_new, left) for left in self._remaining]

    @property
    def offset(self) -> mx.array:
        """Tokens held per row, (B,) int32: each row's next position."""
        return mx.array(self.lengths, dtype=mx.int32)

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce a right-padded prompt: row b brings `lengths[b]` tokens, then padding until finalize."""
        if left_padding is not None and any(left_padding):
            raise ValueError("left padding is not needed here: rows may have different lengths")
        if right_padding is not None and any(right_padding):
            if lengths is None:
                raise ValueError("right padding needs the rows' lengths")
            self._remaining = list(lengths)

    def finalize(self) -> None:
        self._remaining = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys (B, H, T, D) and values (B, H, T, Dv), less each row's padding; returns just these."""
        if keys.shape[0] != len(self.sequences):
            raise ValueError(f"a batch of {len(self.sequences)} conversations got keys for {keys.shape[0]}")
        self._hold(keys, values)
        return keys, values

    def _append(self, pool: PagePool, keys: mx.array, values: mx.array) -> list[SequenceView]:
        k, v = pool.backend.from_mlx(keys), pool.backend.from_mlx(values)
        valid = self._valid(keys.shape[2])
        if self._remaining is not None:
            self._remaining = [left - n for left, n in zip(self._remaining, valid, strict=True)]
        views = []
        for b, n in enumerate(valid):
            sequence = self.sequences[b] or LayerSequence(pool)
            self.sequences[b] = sequence
            views.append(sequence.append(k[b, :, :n], v[b, :, :n]))
        return views

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """As the single cache's; an array mask is (B, 1, N, longest row), columns by absolute position."""
        longest = max(self.lengths) + N
        if not return_array and (window_size is None or longest <= window_size):
            return None if N == 1 else "causal"
        rows = self.offset[:, None, None, None] + mx.arange(N)[:, None]
        columns = mx.arange(longest)
        mask = columns <= rows
        return mask if window_size is None else mask & (columns > rows - window_size)

    def size(self) -> int:
        return max(self.lengths, default=0)

    def empty(self) -> bool:
        return self.size() == 0

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Drop the last n tokens of every row, at most the shortest row's; returns how many."""
        n = min([n, *self.lengths])
        surplus = self._trim_pending(n)
        for sequence in self.sequences:
            if sequence is not None and surplus:
                sequence.cut(len(sequence) - surplus)
        return n

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
