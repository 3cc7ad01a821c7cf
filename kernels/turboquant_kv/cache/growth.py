"""Growing the arrays of all layers: copied layer by layer, in few waits, with few of the old ones alive at once.

A store that copies by a launch of its own (the GPU backend's) leaves that pending. The device must not stand still for
each layer and side; but what is pending keeps its old arrays, so all layers at once would double a large pool. Old
arrays go back to the system: MLX would keep them for arrays of the same size, which never come, and a pool that grew
step by step would leave many times its own size behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import mlx.core as mx

BYTES_AT_ONCE = 256 << 20  # of old arrays that wait to be copied

Store = TypeVar("Store", bound=Any)


def grow_stores(
    stores: Iterable[Store],
    grow: Callable[[Store], object],
    held_bytes: Callable[[Store], int],
    most_bytes: int = BYTES_AT_ONCE,
) -> None:
    """Grow each store; held_bytes: what it copies for that. Returns with all copies begun, and the last ones not done.

    Raises what a store raises that cannot grow; those before it have grown then.
    """
    pending: list[mx.array] = []
    num_bytes = 0
    for store in stores:
        num_bytes += held_bytes(store)
        grow(store)
        pending += store.pending_arrays()
        if num_bytes > most_bytes:
            mx.eval(pending)
            mx.clear_cache()
            pending, num_bytes = [], 0
    mx.async_eval(pending)  # type: ignore[no-untyped-call]  # memory is taken here, so that its lack shows here
