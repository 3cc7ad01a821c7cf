"""Attention over keys and values as they are, in MLX operations: MLX's own, which knows no cap, or one with a cap."""

from __future__ import annotations

import mlx.core as mx


def plain_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
    cap: float = 0.0,
) -> mx.array:
    """Attention of queries (B, Hq, T, D) over keys (B, H, N, D) and values (B, H, N, Dv): (B, Hq, T, Dv), same dtype.

    mask: None, "causal" (the last query sees all keys), or bool or additive, broadcastable to (B, Hq, T, N). sinks
    (Hq,) join the softmax's denominator. cap: a score s becomes cap * tanh(s / cap) before the mask; 0: as they are.
    """
    if not cap:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    batch, num_q_heads, num_rows, _ = queries.shape
    num_heads, num_keys = keys.shape[1], keys.shape[2]
    # Operation by operation what mlx-lm's Gemma 2 does, so that a row of a batch gets what it gets alone.
    grouped = (queries * scale).reshape(batch, num_heads, num_q_heads // num_heads, num_rows, -1)
    scores = mx.tanh((grouped @ keys[:, :, None].swapaxes(-1, -2)) / cap) * cap
    if mask is not None:
        scores = _masked(scores, mask)
    if sinks is None:
        weights = mx.softmax(scores, axis=-1, precise=True)
    else:
        logits = mx.broadcast_to(sinks.astype(scores.dtype).reshape(1, num_heads, -1, 1, 1), (*scores.shape[:-1], 1))
        weights = mx.softmax(mx.concatenate([scores, logits], axis=-1), axis=-1, precise=True)[..., :num_keys]
    return (weights @ values[:, :, None]).reshape(batch, num_q_heads, num_rows, -1)


def _masked(scores: mx.array, mask: mx.array | str) -> mx.array:
    """scores (B, H, G, T, N) with a mask as `plain_attention` takes it."""
    num_heads, num_groups, num_rows, num_keys = scores.shape[1:]
    if isinstance(mask, str):
        mask = mx.arange(num_keys)[None] <= mx.arange(num_keys - num_rows, num_keys)[:, None]
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[1] == 1:
        mask = mask[:, :, None]
    else:
        mask = mask.reshape(mask.shape[0], num_heads, num_groups, *mask.shape[2:])
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    return scores + mask
