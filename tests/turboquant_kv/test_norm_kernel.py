"""One launch adds two arrays and normalises the sum, as MLX's two operations do."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.cuda.emulator import cuda_kernel
from tests.metal.emulator import metal_kernel

from turboquant_kv.backends.gpu.norm_kernel import NormKernels, NormShape, norm_threads

FACTORIES: dict[str, Any] = {"cuda": cuda_kernel, "metal": metal_kernel}
pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="emulators run on a CPU")


@pytest.mark.parametrize("dialect", ["cuda", "metal"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    ("shape", "eps"), [((1, 1, 8), 1e-5), ((5, 1, 576), 1e-6), ((3, 2, 264), 1e-2), ((2, 4104), 0.1)]
)
def test_sum_and_norm_are_mlxs(
    dialect: Any, dtype: mx.Dtype, shape: tuple[int, ...], eps: float, rng: np.random.Generator
) -> None:
    x, y = (mx.array(rng.standard_normal(shape)).astype(dtype) for _ in "xy")
    x[..., :3] *= 30  # a row's largest are far from its rest, as activations are
    weight = mx.array(1 + 0.3 * rng.standard_normal(shape[-1])).astype(dtype)
    total, normed = NormKernels(dialect, FACTORIES[dialect]).add(x, y, weight, eps)
    assert mx.array_equal(total, x + y).item()
    expected = np.array(mx.fast.rms_norm(x + y, weight, eps).astype(mx.float32))
    ulp = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(np.array(normed.astype(mx.float32)), expected, rtol=2 * ulp, atol=ulp / 10)


def test_rows_do_not_depend_on_each_other(rng: np.random.Generator) -> None:
    kernels = NormKernels("cuda", cuda_kernel)
    x, y = (mx.array(rng.standard_normal((4, 1, 64))).astype(mx.float16) for _ in "xy")
    weight = mx.array(rng.standard_normal(64)).astype(mx.float16)
    together = kernels.add(x, y, weight, 1e-5)
    for i in range(4):
        alone = kernels.add(x[i : i + 1], y[i : i + 1], weight, 1e-5)
        assert all(mx.array_equal(a[0], b[i]).item() for a, b in zip(alone, together, strict=True))


def test_shapes_without_a_kernel_are_named() -> None:
    assert NormKernels.has_kernel(NormShape(576, mx.float16, 1e-5))
    assert not NormKernels.has_kernel(NormShape(100, mx.float16, 1e-5))
    assert not NormKernels.has_kernel(NormShape(64, mx.uint32, 1e-5))
    assert [norm_threads(width) for width in (8, 256, 257, 576, 5120, 16384)] == [32, 32, 64, 96, 512, 512]
