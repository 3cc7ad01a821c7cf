"""The one seam into mlx-lm: its scaled_dot_product_attention, sent to a cache that attends for itself.

Model modules import that function by name, so `install` replaces it in mlx_lm.models.base (for
modules loaded later) and in every model module that is already loaded. Every other cache still
gets mlx-lm's own function.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, TurboQuantKVCache
from turboquant_kv.cache.protocol import AttendingCache

_NAME = "scaled_dot_product_attention"
_original = base.scaled_dot_product_attention


def scaled_dot_product_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's signature and meaning. queries (B, Hq, T, D); returns (B, Hq, T, Dv)."""
    if isinstance(cache, AttendingCache):
        return cache.attend(queries, scale=scale, mask=mask, sinks=sinks)
    out: mx.array = _original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    return out


def install() -> None:
    """Put the seam in place; idempotent, and meant to be called again after a model module was imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, _NAME, None) is _original:
            setattr(module, _NAME, scaled_dot_product_attention)
    for cls in (TurboQuantKVCache, BatchTurboQuantKVCache):
        setattr(mlx_lm_cache, cls.__name__, cls)  # load_prompt_cache looks classes up there


def is_installed() -> bool:
    return base.scaled_dot_product_attention is scaled_dot_product_attention
