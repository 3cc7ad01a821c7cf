"""Prefill by MLX's attention, where flash.py has no kernel: format.py's rule of who sees what as an additive mask.

A history's columns are sink rows, all pages' tokens decoded, then the window's exact rows: a query sees a page's
decoded tokens from later pages on, and exact rows of its own page up to itself. Scores with a cap, which MLX's
attention has not, take its operations.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from turboquant_kv.backends.gpu.prefill_plan import PrefillGroup, PrefillSequence
from turboquant_kv.backends.plain_attention import plain_attention
from turboquant_kv.codec.format import KVFormat

MOST_SCORES = 1 << 25  # at a time, of capped ones, which MLX has no fused attention for: 128 MiB each of a few arrays


def masked_attention(
    queries: mx.array,
    history: tuple[mx.array, mx.array],
    group: PrefillGroup,
    fmt: KVFormat,
    *,
    scale: float,
    sinks: mx.array | None,
    cap: float = 0.0,
) -> mx.array:
    """Attention of the group's queries (B, Hq, T, D): (B, Hq, T, Dv) in their dtype, zeros past each one's queries.

    history: keys (rows, D) and values (rows, Dv) of all sequences, each where the group says. sinks (Hq,) join the
    denominator; cap is that of the scores, 0 for none. Sequences are attended one after the other.
    """
    if sinks is not None:
        sinks = sinks.astype(queries.dtype)
    outputs = []
    for b, sequence in enumerate(group.sequences):
        keys, values = (_heads_of(rows, group, sequence) for rows in history)
        num_rows, num_queries = queries.shape[2], sequence.figures.num_queries
        if not num_queries:
            outputs.append(mx.zeros((1, *queries.shape[1:3], values.shape[3]), queries.dtype))
            continue
        own, mask = queries[b : b + 1, :, :num_queries], prefill_mask(sequence, fmt, queries.dtype)
        if cap:
            out = _capped_attention(own, keys, values, mask, scale, sinks, cap)
        else:
            out = mx.fast.scaled_dot_product_attention(own, keys, values, scale=scale, mask=mask, sinks=sinks)
        short = num_queries < num_rows
        outputs.append(mx.pad(out, [(0, 0), (0, 0), (0, num_rows - num_queries), (0, 0)]) if short else out)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _capped_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array,
    scale: float,
    sinks: mx.array | None,
    cap: float,
) -> mx.array:
    """In float32, so many queries at a time that their scores stay below MOST_SCORES; mask (T, N)."""
    _, num_heads, num_queries, _ = queries.shape
    exact = [x.astype(mx.float32) for x in (keys, values)]
    step = max(1, MOST_SCORES // (num_heads * keys.shape[2]))
    parts = [
        plain_attention(
            *(queries[:, :, i : i + step].astype(mx.float32), *exact),
            scale=scale,
            mask=mask[i : i + step],
            sinks=sinks,
            cap=cap,
        ).astype(queries.dtype)
        for i in range(0, num_queries, step)
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _heads_of(rows: mx.array, group: PrefillGroup, sequence: PrefillSequence) -> mx.array:
    """A sequence's history, (1, Hkv, columns, dims), of all rows (rows, dims)."""
    own = rows if len(group.sequences) == 1 else rows[group.rows_of(sequence)]
    return own.reshape(1, group.num_kv_heads, sequence.num_columns, rows.shape[1])


def prefill_mask(sequence: PrefillSequence, fmt: KVFormat, dtype: mx.Dtype) -> mx.array:
    """(num_queries, columns): 0 where seen, the dtype's most negative value elsewhere."""
    at = sequence.figures
    return _mask(at.q_start, at.num_queries, at.num_sink, at.num_pages, at.window_start, at.num_window, fmt, dtype)


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
