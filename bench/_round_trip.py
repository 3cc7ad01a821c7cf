"""A cache whose every token went through the codec and back: what a format costs without any exact window.

Stores plain arrays in the model's dtype, so it saves no memory and is for measuring only.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turboquant_kv.backends.base import Array, LayerShape, Means, PageWrites
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.codec.format import KVFormat

PAGE_TOKENS = 16  # the smallest page: encoding works on whole ones


class RoundTripCache(KVCache):  # type: ignore[misc]
    """One conversation in one layer; keys and values are replaced by their decoded codes as they arrive."""

    def __init__(self, fmt: KVFormat, means: Means | None) -> None:
        super().__init__()
        self._fmt, self._means = fmt.with_(page_tokens=PAGE_TOKENS, sink_tokens=0), means
        self._backend = choose_backend()

    @classmethod
    def for_model(cls, model: Any, fmt: KVFormat, calibration: Calibration | None) -> list[RoundTripCache]:
        """One empty cache per layer of a model whose layers are all plain KV caches."""
        layers = range(len(make_prompt_cache(model)))
        return [cls(fmt, calibration.layers.get(i) if calibration is not None else None) for i in layers]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys (1, H, T, D) and values (1, H, T, Dv); returns all decoded ones so far."""
        shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        num_tokens = keys.shape[2]
        page_ids = np.arange(-(-num_tokens // PAGE_TOKENS))
        storage = self._backend.new_store(shape, self._fmt, self._means)
        storage.grow(len(page_ids))
        pages = PageWrites.following(page_ids, 0, self._fmt.page_tokens)
        storage.encode(pages, self._padded(keys), self._padded(values))
        k, v = (self._backend.to_mlx(rows, shape.dtype)[None, :, :num_tokens] for rows in storage.decode(page_ids, 0))
        fetched: tuple[mx.array, mx.array] = super().update_and_fetch(k, v)
        return fetched

    def _padded(self, x: mx.array) -> Array:
        """Rows (H, whole pages, D) of x (1, H, T, D), the last token repeated."""
        missing = -x.shape[2] % PAGE_TOKENS
        padding = [x[:, :, -1:]] * missing
        return self._backend.from_mlx(mx.concatenate([x, *padding], axis=2) if missing else x)[0]
