"""The caches of a model one by one: those that a layer keeps together in mlx-lm's CacheList stand side by side.

Whatever is known of a cache (geometry, means, format, bytes) is known by its place in that line, which is a layer's
number in models without such lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.models.cache import CacheList


def leaves(caches: Sequence[Any]) -> list[Any]:
    """All caches of all layers, in order."""
    found: list[Any] = []
    for cache in caches:
        found += leaves(cache.caches) if isinstance(cache, CacheList) else [cache]
    return found


def layer_numbers(caches: Sequence[Any]) -> list[int]:
    """Which layer each of `leaves(caches)` belongs to."""
    return [i for i, cache in enumerate(caches) for _ in leaves([cache])]


def with_leaves(caches: Sequence[Any], replaced: Sequence[Any]) -> list[Any]:
    """Layers as `caches` has them, with these in place of `leaves(caches)`."""
    queue = iter(replaced)
    layers = [_filled(cache, queue) for cache in caches]
    assert next(queue, None) is None, "more caches than places"
    return layers


def _filled(cache: Any, queue: Iterator[Any]) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_filled(part, queue) for part in cache.caches))
    return next(queue)
