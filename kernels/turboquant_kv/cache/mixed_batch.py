"""Batches whose rows are kept in different formats, some of them uncompressed.

A mixed batch holds one sub-batch per format and splits and rejoins each step's rows, so every row gets
bit for bit what it would get alone. Rows of one format need none of this: `merge_rows` then makes
that format's own batch. Rings and recurrent state are the same in every format and stay mlx-lm's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, CacheList, KVCache, RotatingKVCache

from turboquant_kv.backends.plain_attention import plain_attention
from turboquant_kv.cache import windows
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, TurboQuantKVCache
from turboquant_kv.cache.protocol import BatchRows, LayerInput, row_indices
from turboquant_kv.cache.single_rows import SingleRows


class PlainRows(SingleRows, BatchRows):
    """Uncompressed conversations side by side, each in an mlx-lm KVCache of its own: no padding, no copies."""

    window = 0  # keys that a query sees, its own included; 0: all before it

    @property
    def _held_lengths(self) -> list[int]:
        return [int(row.offset) for row in self.rows]

    def _attend(self, step: LayerInput) -> mx.array:
        keys, values, queries = step.keys, step.values, step.queries
        num_new = keys.shape[2]
        outputs = []
        for b, n in enumerate(self._take(num_new)):
            if n == 0:
                outputs.append(mx.zeros((1, queries.shape[1], num_new, values.shape[3]), queries.dtype))
                continue
            k, v, mask = self._update_row(b, keys[b : b + 1, :, :n], values[b : b + 1, :, :n], step.mask)
            q = queries[b : b + 1, :, :n]
            out = plain_attention(q, k, v, scale=step.scale, mask=mask, sinks=step.sinks, cap=step.cap)
            outputs.append(out if n == num_new else mx.pad(out, [(0, 0), (0, 0), (0, num_new - n), (0, 0)]))
        return mx.concatenate(outputs)

    def _update_row(
        self, row: int, keys: mx.array, values: mx.array, mask: mx.array | str | None
    ) -> tuple[mx.array, mx.array, mx.array | str | None]:
        """A row's keys and values with these behind them, and what its queries see of them by the batch's mask."""
        k, v = self.rows[row].update_and_fetch(keys, values)
        return k, v, _row_mask(mask, row, keys.shape[2], k.shape[2])

    def _cut_rows(self, counts: Sequence[int]) -> None:
        for row, num_tokens in zip(self.rows, counts, strict=True):
            row.trim(num_tokens)

    def exact_room(self, idx: int) -> int:
        return sys.maxsize

    def release(self) -> None:
        super().release()
        self._pending = None


class RingRows(PlainRows):
    """Rings of one window side by side, for batches with compressed rows: each keeps to its window by itself."""

    @property
    def window(self) -> int:  # type: ignore[override]
        return int(self.rows[0].max_size) if self.rows else 0

    def can_cut(self, idx: int) -> bool:
        return bool(self.rows[idx].is_trimmable())

    def exact_room(self, idx: int) -> int:
        return 0  # what a ring has overwritten does not come back

    def _update_row(
        self, row: int, keys: mx.array, values: mx.array, mask: mx.array | str | None
    ) -> tuple[mx.array, mx.array, mx.array | str | None]:
        ring, num_queries = self.rows[row], keys.shape[2]
        own = ring.make_mask(num_queries)  # by its length before
        k, v = ring.update_and_fetch(keys, values)
        if not isinstance(mask, mx.array):
            return k, v, own
        if num_queries == 1:
            k, v = (ring._temporal_order(x) for x in (k, v))  # columns of the batch's mask are absolute positions
        length = int(ring.offset)
        shown = _row_mask(mask, row, num_queries, length)
        assert isinstance(shown, mx.array)
        return k, v, shown[..., length - k.shape[2] :]


def _differs_by_row(mask: mx.array) -> bool:
    return mask.ndim == 4 and mask.shape[0] > 1


def _row_mask(mask: mx.array | str | None, row: int, num_queries: int, num_keys: int) -> mx.array | str | None:
    """One row's part of a batch's mask, whose columns are absolute positions."""
    if mask is None or isinstance(mask, str):
        return mask
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    first = row if mask.shape[0] > 1 else 0
    return mask[first : first + 1, :, :num_queries, :num_keys]


Group = BatchTurboQuantKVCache | PlainRows


class _Split(NamedTuple):
    """How a batch's rows are divided and put back together."""

    rows: list[mx.array]  # of each group
    inverse: mx.array  # where each of the batch's rows is once the groups' outputs stand in a line


class MixedBatchCache(BatchRows):
    """Rows of several formats in one layer, grouped by format; `groups` own the rows, `places` their order."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.places: list[tuple[Group, int]] = []  # of each row: its group, and its index there
        self._split: _Split | None = None  # made again after rows came or went

    @classmethod
    def of(cls, batches: Sequence[Any]) -> MixedBatchCache:
        """The rows of these batch caches, one batch after the other; they are empty afterwards."""
        mixed = cls()
        for batch in batches:
            mixed.extend(batch)
        return mixed

    @property
    def _held_lengths(self) -> list[int]:
        by_group = {id(group): group.lengths for group in self.groups}
        return [by_group[id(group)][i] for group, i in self.places]

    def _rows_of(self, group: Group) -> list[int]:
        """The batch's rows that live in a group, in the group's order."""
        rows = [(i, row) for row, (owner, i) in enumerate(self.places) if owner is group]
        return [row for _, row in sorted(rows)]

    @property
    def window(self) -> int:
        """Keys that a query sees, its own included; 0: all before it. The same in every format."""
        return self.groups[0].window if self.groups else 0

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """As mlx-lm asks for it; rows with a sliding window keep to that by themselves."""
        return super().make_mask(N, return_array, windows.window_to_ask(self.window, window_size, return_array))

    def _current_split(self) -> _Split:
        if self._split is None:
            by_group = [self._rows_of(group) for group in self.groups]
            order = [row for rows in by_group for row in rows]
            inverse = sorted(range(len(order)), key=order.__getitem__)
            self._split = _Split([mx.array(rows) for rows in by_group], mx.array(inverse))
        return self._split

    def _attend(self, step: LayerInput) -> mx.array:
        if self._remaining is not None:
            self._take(step.keys.shape[2])  # the groups count for themselves; this keeps `lengths` true
        split, outputs, mask = self._current_split(), [], step.mask
        for group, rows in zip(self.groups, split.rows, strict=True):
            part = mask if mask is None or isinstance(mask, str) or not _differs_by_row(mask) else mask[rows]
            group.update_and_fetch(step.keys[rows], step.values[rows])
            outputs.append(
                group.attend(step.queries[rows], scale=step.scale, mask=part, sinks=step.sinks, cap=step.cap)
            )
        return mx.concatenate(outputs)[split.inverse]

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        super().prepare(left_padding=left_padding, lengths=lengths, right_padding=right_padding)
        if self._remaining is None or right_padding is None:
            return
        for group in self.groups:
            rows = self._rows_of(group)
            group.prepare(
                lengths=[self._remaining[row] for row in rows], right_padding=[right_padding[row] for row in rows]
            )

    def finalize(self) -> None:
        super().finalize()
        for group in self.groups:
            group.finalize()

    def _cut_rows(self, counts: Sequence[int]) -> None:
        for group in self.groups:
            group.trim_rows([counts[row] for row in self._rows_of(group)])

    def exact_room(self, idx: int) -> int:
        group, i = self.places[idx]
        return group.exact_room(i)

    def can_cut(self, idx: int) -> bool:
        group, i = self.places[idx]
        return group.can_cut(i)

    def extend(self, other: Any) -> None:
        """Take over the rows of a batch cache of any format; it is empty afterwards."""
        self._split = None
        if isinstance(other, MixedBatchCache):
            incoming, places = other.groups, other.places
            other.groups, other.places = [], []
        else:
            group = _as_group(other)
            places = [(group, i) for i in range(len(group.lengths))]
            incoming = [group] if places else []
        moved: dict[int, tuple[Group, int]] = {}
        for group in incoming:
            home = next((own for own in self.groups if _is_same_kind(own, group)), None)
            moved[id(group)] = (group, 0) if home is None else (home, len(home.lengths))
            if home is None:
                self.groups.append(group)
        self.places += [(moved[id(group)][0], moved[id(group)][1] + i) for group, i in places]
        for group in incoming:
            home = moved[id(group)][0]
            if home is not group:
                home.extend(group)  # type: ignore[arg-type]

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these rows, in this order; the others' memory is given back."""
        kept = [self.places[i] for i in row_indices(batch_indices)]
        self.places, self._split = [], None
        by_group: dict[int, int] = {}
        for group, _ in kept:
            self.places.append((group, by_group.get(id(group), 0)))
            by_group[id(group)] = by_group.get(id(group), 0) + 1
        for group in self.groups:
            group.filter([i for owner, i in kept if owner is group])
        self.groups = [group for group in self.groups if id(group) in by_group]

    def extract(self, idx: int) -> Any:
        """Row `idx` as a single cache in its own format, sharing its pages."""
        group, i = self.places[idx]
        return group.extract(i)

    def pending_arrays(self) -> list[Any]:
        return [array for group in self.groups for array in group.pending_arrays()]

    def release(self) -> None:
        for group in self.groups:
            group.release()
        self.groups, self.places, self._split, self._pending = [], [], None, None

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    @property
    def state(self) -> list[Any]:
        """Of every group."""
        return [group.state for group in self.groups]


def _is_same_kind(a: Group, b: Group) -> bool:
    if isinstance(a, BatchTurboQuantKVCache) and isinstance(b, BatchTurboQuantKVCache):
        return a.source is b.source
    return type(a) is type(b)


def _as_group(batch: Any) -> Group:
    if isinstance(batch, BatchKVCache):
        return PlainRows([batch.extract(i) for i in range(len(batch.left_padding))])
    if isinstance(batch, BatchRotatingKVCache):
        return RingRows([batch.extract(i) for i in range(len(batch.left_padding))])
    assert isinstance(batch, (BatchTurboQuantKVCache, PlainRows)), f"{type(batch).__name__} has no compressed sibling"
    return batch


def merge_rows(rows: Sequence[Sequence[Any]], *, padded: bool = False) -> list[Any]:
    """One batch cache per layer over these conversations' caches, which may be of different formats.

    The conversations' own caches stay as they are; pages and arrays are shared with them until written.
    padded: uncompressed rows go into mlx-lm's padded batch, for models that PlainRows cannot serve.
    """
    return [_merge_layer(list(layer), padded) for layer in zip(*rows, strict=True)]


def extend_rows(batch: list[Any], other: list[Any]) -> list[Any]:
    """The rows of both batches, `batch`'s first. Both are used up: only the returned caches are valid."""
    return [_extend_layer(mine, theirs) for mine, theirs in zip(batch, other, strict=True)]


def _merge_layer(caches: list[Any], padded: bool) -> Any:
    if isinstance(caches[0], CacheList):
        return CacheList(*(_merge_layer(list(c), padded) for c in zip(*(c.caches for c in caches), strict=True)))
    kinds = {id(c.source) if isinstance(c, TurboQuantKVCache) else type(c) for c in caches}
    if kinds == {KVCache} and not padded:
        return PlainRows.copied(caches)
    if len(kinds) > 1 and any(isinstance(c, TurboQuantKVCache) for c in caches):
        return MixedBatchCache.of([_batch_of_one(c) for c in caches])
    return caches[0].merge(caches)


def _batch_of_one(cache: Any) -> Group:
    if isinstance(cache, TurboQuantKVCache):
        return TurboQuantKVCache.merge([cache])
    return (RingRows if isinstance(cache, RotatingKVCache) else PlainRows).copied([cache])


def _extend_layer(mine: Any, theirs: Any) -> Any:
    if isinstance(mine, CacheList):
        return CacheList(*(_extend_layer(a, b) for a, b in zip(mine.caches, theirs.caches, strict=True)))
    if isinstance(mine, BatchTurboQuantKVCache) and isinstance(theirs, BatchTurboQuantKVCache):
        is_same = mine.source is theirs.source
    else:
        is_same = type(mine) is type(theirs)
    if not is_same:
        return MixedBatchCache.of([mine, theirs])
    mine.extend(theirs)
    return mine
