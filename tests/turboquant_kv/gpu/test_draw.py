"""The drawing kernel on a real device: tokens are those of MLX's operations, whatever rows are beside them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tests.turboserve.engine.drawn_alike import num_different
from tests.turboserve.engine.test_native_draw import some_logits, some_params

from turboquant_kv.backends.gpu.draw_kernel import DrawKernels
from turboserve.engine.fused_draw import device_dialect, verdict_for


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("vocab_len", [8, 1025, 49_152, 152_064])
def test_tokens_are_those_of_the_operations(vocab_len: int, dtype: mx.Dtype, rng: np.random.Generator) -> None:
    dialect = device_dialect()
    assert dialect is not None
    params = [some_params(rng) for _ in range(24)]
    logits = mx.array(some_logits(rng, 24, vocab_len)).astype(dtype)
    different = sum(num_different(DrawKernels(dialect), params, logits, rng) for _ in range(4))
    assert different <= 2  # tokens on the edge of a cut may fall on either side


def test_the_devices_trial_takes_it() -> None:
    found = verdict_for(49_152, mx.float16)
    assert found.kernels is not None, found.reason
