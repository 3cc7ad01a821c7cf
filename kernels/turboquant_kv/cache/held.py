"""One conversation seen alike, whether it has caches of its own or is a row of a batch.

Owns what forking, cutting and measuring need to know of every cache class that mlx-lm has; the
compressed ones answer through their LayerSequence. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, BatchKVCache, BatchRotatingKVCache, CacheList, KVCache

from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, TurboQuantKVCache
from turboquant_kv.cache.leaves import leaves
from turboquant_kv.cache.mixed_batch import MixedBatchCache, PlainRows
from turboquant_kv.cache.protocol import BatchRows
from turboquant_kv.cache.rows_apart import RowsApart
from turboquant_kv.cache.sequence import LayerSequence


@dataclass(frozen=True, slots=True)
class Held:
    """What one cache holds of one conversation."""

    num_tokens: int  # 0 for a cache that does not count them
    plain_bytes: int = 0  # in mlx-lm's own arrays
    sequence: LayerSequence | None = None
    is_cuttable: bool = False  # at any token; a sequence says itself where


def held_alone(cache: Any) -> Held:
    """Of a cache that holds one conversation."""
    if isinstance(cache, TurboQuantKVCache):
        return Held(cache.offset, sequence=cache.sequence, is_cuttable=cache.sequence is None)
    return Held(num_tokens_of(cache), 0 if cache.empty() else int(cache.nbytes), is_cuttable=type(cache) is KVCache)


def held_by_row(batch: Sequence[Any], index: int) -> list[Held]:
    """Of row `index` of a batch with one cache per layer, in the order of `leaves`."""
    held = []
    for cache in leaves(batch):
        if isinstance(cache, RowsApart):
            held += [held_alone(part) for part in leaves([cache.rows[index]])]
        else:
            held.append(held_in_batch(cache, index))
    return held


def held_in_batch(cache: Any, index: int) -> Held:
    """Of row `index` of a batch cache."""
    if isinstance(cache, MixedBatchCache):
        return held_in_batch(*cache.places[index])
    if isinstance(cache, PlainRows):
        return held_alone(cache.rows[index])
    if isinstance(cache, BatchTurboQuantKVCache):
        sequence = cache.sequences[index]
        return Held(cache.length_of(index), sequence=sequence, is_cuttable=sequence is None)
    num_tokens = _row_tokens(cache, index)
    return Held(num_tokens, _row_bytes(cache, num_tokens), is_cuttable=type(cache) is BatchKVCache)


def num_tokens_of(cache: Any) -> int:
    """Tokens a single-conversation cache holds; 0 for one that does not count them."""
    offset = getattr(cache, "offset", None)
    return int(offset) if offset is not None else 0


def _row_tokens(cache: Any, index: int) -> int:
    offset = getattr(cache, "offset", None)
    return int(offset[index].item()) if offset is not None else 0


def _row_bytes(cache: Any, num_tokens: int) -> int:
    """Bytes that the row would have alone, as `extract` makes it: its tokens without their padding."""
    if cache.empty():
        return 0
    if isinstance(cache, (BatchKVCache, BatchRotatingKVCache)):
        keys, values = cache.keys, cache.values
        held = min(num_tokens, keys.shape[2])
        return int(held * (keys.nbytes // keys.shape[2] + values.nbytes // values.shape[2]) // keys.shape[0])
    return int(cache.nbytes) // max(1, int(cache.batch_size)) if isinstance(cache, ArraysCache) else int(cache.nbytes)


def usable_prefix(held_by_all: Sequence[Held], length: int) -> int:
    """Longest n <= length to which all caches can be cut without loss; 0 when they cannot."""
    num_tokens = max((held.num_tokens for held in held_by_all), default=0)
    usable, before = min(length, num_tokens), -1
    while usable != before:  # a sliding window may have forgotten what another layer would go back to
        before = usable
        for held in held_by_all:
            if held.sequence is not None:
                usable = held.sequence.exact_cut(usable)
            elif held.is_cuttable:
                usable = min(usable, held.num_tokens)
            elif usable < num_tokens:
                return 0  # rings and recurrent state exist at their end only
    return usable


def extract(cache: Any, index: int) -> Any:
    """Row `index` of a batch cache as a cache of its own, sharing pages; the batch stays as it is."""
    if isinstance(cache, (BatchRows, RowsApart)):
        return cache.extract(index)
    if isinstance(cache, CacheList):
        return CacheList(*(extract(c, index) for c in cache.caches))
    if isinstance(cache, ArraysCache):  # mlx-lm's own `extract` wants every entry to be set
        single = ArraysCache(len(cache.cache))
        single.cache = [None if c is None else mx.contiguous(c[index : index + 1]) for c in cache.cache]
    else:
        single = cache.extract(index)
    mx.eval(single.state)  # a pending slice would keep the batch's arrays from being written in place
    return single


def cut_to(caches: list[Any], length: int) -> list[Any]:
    """Trim single caches, in place, to the first `length` tokens; returns them."""
    for cache in leaves(caches):
        surplus = num_tokens_of(cache) - length
        if surplus > 0:
            cache.trim(surplus)
            if type(cache) is KVCache:
                _drop_unused_rows(cache)
    return caches


def _drop_unused_rows(cache: KVCache) -> None:
    """Of a plain cache that was cut: what is cut off must not stay allocated."""
    kept = -(-cache.offset // KVCache.step) * KVCache.step
    if cache.keys is not None and cache.keys.shape[2] > kept:
        cache.keys, cache.values = (mx.contiguous(x[..., :kept, :]) for x in (cache.keys, cache.values))
        mx.eval(cache.keys, cache.values)
