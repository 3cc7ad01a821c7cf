"""What a rank's cache books say, in a few bytes: the same on every rank as long as all do the same.

Every rank takes pages and exact rows for itself, by what it is told to do. Equal digests say that conversations hold as
many tokens in the same pages everywhere, and that what is free is equal, so that what is admitted on one rank fits on
all. Numbers inside the pages are each rank's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import xxhash
from mlx_lm.models.cache import KVCache

from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, TurboQuantKVCache
from turboquant_kv.cache.leaves import leaves
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.protocol import BatchRows


def digest_of(family: KVFamily, touched: Iterable[Sequence[Any]]) -> str:
    """Of all pools, and of these conversations and batches; one layer stands for those under the same numbering."""
    digest = xxhash.xxh3_64()
    for name, runtime in sorted(family.runtimes.items()):
        digest.update(f"{name}:{runtime.books()};".encode())
    for caches in touched:
        _add(digest, caches)
    return str(digest.hexdigest())


def _are_one_pool(caches: Sequence[Any]) -> bool:
    """Whether they are all layers of one pool, as the first, the last and their number say: asked in every step."""
    if not caches:
        return False
    first, last = caches[0], caches[-1]
    if type(first) is not BatchTurboQuantKVCache or type(last) is not BatchTurboQuantKVCache:
        return False
    pool, num_layers = first.source.pool, len(caches)
    ends = first.source.layer, last.source.layer
    return pool is not None and pool is last.source.pool and ends == (0, num_layers - 1) == (0, len(pool.stores) - 1)


def _add(digest: Any, caches: Sequence[Any]) -> None:
    seen: set[object] = set()
    for cache in caches[:1] if _are_one_pool(caches) else leaves(caches):
        source = cache.source.pool if isinstance(cache, (TurboQuantKVCache, BatchTurboQuantKVCache)) else type(cache)
        if id(source) in seen:
            continue
        seen.add(id(source))
        if isinstance(cache, TurboQuantKVCache):
            sequences, lengths = [cache.sequence], [cache.offset]
        elif isinstance(cache, BatchTurboQuantKVCache):
            sequences, lengths = cache.sequences, cache.lengths
        elif isinstance(cache, BatchRows):
            sequences, lengths = [], cache.lengths
        elif type(cache) is KVCache:
            sequences, lengths = [], [cache.offset]
        else:
            continue  # a ring's or a state's length is that of the others
        digest.update(repr(list(lengths)).encode())
        for sequence in sequences:
            if sequence is not None:
                digest.update(sequence.page_ids.tobytes())
