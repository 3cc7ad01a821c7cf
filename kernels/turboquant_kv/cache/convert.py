"""One conversation's caches in another format: pages decoded and encoded again, exact ends kept as they are.

Conversions work in bounded pieces, so that scratch does not grow with the conversation. What cannot be
compressed is the same in every format and is only forked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache

from turboquant_kv.backends.base import CanonicalPages, ExactRows, LayerStore, PageIds, PageWrites
from turboquant_kv.cache import windows
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.padding import stored_shape, widened
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.probe import shape_of
from turboquant_kv.cache.sequence import LayerSequence, PagedSequence

# 16 pages of 64 tokens x 8 heads x 128 dims are 8 MiB in float32, keys and values.
PAGES_AT_ONCE = 16


def convert(caches: Sequence[Any], empty: Sequence[Any]) -> list[Any]:
    """Caches of the same tokens in the format of `empty`, new caches of the target runtime; `caches` stay.

    A side (keys or values) whose codec does not change keeps its codes bit for bit, unless pages have another length.
    Raises ValueError when the formats differ in more than codecs and pages.
    """
    layers, caches, empty = caches, leaves(caches), leaves(empty)
    converted: list[Any] = [None] * len(caches)
    both, inflated, rings = list[int](), list[int](), list[int]()
    for i, (old, new) in enumerate(zip(caches, empty, strict=True)):
        if isinstance(new, TurboQuantKVCache):
            is_ring = isinstance(old, RotatingKVCache)
            (both if isinstance(old, TurboQuantKVCache) else rings if is_ring else inflated).append(i)
        else:
            converted[i] = _decompressed(old, new) if isinstance(old, TurboQuantKVCache) else copy.deepcopy(old)
    for places in _conversations(both, caches):
        fresh = [empty[i] for i in places]
        for i, cache in zip(places, _requantised([caches[i] for i in places], fresh), strict=True):
            converted[i] = cache
    for i, cache in zip(
        inflated, _compressed([caches[i] for i in inflated], [empty[i] for i in inflated]), strict=True
    ):
        converted[i] = cache
    for places in _conversations(rings, empty):
        filled = _compressed_rings([caches[i] for i in places], [empty[i] for i in places])
        for i, cache in zip(places, filled, strict=True):
            converted[i] = cache
    return with_leaves(layers, converted)


def _conversations(places: Sequence[int], caches: Sequence[Any]) -> list[list[int]]:
    """The layers that hold one PagedSequence together; those without any are together as well."""
    by_sequence: dict[int, list[int]] = {}
    for i in places:
        sequence = caches[i].sequence
        by_sequence.setdefault(0 if sequence is None else id(sequence.shared), []).append(i)
    return list(by_sequence.values())


def _requantised(old: Sequence[TurboQuantKVCache], new: Sequence[TurboQuantKVCache]) -> list[TurboQuantKVCache]:
    """Layers of one conversation."""
    sequences = [cache.sequence for cache in old]
    if all(a.source is b.source for a, b in zip(old, new, strict=True)):
        return [cache.fork() for cache in old]
    if sequences[0] is None or not len(sequences[0]):
        return [TurboQuantKVCache(cache.source, cache.sequence) for cache in new]
    was, wanted = old[0].source.fmt, new[0].source.fmt
    if was.with_codecs(wanted.name).with_(page_tokens=wanted.page_tokens) != wanted:
        raise ValueError(f"formats {was} and {wanted} differ in more than codecs and pages")
    held = [sequence for sequence in sequences if sequence is not None]
    source = held[0].pool
    target = new[0].source.get(source.shapes[old[0].source.layer])
    layers = [(a.source.layer, b.source.layer) for a, b in zip(old, new, strict=True)]
    sequence = PagedSequence(target, [layer for _, layer in layers])
    if was.page_tokens != wanted.page_tokens:
        _fill_repaged(sequence, held[0], [(kept, layer) for (_, layer), kept in zip(layers, held, strict=True)])
        return [TurboQuantKVCache(cache.source, sequence.of_layer(cache.source.layer)) for cache in new]
    new_ids = _encoded_again(source, held[0].page_ids, target, layers, held[0].first_page)
    ends = {layer: kept.exact_ends() for (_, layer), kept in zip(layers, held, strict=True)}
    sequence.fill(new_ids, ends, held[0].forgotten)
    return [TurboQuantKVCache(cache.source, sequence.of_layer(cache.source.layer)) for cache in new]


def _pieces(page_ids: PageIds, first_page: int = 0) -> Iterator[tuple[int, PageIds]]:
    """Runs of a conversation's pages, the first of which has that number, with the number of each run's first."""
    runs = range(0, len(page_ids), PAGES_AT_ONCE)
    return ((first_page + i, page_ids[i : i + PAGES_AT_ONCE]) for i in runs)


def _encoded_again(
    source: PagePool, page_ids: PageIds, target: PagePool, layers: Sequence[tuple[int, int]], first_page: int
) -> PageIds:
    """New pages of the target pool with what the source's pages hold; layers: (of the source, of the target).

    first_page: number of the first one in its conversation.
    """
    new_ids = target.allocate(len(page_ids))
    try:
        for from_layer, to_layer in layers:
            for (first, old), (_, new) in zip(_pieces(page_ids, first_page), _pieces(new_ids), strict=True):
                _encode_layer_again(source.stores[from_layer], old, target.stores[to_layer], new, first)
    except BaseException:
        target.free(new_ids)
        raise
    return new_ids


def _encode_layer_again(
    source: LayerStore, old_ids: PageIds, target: LayerStore, new_ids: PageIds, first_page: int
) -> None:
    pages = PageWrites.following(new_ids, first_page, target.fmt.page_tokens)
    target.encode(pages, *source.decode(old_ids, first_page))
    same_k, same_v = source.fmt.keys == target.fmt.keys, source.fmt.values == target.fmt.values
    if same_k or same_v:
        old, new = source.read(old_ids), target.read(new_ids)
        k, v = (old if same_k else new), (old if same_v else new)
        target.write(new_ids, CanonicalPages(k.k_codes, k.k_scales, v.v_codes, v.v_scales))


def _fill_repaged(sequence: PagedSequence, whole: LayerSequence, layers: Sequence[tuple[LayerSequence, int]]) -> None:
    """Give an empty sequence the tokens of one whose pages have another length; layers: (of that one, layer of it).

    What was exact and now lies in a page is compressed; what lay in a page and is exact now is what the codes say.
    """
    target = sequence.pool
    fmt, num_tokens, forgotten = target.fmt, len(whole), whole.forgotten
    if target.window:  # shorter pages need less behind the window, and less is booked for them
        forgotten = max(forgotten, windows.forgotten_after(fmt, target.window, num_tokens))
    has_lost_sink = forgotten >= fmt.sink_tokens and forgotten > 0
    first = windows.first_page(fmt, forgotten)
    page_ids = target.allocate(max(0, fmt.num_pages(num_tokens) - first))
    tail_start = fmt.page_start(first + len(page_ids))
    ends = {}
    try:
        for old, layer in layers:
            rows, store = _RowsBehindSink(old), target.stores[layer]
            for number, ids in _pieces(page_ids, first):
                encoded = rows.between(fmt.page_start(number), fmt.page_start(number + len(ids)))
                store.encode(PageWrites.following(ids, number, fmt.page_tokens), *encoded)
            tail = ExactRows(*rows.between(tail_start, num_tokens)) if tail_start < num_tokens else None
            ends[layer] = None if has_lost_sink else rows.sink, tail
    except BaseException:
        target.free(page_ids)
        raise
    sequence.fill(page_ids, ends, forgotten)


class _RowsBehindSink:
    """One layer's keys and values by position, as its store has them: exact ones, and what the codes say of others."""

    def __init__(self, held: LayerSequence) -> None:
        self.sink, self._tail = held.exact_ends()
        self._store, self._ids, self._first = held.pool.stores[held.layer], held.page_ids, held.first_page
        self._fmt = held.pool.fmt

    def between(self, start: int, end: int) -> tuple[Any, Any]:
        """(H, end - start, D) and (H, end - start, Dv). Positions whose tokens are forgotten have zeros."""
        page, begin = self._fmt.page_tokens, self._fmt.page_start(self._first)
        tail_start = begin + len(self._ids) * page
        parts = []
        if max(start, begin) < min(end, tail_start):
            low, high = max(start, begin), min(end, tail_start)
            i, j = (low - begin) // page, -(-(high - begin) // page)
            decoded = self._store.decode(self._ids[i:j], self._first + i)
            at = begin + i * page
            parts.append([x[:, low - at : high - at] for x in decoded])
        if end > tail_start:
            assert self._tail is not None
            parts.append([x[:, max(0, start - tail_start) : end - tail_start] for x in self._tail])
        if start < begin:
            k, v = parts[0]
            num_lost = begin - start
            parts.insert(0, [_zeros_like(x, num_lost) for x in (k, v)])
        k, v = (_joined(side) for side in zip(*parts, strict=True))
        return k, v


def _joined(rows: Sequence[Any]) -> Any:
    """Rows (H, n, D) of a backend, one behind the other."""
    if len(rows) == 1:
        return rows[0]
    return mx.concatenate(list(rows), axis=1) if isinstance(rows[0], mx.array) else np.concatenate(rows, axis=1)


def _zeros_like(rows: Any, num_rows: int) -> Any:
    shape = (rows.shape[0], num_rows, rows.shape[2])
    return mx.zeros(shape, rows.dtype) if isinstance(rows, mx.array) else np.zeros(shape, rows.dtype)


def _compressed(caches: Sequence[KVCache], targets: Sequence[TurboQuantKVCache]) -> list[TurboQuantKVCache]:
    """Uncompressed layers of one conversation, fed in steps into caches that compress."""
    if not caches:
        return []
    step, num_tokens = PAGES_AT_ONCE * targets[0].source.fmt.page_tokens, max(cache.offset for cache in caches)
    filled = [TurboQuantKVCache(target.source, target.sequence) for target in targets]
    for start in range(0, num_tokens, step):
        for cache, target in zip(caches, filled, strict=True):
            target.append(*(x[:, :, start : start + step] for x in cache.keys_and_values()))
    return filled


def _compressed_rings(
    rings: Sequence[RotatingKVCache], targets: Sequence[TurboQuantKVCache]
) -> list[TurboQuantKVCache]:
    """Rings of one conversation and one length. What they have forgotten is zeros where they share a page with it."""
    num_tokens = int(rings[0].offset)
    if not num_tokens:
        return [TurboQuantKVCache(target.source, target.sequence) for target in targets]
    pool = targets[0].source.get(stored_shape(shape_of(rings[0])))
    fmt, forgotten = pool.fmt, max(0, num_tokens - pool.window)
    first, has_lost_sink = windows.first_page(fmt, forgotten), forgotten >= fmt.sink_tokens and forgotten > 0
    start, num_sink = (fmt.page_start(first), 0) if has_lost_sink else (0, min(num_tokens, fmt.sink_tokens))
    page_ids = pool.allocate(fmt.num_pages(num_tokens) - first)
    tail = num_sink + len(page_ids) * fmt.page_tokens
    ends: dict[int, tuple[ExactRows | None, ExactRows | None]] = {}
    try:
        for ring, target in zip(rings, targets, strict=True):
            layer = target.source.layer
            k, v = _rows_of_ring(ring, pool, layer, forgotten - start)
            if len(page_ids):
                pages = PageWrites.following(page_ids, first, fmt.page_tokens)
                pool.stores[layer].encode(pages, k[:, num_sink:tail], v[:, num_sink:tail])
            ends[layer] = (
                ExactRows(k[:, :num_sink], v[:, :num_sink]) if num_sink else None,
                ExactRows(k[:, tail:], v[:, tail:]) if tail < k.shape[1] else None,
            )
    except BaseException:
        pool.free(page_ids)
        raise
    sequence = PagedSequence(pool, ends)
    sequence.fill(page_ids, ends, forgotten)
    return [TurboQuantKVCache(target.source, sequence.of_layer(target.source.layer)) for target in targets]


def _rows_of_ring(ring: RotatingKVCache, pool: PagePool, layer: int, num_before: int) -> tuple[Any, Any]:
    """A ring's latest tokens in order, behind so many zeros, as a store has them: (H, n, D) and (H, n, Dv)."""
    shape, balance, num_kept = pool.shapes[layer], pool.balances[layer], min(ring.offset, ring.max_size)
    rows = []
    for x, dim in ((ring.keys, shape.k_dim), (ring.values, shape.v_dim)):
        kept = widened(ring._temporal_order(x)[..., -num_kept:, :], dim)
        rows.append(mx.pad(kept, [(0, 0), (0, 0), (num_before, 0), (0, 0)]))
    if balance is not None:
        rows[0] = balance.keys_to_store(rows[0])
    mx.eval(rows)
    k, v = (pool.backend.from_mlx(x)[0] for x in rows)
    return k, v


def _decompressed(cache: TurboQuantKVCache, empty: Any) -> Any:
    """An uncompressed cache of what the pages say, a KVCache or a ring; what the codes lost stays lost.

    empty: what the model has in this place.
    """
    plain = _all_rows(cache)
    if not isinstance(empty, RotatingKVCache) or plain.empty():
        return plain
    ring = RotatingKVCache(empty.max_size, empty.keep)
    ring.update_and_fetch(*(mx.contiguous(x[..., -ring.max_size :, :]) for x in plain.keys_and_values()))
    mx.eval(ring.keys, ring.values)
    ring.offset = cache.offset
    return ring


def _all_rows(cache: TurboQuantKVCache) -> KVCache:
    """What a compressed cache still has of its conversation."""
    plain = KVCache()
    sequence = cache.sequence
    if sequence is None or not len(sequence):
        return plain
    pool = sequence.pool
    shape, store = pool.shapes[sequence.layer], pool.stores[sequence.layer]
    balance = pool.balances[sequence.layer]
    k_dim, v_dim = cache.source.dims or (shape.k_dim, shape.v_dim)
    sink, tail = sequence.exact_ends()
    parts = [(sink.k, sink.v)] if sink is not None else []
    parts += [store.decode(ids, first) for first, ids in _pieces(sequence.page_ids, sequence.first_page)]
    parts += [(tail.k, tail.v)] if tail is not None else []
    for k, v in parts:
        k, v = (pool.backend.to_mlx(x, shape.dtype)[None] for x in (k, v))
        if balance is not None:
            k = balance.keys_from_store(k)
        k, v = k[..., :k_dim], v[..., :v_dim]
        plain.update_and_fetch(k, v)
        mx.eval(plain.keys, plain.values)
    return plain
