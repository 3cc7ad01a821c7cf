"""The addition with a norm on a real device."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.gpu.norm_kernel import NormKernels


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (64, 1, 576), (3, 5, 5120), (2, 1, 8200)])
def test_sum_and_norm_are_mlxs(shape: tuple[int, ...], dtype: mx.Dtype, rng: np.random.Generator) -> None:
    x, y = (mx.array(rng.standard_normal(shape)).astype(dtype) for _ in "xy")
    weight = mx.array(1 + 0.3 * rng.standard_normal(shape[-1])).astype(dtype)
    total, normed = NormKernels("metal" if mx.metal.is_available() else "cuda").add(x, y, weight, 1e-5)
    assert mx.array_equal(total, x + y).item()
    expected = np.array(mx.fast.rms_norm(x + y, weight, 1e-5).astype(mx.float32))
    ulp = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(np.array(normed.astype(mx.float32)), expected, rtol=2 * ulp, atol=ulp / 10)
