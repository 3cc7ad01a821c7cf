"""Prefill by MLX's attention, where flash.py has no kernel: format.py's rule of who sees what as an additive mask.

The history's columns are sink rows, all pages' tokens decoded, then the window's exact rows: a query sees a page's
decoded tokens from later pages on, and exact rows of its own page up to itself.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from turboquant_kv.backends.base import SequenceView
from turboquant_kv.codec.format import KVFormat


def masked_attention(
    queries: mx.array,
    history: tuple[mx.array, mx.array],
    view: SequenceView,
    fmt: KVFormat,
    *,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of queries (1, Hq, T, D) at view.q_start; (1, Hq, T, Dv) in their dtype, zeros past num_queries.

    history: keys (Hkv, columns, D) and values (Hkv, columns, Dv). sinks (Hq,) join the denominator.
    """
    num_rows, num_queries = queries.shape[2], view.num_queries
    out = mx.fast.scaled_dot_product_attention(
        queries[:, :, :num_queries],
        history[0][None],
        history[1][None],
        scale=scale,
        mask=prefill_mask(view, fmt, queries.dtype),
        sinks=None if sinks is None else sinks.astype(queries.dtype),
    )
    return mx.pad(out, [(0, 0), (0, 0), (0, num_rows - num_queries), (0, 0)]) if num_queries < num_rows else out


def prefill_mask(view: SequenceView, fmt: KVFormat, dtype: mx.Dtype) -> mx.array:
    """(num_queries, columns): 0 where seen, the dtype's most negative value elsewhere."""
    num_sink = 0 if view.sink is None else view.sink.num_rows
    window = (0, 0) if view.window is None else (view.window.start, view.window.num_rows)
    return _mask(view.q_start, view.num_queries, num_sink, len(view.page_ids), *window, fmt, dtype)


@lru_cache(maxsize=2)  # all layers of a step ask for the same one
def _mask(
    q_start: int,
    num_queries: int,
    num_sink: int,
    num_pages: int,
    window_start: int,
    num_window: int,
    fmt: KVFormat,
    dtype: mx.Dtype,
) -> mx.array:
    query = (q_start + mx.arange(num_queries))[:, None]
    page_of_query = mx.where(query < fmt.sink_tokens, -1, (query - fmt.sink_tokens) // fmt.page_tokens)
    sink = mx.arange(num_sink)[None] <= query
    pages = (mx.arange(num_pages * fmt.page_tokens) // fmt.page_tokens)[None] < page_of_query
    position = (window_start + mx.arange(num_window))[None]
    window = (position <= query) & ((position - fmt.sink_tokens) // fmt.page_tokens == page_of_query)
    seen = mx.concatenate([sink, pages, window], axis=1)
    mask = mx.where(seen, mx.array(0, dtype), mx.array(mx.finfo(dtype).min, dtype))
    mx.eval(mask)
    return mask
