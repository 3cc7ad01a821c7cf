"""One conversation's caches in another format: pages decoded and encoded again, exact ends kept as they are.

Conversions work in bounded pieces, so that scratch does not grow with the conversation. What cannot be
compressed is the same in every format and is only forked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from turboquant_kv.backends.base import CanonicalPages, LayerStore, PageIds, PageWrites
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.sequence import PagedSequence

# 16 pages of 64 tokens x 8 heads x 128 dims are 8 MiB in float32, keys and values.
PAGES_AT_ONCE = 16


def convert(caches: Sequence[Any], empty: Sequence[Any]) -> list[Any]:
    """Caches of the same tokens in the format of `empty`, new caches of the target runtime; `caches` stay.

    A side (keys or values) whose codec does not change keeps its codes bit for bit. Raises ValueError when
    the formats differ in more than codecs.
    """
    layers, caches, empty = caches, leaves(caches), leaves(empty)
    converted: list[Any] = [None] * len(caches)
    both, inflated = list[int](), list[int]()
    for i, (old, new) in enumerate(zip(caches, empty, strict=True)):
        if isinstance(new, TurboQuantKVCache):
            (both if isinstance(old, TurboQuantKVCache) else inflated).append(i)
        else:
            converted[i] = _decompressed(old) if isinstance(old, TurboQuantKVCache) else copy.deepcopy(old)
    for places in _conversations(both, caches):
        fresh = [empty[i] for i in places]
        for i, cache in zip(places, _requantised([caches[i] for i in places], fresh), strict=True):
            converted[i] = cache
    for i, cache in zip(
        inflated, _compressed([caches[i] for i in inflated], [empty[i] for i in inflated]), strict=True
    ):
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
    if was.with_codecs(wanted.name) != wanted:
        raise ValueError(f"formats {was} and {wanted} differ in more than codecs")
    held = [sequence for sequence in sequences if sequence is not None]
    source = held[0].pool
    target = new[0].source.get(source.shapes[old[0].source.layer])
    layers = [(a.source.layer, b.source.layer) for a, b in zip(old, new, strict=True)]
    sequence = PagedSequence(target, [layer for _, layer in layers])
    new_ids = _encoded_again(source, held[0].page_ids, target, layers)
    ends = {layer: kept.exact_ends() for (_, layer), kept in zip(layers, held, strict=True)}
    sequence.fill(new_ids, ends)
    return [TurboQuantKVCache(cache.source, sequence.of_layer(cache.source.layer)) for cache in new]


def _pieces(page_ids: PageIds) -> Iterator[tuple[int, PageIds]]:
    """Runs of a conversation's pages, with the number of each run's first."""
    return ((i, page_ids[i : i + PAGES_AT_ONCE]) for i in range(0, len(page_ids), PAGES_AT_ONCE))


def _encoded_again(source: PagePool, page_ids: PageIds, target: PagePool, layers: Sequence[tuple[int, int]]) -> PageIds:
    """New pages of the target pool with what the source's pages hold; layers: (of the source, of the target)."""
    new_ids = target.allocate(len(page_ids))
    try:
        for from_layer, to_layer in layers:
            for (first, old), (_, new) in zip(_pieces(page_ids), _pieces(new_ids), strict=True):
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


def _decompressed(cache: TurboQuantKVCache) -> KVCache:
    """An uncompressed cache of what the pages say; what the codes lost stays lost."""
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
    parts += [store.decode(ids, first) for first, ids in _pieces(sequence.page_ids)]
    parts += [(tail.k, tail.v)] if tail is not None else []
    for k, v in parts:
        k, v = (pool.backend.to_mlx(x, shape.dtype)[None] for x in (k, v))
        if balance is not None:
            k = balance.keys_from_store(k)
        k, v = k[..., :k_dim], v[..., :v_dim]
        plain.update_and_fetch(k, v)
        mx.eval(plain.keys, plain.values)
    return plain
