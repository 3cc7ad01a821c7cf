"""The KV caches that mlx-lm models see: one conversation, or a batch of them, in one layer.

They speak mlx-lm's cache verbs (update_and_fetch, make_mask, trim, merge, extend, filter, extract,
prepare, finalize, state, nbytes, ...) over `LayerSequence`; how attention reaches them is protocol.py's
business.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from turboquant_kv.backends.base import HostFloats, LayerShape, Means
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.cache import layer_contents, windows
from turboquant_kv.cache.padding import stored_shape, widened, widened_step
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.protocol import AttendingCache, BatchRows, LayerInput, UnsupportedModelError, row_indices
from turboquant_kv.cache.sequence import LayerSequence, PagedSequence
from turboquant_kv.cache.step import BatchStep, Positions, step_for
from turboquant_kv.codec.format import KVFormat


class LayerSource:
    """Where one layer's caches have their pages: a layer of a pool.

    All layers of a model share one pool (`of_pool`). A cache by itself, as a program makes it or loads it from a file,
    gets a pool of one layer when the first keys tell the layer's geometry.
    """

    def __init__(self, fmt: KVFormat, backend: str, means: Means | None = None, window: int = 0) -> None:
        """window: keys that a query sees, its own included; 0: all before it."""
        self.fmt, self._backend, self._means, self.window = fmt, backend, means, window
        self.pool: PagePool | None = None
        self.layer = 0
        self.dims: tuple[int, int] | None = None  # the model's own, of keys and values; None: not known yet

    @classmethod
    def of_pool(cls, pool: PagePool, layer: int, dims: tuple[int, int] | None = None) -> LayerSource:
        """One layer of a pool that exists. dims: the model's own, of keys and values; None: as stored."""
        source = cls(pool.fmt, pool.backend.name, window=pool.window)
        source.pool, source.layer, source.dims = pool, layer, dims
        return source

    @property
    def layer_fmt(self) -> KVFormat:
        """This layer's own format, which may have more key bits than the cache's."""
        return self.fmt if self.pool is None else self.pool.layer_formats[self.layer]

    @property
    def shape(self) -> LayerShape | None:
        """The stored geometry (padding.py); None until it is known."""
        return None if self.pool is None else self.pool.shapes[self.layer]

    def get(self, shape: LayerShape) -> PagePool:
        """The pool. Raises UnsupportedModelError when a later sequence has another geometry."""
        if self.pool is None:
            backend = choose_backend(self._backend)
            self.pool = PagePool(backend, [shape], self.fmt, [self._means], window=self.window)
        elif self.shape != shape:
            raise UnsupportedModelError(f"a layer's cache changed from {self.shape} to {shape}")
        return self.pool

    def new_sequence(self, shape: LayerShape) -> LayerSequence:
        """An empty conversation of this layer alone."""
        return PagedSequence(self.get(shape), [self.layer]).of_layer(self.layer)


class CompressedCache(AttendingCache):
    """A cache over one layer of a page pool: the single and the batched one."""

    source: LayerSource

    def _attend(self, step: LayerInput) -> mx.array:
        shape = self.source.shape
        if shape is None or not shape.fits(step.keys, step.values):
            shape = stored_shape(_geometry(step.keys, step.values))
            self.source.dims = step.keys.shape[3], step.values.shape[3]
            step = widened_step(step, shape)
        pool = self.source.get(shape)
        layer, v_dim = self.source.layer, self.source.dims[1] if self.source.dims else shape.v_dim
        current = self._step(pool, shape, step.keys.shape[2])
        store, balance = pool.stores[layer], pool.balances[layer]
        try:
            if balance is not None and not store.balances(current.plan, step.queries, step.array_mask):
                step = balance.to_store(step)
            pool.backend.wait_for([step.queries, step.keys, step.values])
            out = store.append_and_attend(
                current.plan,
                step.keys,
                step.values,
                step.queries,
                scale=step.scale,
                mask=step.array_mask,
                sinks=step.sinks,
                cap=step.cap,
            )
        except BaseException:
            current.undo()
            raise
        current.done(layer)
        return out if v_dim == shape.v_dim else out[..., :v_dim]

    def attend_floats(
        self, queries: HostFloats, keys: HostFloats, values: HostFloats, *, scale: float, mask: mx.array | str | None
    ) -> HostFloats | None:
        """`update_and_fetch` and `attend` in one, for float32 arrays in NumPy's memory; attention in such an array.

        None, and nothing is done, where only MLX's arrays will do: a backend that computes with them, a geometry that
        is not known yet or stored otherwise, an array mask. Queries and keys may be changed.
        """
        pool, shape = self.source.pool, self.source.shape
        if pool is None or shape is None or self._pending is not None or isinstance(mask, mx.array):
            return None
        layer = self.source.layer
        store, balance = pool.stores[layer], pool.balances[layer]
        given = keys.shape[1], keys.shape[3], values.shape[3]
        stored = shape.num_kv_heads, shape.k_dim, shape.v_dim
        if not store.takes_floats or given != stored:
            return None
        if mask is None and queries.shape[2] > 1:
            raise UnsupportedModelError("attention without a causal mask is not supported on a compressed cache")
        current = self._step(pool, shape, keys.shape[2])
        try:
            if balance is not None:
                balance.floats_to_store(queries, keys)
            out = store.append_and_attend_floats(current.plan, keys, values, queries, scale=scale)
        except BaseException:
            current.undo()
            raise
        current.done(layer)
        return out

    @property
    def takes_tokens(self) -> bool:
        """Whether a step's tokens may be written by `begin_step`'s caller, as float32 rows in NumPy's memory."""
        shape, dims = self.source.shape, self.source.dims
        if self.source.pool is None or shape is None or self._pending is not None:
            return False
        return self.source.pool.stores[self.source.layer].takes_floats and dims in (None, (shape.k_dim, shape.v_dim))

    @property
    @abstractmethod
    def num_conversations(self) -> int:
        """Rows of a step."""

    def begin_step(self, num_new: int) -> BatchStep:
        """This step of the layer's conversations, begun and not written, where `takes_tokens`. Raises as attention."""
        pool, shape = self.source.pool, self.source.shape
        assert pool is not None and shape is not None
        return self._step(pool, shape, num_new)

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add keys (B, H, T, D) and values (B, H, T, Dv) without attending. Raises as attention does."""
        shape = stored_shape(_geometry(keys, values))
        self.source.dims = keys.shape[3], values.shape[3]
        keys, values = widened(keys, shape.k_dim), widened(values, shape.v_dim)
        pool = self.source.get(shape)
        balance = pool.balances[self.source.layer]
        if balance is not None:
            keys = balance.keys_to_store(keys)
        pool.backend.wait_for([keys, values])
        current = self._step(pool, shape, keys.shape[2])
        try:
            pool.stores[self.source.layer].append(current.plan, keys, values)
        except BaseException:
            current.undo()
            raise
        current.done(self.source.layer)

    @abstractmethod
    def _step(self, pool: PagePool, shape: LayerShape, num_new: int) -> BatchStep:
        """This step of the layer's conversations, with `num_new` rows each, padding included."""

    def pending_arrays(self) -> list[Any]:
        """Of the layer, whosever rows and pages they are."""
        return [] if self.source.pool is None else self.source.pool.stores[self.source.layer].pending_arrays()


def _geometry(keys: mx.array, values: mx.array) -> LayerShape:
    return LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)


class TurboQuantKVCache(CompressedCache):
    """One conversation in one layer, compressed (mlx-lm's KVCache is its uncompressed counterpart)."""

    def __init__(self, source: LayerSource, sequence: LayerSequence | None = None) -> None:
        self.source = source
        self.sequence = sequence

    @property
    def offset(self) -> int:
        """Tokens held, which is the next token's position."""
        return self._num_pending + (0 if self.sequence is None else len(self.sequence))

    @property
    def num_conversations(self) -> int:
        return 1

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys (1, H, T, D) and values (1, H, T, Dv); returns just these."""
        if keys.shape[0] != 1:
            raise ValueError(f"a single cache got a batch of {keys.shape[0]}; merge caches first")
        self._hold(keys, values)
        return keys, values

    def _step(self, pool: PagePool, shape: LayerShape, num_new: int) -> BatchStep:
        if self.sequence is None:
            self.sequence = self.source.new_sequence(shape)
        return step_for(pool, self.source.layer, [self.sequence.shared], num_new, None)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """As mlx-lm asks for it; columns of an array mask are absolute positions.

        A layer with a sliding window keeps to it by itself: a mask of the same window says no more than "causal".
        """
        window_size = windows.window_to_ask(self.source.window, window_size, return_array)
        is_plain = window_size is None or self.offset + N <= window_size
        if (is_plain and not return_array) or (N == 1 and window_size is None):  # the latter as mlx-lm's caches
            return None if N == 1 else "causal"
        mask: mx.array = create_causal_mask(N, self.offset, window_size=window_size)
        return mask

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
            "this model shares raw keys and values between layers, which a compressed cache does not hold"
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
        return layer_contents.save_state(self.source.layer_fmt, self.sequence)

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> TurboQuantKVCache:
        """A cache with a pool of its own. Raises ValueError when the arrays contradict their header."""
        return _loaded([state])[0]


class BatchTurboQuantKVCache(CompressedCache, BatchRows):
    """Several conversations in one layer. Rows are page lists, so nothing is padded, moved or copied."""

    def __init__(self, source: LayerSource, sequences: Sequence[LayerSequence | None]) -> None:
        self.source = source
        self.sequences = list(sequences)
        self._members: list[PagedSequence] = []  # of all rows, once they have sequences
        self._known: tuple[int, Positions] | None = None  # lengths, and the pool's epoch in which they are true

    @property
    def _held_lengths(self) -> list[int]:
        return self._positions().lengths

    @property
    def offset(self) -> mx.array:
        """Tokens held per row, (B,) int32: each row's next position."""
        return super().offset if self._num_pending else self._positions().array

    @property
    def window(self) -> int:
        """Keys that a query sees, its own included; 0: all before it."""
        return self.source.window

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """As TurboQuantKVCache makes it, for all rows."""
        return super().make_mask(N, return_array, windows.window_to_ask(self.source.window, window_size, return_array))

    @property
    def num_conversations(self) -> int:
        return len(self.sequences)

    @property
    def takes_tokens(self) -> bool:
        return super().takes_tokens and self._remaining is None and bool(self.sequences)

    def _positions(self) -> Positions:
        """Lengths without pending tokens; known from the last step unless a conversation was changed otherwise."""
        epoch = 0 if self.source.pool is None else self.source.pool.epoch
        if self._known is None or self._known[0] != epoch:
            self._known = epoch, self._positions_found()
        return self._known[1]

    def _positions_found(self) -> Positions:
        """Of the step that other layers have begun, if there is one: they looked already."""
        if not self._members and None not in self.sequences:
            self._members = [s.shared for s in self.sequences if s is not None]
        step = self._members[0].open_step if self._members else None
        if step is not None and step.members == self._members:
            return step.after if step.has_written(self._members[0], self.source.layer) else step.before
        return Positions([0 if s is None else len(s) for s in self.sequences])

    def _rows_changed(self) -> None:
        self._members, self._known = [], None

    def _step(self, pool: PagePool, shape: LayerShape, num_new: int) -> BatchStep:
        current = self.begin(pool, shape, num_new)
        self.stepped(current)
        return current

    def begin(self, pool: PagePool, shape: LayerShape, num_new: int) -> BatchStep:
        """The step in which each row gets so many tokens, padding included; this layer's part is not done by it."""
        if not self._members:
            self.sequences = [self.source.new_sequence(shape) if s is None else s for s in self.sequences]
            self._members = [s.shared for s in self.sequences if s is not None]
        valid = self._take(num_new) if self._remaining is not None else None
        return step_for(pool, self.source.layer, self._members, num_new, valid, self._positions)

    def stepped(self, step: BatchStep) -> None:
        """This layer's part of a step is on its way: rows are as long as after it."""
        assert self.source.pool is not None
        self._known = self.source.pool.epoch, step.after

    @property
    def is_between_steps(self) -> bool:
        """Whether neither padding nor a step's second half is still to come."""
        return self._remaining is None and self._pending is None

    def _cut_rows(self, counts: Sequence[int]) -> None:
        for sequence, num_tokens in zip(self.sequences, counts, strict=True):
            if sequence is not None and num_tokens:
                sequence.cut(len(sequence) - num_tokens)

    def exact_room(self, idx: int) -> int:
        sequence = self.sequences[idx]
        return self.source.fmt.page_room(0 if sequence is None else len(sequence))

    def release(self) -> None:
        """Give all rows' memory back now; the batch is empty afterwards."""
        self.filter([])
        self._pending = None

    def extend(self, other: BatchTurboQuantKVCache) -> None:
        """Take over the other batch's rows; it is empty afterwards."""
        self.sequences += other.sequences
        other.sequences = []
        self._rows_changed()
        other._rows_changed()

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these rows, in this order; the others' memory is given back."""
        indices = row_indices(batch_indices)
        kept = [self.sequences[i] for i in indices]
        for i, sequence in enumerate(self.sequences):
            if sequence is not None and i not in indices:
                sequence.release()
        self.sequences = kept
        self._rows_changed()

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
        return len(pages) * rows[0].pool.layer_page_bytes(self.source.layer) + sum(s.exact_bytes for s in rows)

    @property
    def state(self) -> list[tuple[Any, ...]]:
        """One saved state per row."""
        return [layer_contents.save_state(self.source.layer_fmt, sequence) for sequence in self.sequences]

    @classmethod
    def from_state(cls, state: Sequence[Sequence[Any]]) -> BatchTurboQuantKVCache:
        """A batch with a pool of its own. Raises ValueError when the arrays contradict their header."""
        return TurboQuantKVCache.merge(_loaded(state))


def _loaded(states: Sequence[Sequence[Any]]) -> list[TurboQuantKVCache]:
    """Caches from what `state` gave for rows of one batch, in one new pool. Raises ValueError if they contradict it."""
    fmt, means = layer_contents.format_and_means(states)
    source = LayerSource(fmt, "auto", means, layer_contents.saved_window(states))
    caches = []
    for state in states:
        contents = layer_contents.load_state(fmt, state)
        sequence = None if contents is None else layer_contents.restore(source.get(contents.shape), {0: contents})
        caches.append(TurboQuantKVCache(source, None if sequence is None else sequence.of_layer(0)))
    return caches
