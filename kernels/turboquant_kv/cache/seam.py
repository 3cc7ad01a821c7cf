"""The one seam into mlx-lm: its attention, sent to a cache that attends for itself.

Model modules import scaled_dot_product_attention by name, so `install` replaces it in mlx_lm.models.base (for
modules loaded later) and in every model module that is already loaded. Models that cap their scores compute attention
by themselves, in their Attention module; of those in CAPPED, `install` replaces what that module does. Every other
cache still gets mlx-lm's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

from turboquant_kv.backends.plain_attention import plain_attention
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, TurboQuantKVCache
from turboquant_kv.cache.protocol import AttendingCache

_NAME = "scaled_dot_product_attention"
_MASK_NAME = "create_attention_mask"
_original = base.scaled_dot_product_attention

# Modules of mlx_lm.models whose class Attention caps scores, with members as `_attend_capped` names them; and whether
# that class takes masks as arrays only. Backends take causality faster by its name.
CAPPED = {"gemma2": True, "gear": False}


def scaled_dot_product_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
    cap: float = 0.0,
) -> mx.array:
    """mlx-lm's signature and meaning, and a cap (LayerInput's). queries (B, Hq, T, D); returns (B, Hq, T, Dv)."""
    if isinstance(cache, AttendingCache):
        return cache.attend(queries, scale=scale, mask=mask, sinks=sinks, cap=cap)
    if cap:
        return plain_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks, cap=cap)
    out: mx.array = _original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    return out


def install() -> None:
    """Put the seam in place; idempotent, and meant to be called again after a model module was imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models.") and getattr(module, _NAME, None) is _original:
            setattr(module, _NAME, scaled_dot_product_attention)
    for name, wants_arrays in CAPPED.items():
        found = sys.modules.get(f"mlx_lm.models.{name}")
        if found is None or hasattr(found.Attention.__call__, "__wrapped__"):
            continue
        found.Attention.__call__ = _with_capped(found.Attention.__call__, wants_arrays)
        if wants_arrays:
            setattr(found, _MASK_NAME, _with_names(getattr(found, _MASK_NAME)))
    for cls in (TurboQuantKVCache, BatchTurboQuantKVCache):
        setattr(mlx_lm_cache, cls.__name__, cls)  # load_prompt_cache looks classes up there


def is_installed() -> bool:
    return base.scaled_dot_product_attention is scaled_dot_product_attention


def _with_names(original: Callable[..., Any]) -> Callable[..., Any]:
    """mlx-lm's create_attention_mask for a model that wants arrays: caches that attend for themselves may name them."""

    @wraps(original)
    def create(h: mx.array, cache: Any = None, window_size: int | None = None, return_array: bool = False) -> Any:
        by_name = isinstance(cache, AttendingCache)
        return original(h, cache, window_size=window_size, return_array=return_array and not by_name)

    return create


def _with_capped(original: Callable[..., mx.array], wants_arrays: bool) -> Callable[..., mx.array]:
    """An Attention module's call: over a cache that attends for itself by `_attend_capped`, else as it was.

    wants_arrays: a mask that another layer's cache gave as a name becomes an array for it.
    """

    @wraps(original)
    def call(self: Any, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        if isinstance(cache, AttendingCache) and self.attn_logit_softcapping:
            return _attend_capped(self, x, mask, cache)
        if isinstance(mask, str) and wants_arrays:
            mask = base.create_causal_mask(x.shape[1], cache.offset)
        return original(self, x, mask, cache)

    return call


def _attend_capped(module: Any, x: mx.array, mask: mx.array | str | None, cache: AttendingCache) -> mx.array:
    """An Attention module over x (B, T, hidden): projections, norms where it has them, rotation, capped attention."""
    batch, num_tokens, _ = x.shape

    def heads(projected: mx.array, num_heads: int, norm: Callable[[mx.array], mx.array] | None = None) -> mx.array:
        """(B, heads, T, D)."""
        split = projected.reshape(batch, num_tokens, num_heads, -1)
        return (split if norm is None else norm(split)).transpose(0, 2, 1, 3)

    caching: Any = cache
    offset = caching.offset
    queries = module.rope(heads(module.q_proj(x), module.n_heads, module.get("q_norm")), offset=offset)
    keys = module.rope(heads(module.k_proj(x), module.n_kv_heads, module.get("k_norm")), offset=offset)
    keys, values = caching.update_and_fetch(keys, heads(module.v_proj(x), module.n_kv_heads))
    out = scaled_dot_product_attention(
        *(queries, keys, values, cache), scale=module.scale, mask=mask, cap=float(module.attn_logit_softcapping)
    )
    projected: mx.array = module.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, num_tokens, -1))
    return projected
