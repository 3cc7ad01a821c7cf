"""Tokens by the drawing kernel beside MLX's operations, its readable twin."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu.draw_kernel import DrawKernels
from turboserve.engine.fused_draw import FusedDraw
from turboserve.engine.sampling import MIN_TEMPERATURE
from turboserve.engine.weighted_draw import draw_weighted
from turboserve.messages import SamplingParams


def num_different(
    kernels: DrawKernels, params: Sequence[SamplingParams], logits: mx.array, rng: np.random.Generator
) -> int:
    """Of the finite rows of logits (R, V), how many tokens of one draw differ; which rows are broken may not."""
    floats = logits.astype(mx.float32)
    best = mx.max(floats, axis=-1, keepdims=True)
    rows = FusedDraw(kernels, params, MIN_TEMPERATURE)
    octaves, log2_min_p, top_p = (mx.array(rows.params[:, i : i + 1]) for i in range(3))
    numbers = rng.integers(0, 1 << 32, len(params), np.uint32)
    tokens, is_broken = (np.array(x) for x in rows.draw(logits, numbers))
    expected = draw_weighted(floats, best, mx.array(numbers[:, None]), octaves, log2_min_p, top_p)
    likeliest = mx.argmax(floats, axis=-1, keepdims=True).astype(mx.uint32)
    right = np.array(mx.where(octaves > 0, expected, likeliest))[:, 0]
    finite = np.isfinite(np.array(best)[:, 0])
    assert (is_broken == ~finite).all()
    for i in np.flatnonzero(finite)[:2]:
        alone, _ = FusedDraw(kernels, [params[i]], MIN_TEMPERATURE).draw(logits[i : i + 1], numbers[i : i + 1])
        assert alone.item() == tokens[i], "a row draws the same alone"
    return int((tokens != right)[finite].sum())
