"""The plain meaning of every operation on compressed keys and values, in float64: the twin of each kernel.

Owns centring, rotation and `attend`; what becomes of a rotated vector is its codec's (scalar_reference.py for today's).
Written to be read and compared against, not to be fast; pages, pools and mlx-lm's cache verbs are elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codec import Codec, Encoded
from .format import KVFormat
from .rotary import BLOCK_TOKENS, Rotary
from .rotation import Which, rotation_matrix

Real = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]


def encode(x: Real, codec: Codec, rotation: Real, mean: Real | None = None) -> Encoded:
    """Compress vectors x (..., D) after subtracting `mean` (broadcast against x; None: 0).

    `rotation` (D, D) is orthonormal: the codec gets y = R (x - mean) (rotation.py), and says what becomes of vectors
    that are zero, not finite, or beyond float16 (Codec.encode). Raises UnsupportedFormatError.
    """
    centred = np.asarray(x, np.float64) - (0.0 if mean is None else np.asarray(mean, np.float64))
    with np.errstate(invalid="ignore"):  # inf - inf, on its way to a NaN scale
        return codec.encode(centred @ np.asarray(rotation, np.float64).T)


def decode(encoded: Encoded, codec: Codec, head_dim: int, rotation: Real, mean: Real | None = None) -> Float64:
    """The vectors (..., head_dim) float64 that `encoded` stands for: mean + scale * R^T codec.decode(codes).

    Raises ValueError when the packed length is not that of head_dim coordinates.
    """
    y = codec.decode(encoded.codes, head_dim) @ np.asarray(rotation, np.float64)
    x = encoded.scales.astype(np.float64)[..., None] * y
    return np.asarray(x if mean is None else x + np.asarray(mean, np.float64))


def exact_pairs(positions: NDArray[np.integer[Any]], num_keys: int, fmt: KVFormat) -> NDArray[np.bool_]:
    """(T, num_keys): whether the query at positions[t] sees key j <= positions[t] exactly.

    It does for j < sink_tokens and in its own page; by positions alone, so chunking changes no result.
    """
    keys = np.arange(num_keys)
    page_of_query = (positions - fmt.sink_tokens) // fmt.page_tokens
    page_of_key = (keys - fmt.sink_tokens) // fmt.page_tokens
    exact: NDArray[np.bool_] = (keys < fmt.sink_tokens) | (page_of_query[:, None] == page_of_key[None, :])
    return exact


def attend(
    q: Real,
    k: Real,
    v: Real,
    fmt: KVFormat,
    q_start: int,
    scale: float,
    k_mean: Real | None = None,
    v_mean: Real | None = None,
    sinks: Real | None = None,
    window: int | None = None,
    mask: NDArray[Any] | None = None,
    cap: float = 0.0,
) -> Float64:
    """Causal attention over a compressed cache, given the full history in original precision.

    q (Hq, T, D) sits at positions q_start .. q_start+T-1; k (Hkv, N, D) and v (Hkv, N, Dv) at 0 .. N-1, with
    N >= q_start + T; query head h reads KV head h // (Hq / Hkv). Keys and values that `exact_pairs` does not name are
    seen through their codes. Means are (Hkv, D) and (Hkv, Dv), used if fmt.centred; one that turns with the keys is
    (Hkv, N, D), as `turning_means` gives it. Returns (Hq, T, Dv).

    sinks    (Hq,) learned logits that join the softmax denominator and carry no value
    window   key j is visible to position p only if p - j < window
    mask     broadcastable to (Hq, T, N) by absolute key position: bool (True is visible) or added to the logits;
             always on top of causality
    cap      a score s becomes cap * tanh(s / cap) before masks and softmax; sinks stay; 0: no cap

    A row that sees nothing returns zeros. Raises ValueError for shapes that do not fit.
    """
    num_heads, num_queries, _ = q.shape
    num_kv_heads, num_keys, _ = k.shape
    if num_heads % num_kv_heads or v.shape[:2] != k.shape[:2] or num_keys < q_start + num_queries:
        raise ValueError(f"q {q.shape} at {q_start}, k {k.shape} and v {v.shape} do not fit together")
    positions = q_start + np.arange(num_queries)
    exact = exact_pairs(positions, num_keys, fmt)
    bias = _bias(positions, num_heads, num_keys, window, mask)
    k_seen = _through_codes(k, fmt.keys, fmt, "k", k_mean)
    v_seen = _through_codes(v, fmt.values, fmt, "v", v_mean)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.empty((num_heads, num_queries, v.shape[-1]))
    for head in range(num_heads):
        kv = head // (num_heads // num_kv_heads)
        scores = scale * np.where(exact, q[head] @ k[kv].T, q[head] @ k_seen[kv].T)  # (T, N)
        logits = (cap * np.tanh(scores / cap) if cap else scores) + bias[head]
        weights = _softmax(logits, None if sinks is None else float(sinks[head]))
        out[head] = (weights * exact) @ v[kv] + (weights * ~exact) @ v_seen[kv]
    return out


def _through_codes(x: Real, codec: Codec, fmt: KVFormat, which: Which, mean: Real | None) -> Float64:
    """x (Hkv, N, D) as every later page sees it."""
    rotation = rotation_matrix(x.shape[-1], fmt.rotation_seed, which)
    centre = None
    if mean is not None and fmt.centred:
        centre = mean[:, None, :] if mean.ndim == 2 else mean[:, : x.shape[1]]
    return decode(encode(x, codec, rotation, centre), codec, x.shape[-1], rotation, centre)


def turning_means(mean: Real, rotary: Rotary, fmt: KVFormat, num_keys: int) -> Float64:
    """What keys at positions 0 .. num_keys-1 are centred by, (Hkv, num_keys, D), for a mean (Hkv, D) before the turn.

    Behind the sink, blocks of BLOCK_TOKENS share the average of R(p) mean over their positions. Sink keys stay exact;
    what stands there is nobody's mean.
    """
    means = np.zeros((len(mean), num_keys, mean.shape[-1]))
    for start in range(fmt.sink_tokens, num_keys, BLOCK_TOKENS):
        turned = [rotary.turned(mean, np.full(len(mean), p)) for p in range(start, start + BLOCK_TOKENS)]
        means[:, start : start + BLOCK_TOKENS] = np.mean(turned, axis=0)[:, None]
    return means


def _bias(
    positions: NDArray[np.integer[Any]], num_heads: int, num_keys: int, window: int | None, mask: NDArray[Any] | None
) -> Float64:
    """(Hq, T, N) added to the logits: 0 or the mask's own value where visible, -inf elsewhere."""
    distance = positions[:, None] - np.arange(num_keys)[None, :]
    visible = (distance >= 0) & (distance < (num_keys if window is None else window))
    bias = np.broadcast_to(np.where(visible, 0.0, -np.inf), (num_heads, *visible.shape))
    if mask is None:
        return bias
    return bias + (np.where(mask, 0.0, -np.inf) if mask.dtype == np.bool_ else mask)


def _softmax(logits: Float64, sink: float | None) -> Float64:
    """Rows of weights (T, N); `sink` is one more logit in the denominator. Rows of -inf give zeros."""
    extra = np.full((len(logits), 1), -np.inf if sink is None else sink)
    everything = np.concatenate([logits, extra], axis=-1)
    peak = everything.max(axis=-1, keepdims=True)
    weights = np.exp(everything - np.where(np.isneginf(peak), 0.0, peak))
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray((weights / np.where(total == 0, 1.0, total))[:, :-1])
