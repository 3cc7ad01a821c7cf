"""The plain meaning of every operation on compressed keys and values, in float64: the twin of each kernel.

Owns `quantise`, `encode`, `decode` and `attend`. Written to be read and compared against, not to be fast; pages,
pools and mlx-lm's cache verbs are elsewhere. The paper's product form is tests/turboquant_kv/product_form.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .codebook import centroids, thresholds
from .format import KVFormat, ScaleKind
from .packing import pack, unpack
from .rotation import rotation_matrix

FLOAT16_MAX = 65504.0

Real = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]


class Encoded(NamedTuple):
    """Stored vectors: codes (..., D*bits/8) uint8 in canonical packing, scales (...) float16."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]


def quantise(y: Real, bits: int) -> NDArray[np.uint8]:
    """Codes (uint8, y's shape) of the nearest centroids of unit-variance coordinates y.

    A code is the number of thresholds strictly below y, so a value on a threshold takes the lower code.
    Raises UnsupportedFormatError.
    """
    return np.searchsorted(thresholds(bits), y, side="left").astype(np.uint8)


def encode(x: Real, bits: int, rotation: Real, mean: Real | None = None, scale: ScaleKind = "unbiased") -> Encoded:
    """Compress vectors x (..., D) after subtracting `mean` (broadcast against x; None: 0).

    `rotation` (D, D) is orthonormal, y = R x (rotation.py). Coordinates of y are divided by their root mean square
    and quantised (paper, algorithm 1); one float16 per vector, `fitted_scale`, multiplies the centroids back.

    Where float16 ends: scales above 65504 are clamped, those below 6e-5 lose precision and below 3e-8 become 0.
    A zero vector stores scale 0. A vector with a NaN or an infinity stores a NaN scale and harms no other.
    Raises UnsupportedFormatError for bits without a codebook or packing.
    """
    centred = np.asarray(x, np.float64) - (0.0 if mean is None else np.asarray(mean, np.float64))
    with np.errstate(invalid="ignore"):  # inf - inf, on its way to a NaN scale
        y = centred @ np.asarray(rotation, np.float64).T
        rms = np.sqrt(np.mean(y * y, axis=-1))
        rms = np.where(np.isinf(rms), np.nan, rms)  # else the clamp below would hide an infinity
        z = y / np.where(rms == 0, 1.0, rms)[..., None]  # unit variance, or all zeros
        codes = quantise(z, bits)
        stored = np.minimum(rms * fitted_scale(z, codes, bits, scale), FLOAT16_MAX)
    return Encoded(pack(codes, bits), stored.astype(np.float16))


def fitted_scale(z: Float64, codes: NDArray[np.uint8], bits: int, scale: ScaleKind) -> Float64:
    """The factor (...) that multiplies c = centroids[codes] to stand for z (..., D), where |z|^2 = D or z = 0.

    plain           1                   the paper's: restores the norm before quantisation
    norm            |z| / |c|           the decoded vector has the norm of the original
    least_squares   <z, c> / |c|^2      least error, but inner products shrink by about 1 - D
    unbiased        |z|^2 / <z, c>      the decoded vector's projection on the original is the original
    """
    c = centroids(bits).astype(np.float64)[codes]
    z_energy, c_energy = np.sum(z * z, axis=-1), np.sum(c * c, axis=-1)
    inner = np.sum(z * c, axis=-1)  # positive unless z = 0: every centroid has the sign of its coordinate
    if scale == "plain":
        return np.ones(z.shape[:-1])
    if scale == "norm":
        return np.asarray(np.sqrt(z_energy / c_energy))
    if scale == "least_squares":
        return np.asarray(inner / c_energy)
    return np.asarray(z_energy / np.where(inner == 0, 1.0, inner))


def decode(encoded: Encoded, bits: int, head_dim: int, rotation: Real, mean: Real | None = None) -> Float64:
    """The vectors (..., head_dim) float64 that `encoded` stands for: mean + scale * R^T centroids[codes].

    Raises UnsupportedFormatError for unknown bits, ValueError when the packed length is not head_dim codes.
    """
    c = centroids(bits).astype(np.float64)[unpack(encoded.codes, bits, head_dim)]
    x = encoded.scales.astype(np.float64)[..., None] * (c @ np.asarray(rotation, np.float64))
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
) -> Float64:
    """Causal attention over a compressed cache, given the full history in original precision.

    q (Hq, T, D) sits at positions q_start .. q_start+T-1; k (Hkv, N, D) and v (Hkv, N, Dv) at 0 .. N-1, with
    N >= q_start + T; query head h reads KV head h // (Hq / Hkv). Keys and values that `exact_pairs` does not name are
    seen through their codes. Means are (Hkv, D) and (Hkv, Dv), used if fmt.centred. Returns (Hq, T, Dv).

    sinks    (Hq,) learned logits that join the softmax denominator and carry no value
    window   key j is visible to position p only if p - j < window
    mask     broadcastable to (Hq, T, N) by absolute key position: bool (True is visible) or added to the logits;
             always on top of causality

    A row that sees nothing returns zeros. Raises ValueError for shapes that do not fit.
    """
    num_heads, num_queries, _ = q.shape
    num_kv_heads, num_keys, _ = k.shape
    if num_heads % num_kv_heads or v.shape[:2] != k.shape[:2] or num_keys < q_start + num_queries:
        raise ValueError(f"q {q.shape} at {q_start}, k {k.shape} and v {v.shape} do not fit together")
    positions = q_start + np.arange(num_queries)
    exact = exact_pairs(positions, num_keys, fmt)
    bias = _bias(positions, num_heads, num_keys, window, mask)
    k_seen = _through_codes(k, fmt, "k", k_mean)
    v_seen = _through_codes(v, fmt, "v", v_mean)
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.empty((num_heads, num_queries, v.shape[-1]))
    for head in range(num_heads):
        kv = head // (num_heads // num_kv_heads)
        logits = scale * np.where(exact, q[head] @ k[kv].T, q[head] @ k_seen[kv].T) + bias[head]  # (T, N)
        weights = _softmax(logits, None if sinks is None else float(sinks[head]))
        out[head] = (weights * exact) @ v[kv] + (weights * ~exact) @ v_seen[kv]
    return out


def _through_codes(x: Real, fmt: KVFormat, which: str, mean: Real | None) -> Float64:
    """x (Hkv, N, D) as every later page sees it."""
    head_dim = x.shape[-1]
    bits = fmt.k_bits if which == "k" else fmt.v_bits
    rotation = rotation_matrix(head_dim, fmt.rotation_seed, "k" if which == "k" else "v")
    centre = mean[:, None, :] if mean is not None and fmt.centred else None
    return decode(encode(x, bits, rotation, centre, fmt.scale), bits, head_dim, rotation, centre)


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
