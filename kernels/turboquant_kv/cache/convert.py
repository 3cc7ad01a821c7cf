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

from turboquant_kv.backends.base import CanonicalPages, LayerShape, PageIds
from turboquant_kv.cache.layer_cache import PoolSource, TurboQuantKVCache
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.sequence import LayerSequence

# 16 pages of 64 tokens x 8 heads x 128 dims are 8 MiB in float32, keys and values.
PAGES_AT_ONCE = 16


def convert(caches: Sequence[Any], empty: Sequence[Any]) -> list[Any]:
    """Caches of the same tokens in the format of `empty`, new caches of the target runtime; `caches` stay.

    A side (keys or values) whose codec does not change keeps its codes bit for bit. Raises ValueError when
    the formats differ in more than codecs.
    """
    return [_convert_layer(old, new) for old, new in zip(caches, empty, strict=True)]


def _convert_layer(old: Any, new: Any) -> Any:
    if isinstance(old, TurboQuantKVCache) and isinstance(new, TurboQuantKVCache):
        return old.fork() if old.source is new.source else _requantised(old, new.source)
    if isinstance(new, TurboQuantKVCache):
        return _compressed(old, new.source)
    return _decompressed(old) if isinstance(old, TurboQuantKVCache) else copy.deepcopy(old)


def _requantised(cache: TurboQuantKVCache, target: PoolSource) -> TurboQuantKVCache:
    old = cache.sequence
    if old is None:
        return TurboQuantKVCache(target)
    was, wanted = cache.source.fmt, target.fmt
    if was.with_codecs(wanted.name) != wanted:
        raise ValueError(f"formats {was} and {wanted} differ in more than bits")
    new = LayerSequence(target.get(old.pool.shape))
    sink, tail = old.exact_ends()
    new.fill(sink, (_encoded_again(old.pool, ids, new.pool) for ids in _pieces(old.page_ids)), tail)
    return TurboQuantKVCache(target, new)


def _pieces(page_ids: PageIds) -> Iterator[PageIds]:
    return (page_ids[i : i + PAGES_AT_ONCE] for i in range(0, len(page_ids), PAGES_AT_ONCE))


def _encoded_again(source: PagePool, page_ids: PageIds, target: PagePool) -> PageIds:
    """New pages of the target pool with what the source's pages hold."""
    new_ids = target.encode(*source.storage.decode(page_ids))
    same_k, same_v = source.fmt.keys == target.fmt.keys, source.fmt.values == target.fmt.values
    if same_k or same_v:
        old, new = source.storage.read(page_ids), target.storage.read(new_ids)
        k, v = (old if same_k else new), (old if same_v else new)
        target.storage.write(new_ids, CanonicalPages(k.k_codes, k.k_scales, v.v_codes, v.v_scales))
    return new_ids


def _compressed(cache: KVCache, target: PoolSource) -> TurboQuantKVCache:
    if cache.offset == 0:
        return TurboQuantKVCache(target)
    keys, values = cache.keys_and_values()  # (1, H, T, D)
    sequence = LayerSequence(target.get(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)))
    backend, step = sequence.pool.backend, PAGES_AT_ONCE * target.fmt.page_tokens
    for start in range(0, cache.offset, step):
        k, v = (x[:, :, start : start + step] for x in (keys, values))
        backend.wait_for([k, v])
        sequence.append(backend.from_mlx(k)[0], backend.from_mlx(v)[0])
    return TurboQuantKVCache(target, sequence)


def _decompressed(cache: TurboQuantKVCache) -> KVCache:
    """An uncompressed cache of what the pages say; what the codes lost stays lost."""
    plain = KVCache()
    sequence = cache.sequence
    if sequence is None or not len(sequence):
        return plain
    pool = sequence.pool
    sink, tail = sequence.exact_ends()
    parts = [(sink.k, sink.v)] if sink is not None else []
    parts += [pool.storage.decode(ids) for ids in _pieces(sequence.page_ids)]
    parts += [(tail.k, tail.v)] if tail is not None else []
    for k, v in parts:
        k, v = (pool.backend.to_mlx(x, pool.shape.dtype)[None] for x in (k, v))
        plain.update_and_fetch(k, v)
        mx.eval(plain.keys, plain.values)
    return plain
