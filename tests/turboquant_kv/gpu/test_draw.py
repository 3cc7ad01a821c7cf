"""The drawing kernel on a real device: tokens are those of MLX's operations, whatever rows are beside them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tests.turboserve.engine.test_native_draw import some_logits, some_params

from turboquant_kv.backends.gpu.draw_kernel import DrawKernels
from turboserve.engine.fused_draw import FusedDraw, device_dialect, verdict_for
from turboserve.engine.sampling import MIN_TEMPERATURE
from turboserve.engine.weighted_draw import draw_weighted


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("vocab_len", [8, 1025, 49_152, 152_064])
def test_tokens_are_those_of_the_operations(vocab_len: int, dtype: mx.Dtype, rng: np.random.Generator) -> None:
    dialect = device_dialect()
    assert dialect is not None
    kernels, num_rows = DrawKernels(dialect), 24
    params = [some_params(rng) for _ in range(num_rows)]
    logits = mx.array(some_logits(rng, num_rows, vocab_len)).astype(dtype)
    floats = logits.astype(mx.float32)
    best = mx.max(floats, axis=-1, keepdims=True)
    rows = FusedDraw(kernels, params, MIN_TEMPERATURE)
    octaves, log2_min_p, top_p = (mx.array(rows.params[:, i : i + 1]) for i in range(3))
    different = 0
    for _ in range(4):
        numbers = rng.integers(0, 1 << 32, num_rows, np.uint32)
        tokens, is_broken = (np.array(x) for x in rows.draw(logits, numbers))
        expected = draw_weighted(floats, best, mx.array(numbers[:, None]), octaves, log2_min_p, top_p)
        likeliest = mx.argmax(floats, axis=-1, keepdims=True).astype(mx.uint32)
        right = np.array(mx.where(octaves > 0, expected, likeliest))[:, 0]
        finite = np.isfinite(np.array(best)[:, 0])
        assert (is_broken == ~finite).all()
        different += int((tokens != right)[finite].sum())
        for i in np.flatnonzero(finite)[:3]:
            alone = FusedDraw(kernels, [params[i]], MIN_TEMPERATURE).draw(logits[i : i + 1], numbers[i : i + 1])[0]
            assert alone.item() == tokens[i]
    assert different <= 2  # tokens on the edge of a cut may fall on either side


def test_the_devices_trial_takes_it() -> None:
    found = verdict_for(49_152, mx.float16)
    assert found.kernels is not None, found.reason
