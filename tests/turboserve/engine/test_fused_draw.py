"""One kernel draws what MLX's operations draw, in any batch; one that fails, errs or is slow is left, and named."""

from __future__ import annotations

import logging
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.cuda.emulator import cuda_kernel
from tests.metal.emulator import metal_kernel
from tests.turboserve.engine.drawn_alike import num_different
from tests.turboserve.engine.test_native_draw import some_logits, some_params

from turboquant_kv.backends.gpu import draw_kernel
from turboquant_kv.backends.gpu.draw_kernel import DrawKernels
from turboserve.engine import fused_draw
from turboserve.engine.fused_draw import FusedDraw, Verdict, draws_line, verdict_for
from turboserve.engine.sampling import MIN_TEMPERATURE, BatchSampler, row_sampling
from turboserve.messages import SamplingParams

FACTORIES: dict[str, Any] = {"cuda": cuda_kernel, "metal": metal_kernel}
pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="emulators run on a CPU")


@pytest.fixture(params=["cuda", "metal"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DrawKernels:
    """Emulated, with few threads: each is a fibre."""
    monkeypatch.setattr(draw_kernel, "THREADS", {"cuda": 128, "metal": 64})
    return DrawKernels(request.param, FACTORIES[request.param])


@pytest.fixture
def on_a_gpu(kernels: DrawKernels, monkeypatch: pytest.MonkeyPatch) -> DrawKernels:
    """As on a device whose kernel was tried and taken."""
    monkeypatch.setattr(fused_draw, "device_dialect", lambda: "cuda")
    monkeypatch.setattr(fused_draw, "verdict_for", lambda vocab_len, dtype: Verdict(kernels, "tried"))
    return kernels


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("vocab_len", [8, 31, 500, 2051])
def test_tokens_are_those_of_the_operations(
    kernels: DrawKernels, vocab_len: int, dtype: mx.Dtype, rng: np.random.Generator
) -> None:
    params = [some_params(rng) for _ in range(6)]
    logits = mx.array(some_logits(rng, 6, vocab_len)).astype(dtype)
    different = sum(num_different(kernels, params, logits, rng) for _ in range(4))
    assert different <= 1  # a token on the edge of a cut may fall on either side


def test_rows_that_are_not_finite_are_broken_and_the_others_are_not(
    kernels: DrawKernels, rng: np.random.Generator
) -> None:
    logits = some_logits(rng, 6, 300)
    expected, _ = FusedDraw(kernels, [SamplingParams()] * 6, MIN_TEMPERATURE).draw(mx.array(logits), NUMBERS)
    logits[1, 7], logits[2, 299], logits[3] = np.nan, np.inf, -np.inf
    tokens, broken = FusedDraw(kernels, [SamplingParams()] * 6, MIN_TEMPERATURE).draw(mx.array(logits), NUMBERS)
    assert np.array(broken).tolist() == [False, True, True, True, False, False]
    assert np.array(tokens)[[0, 4, 5]].tolist() == np.array(expected)[[0, 4, 5]].tolist()
    assert np.array(tokens).max() < 300


NUMBERS = np.array([0, 1, 1 << 31, (1 << 32) - 1, 12345, 99], np.uint32)


def test_the_whole_range_of_random_numbers_finds_a_token_that_can_be(kernels: DrawKernels) -> None:
    """The last token, one alone in the middle, and none before the first that has any weight."""
    logits = np.full((6, 200), -np.inf, np.float32)
    logits[:, [3, 150, 199]] = 0.0
    tokens, _ = FusedDraw(kernels, [SamplingParams()] * 6, MIN_TEMPERATURE).draw(mx.array(logits), NUMBERS)
    assert np.array(tokens).tolist() == [3, 3, 150, 199, 3, 3]


def test_a_batch_of_all_kinds_draws_as_by_operations(on_a_gpu: DrawKernels, rng: np.random.Generator) -> None:
    """With top-k, bias, penalties and a mask beside rows that have none."""
    rows = [row_sampling(some_params(rng), 90) for _ in range(9)]
    rows[4] = row_sampling(SamplingParams(logit_bias=((3, 4.0), (80, -5.0)), seed=4), 90)
    steps = [mx.array(some_logits(rng, 9, 90)) for _ in range(3)]
    together = _drawn(rows, steps, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_draw, "device_dialect", lambda: None)
        by_operations = _drawn(rows, steps, None)
    assert sum(a != b for a, b in zip(together, by_operations, strict=True)) <= 1
    for i, row in enumerate(rows):
        assert _drawn([row], [step[i : i + 1] for step in steps], None) == together[i :: len(rows)]


def _drawn(rows: list[Any], steps: list[mx.array], mask: mx.array | None) -> list[int]:
    sampler = BatchSampler()
    for row in rows:
        sampler.join(row, [1, 2], [3])
    return [token for logits in steps for token in np.array(sampler.sample(logits, mask=mask).tokens).tolist()]


@pytest.fixture
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_draw, "_verdicts", {})
    monkeypatch.setattr(fused_draw, "device_dialect", lambda: "cuda")
    monkeypatch.setattr(draw_kernel, "THREADS", {"cuda": 64, "metal": 64})


def _device(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    monkeypatch.setattr(fused_draw, "device_kernels", lambda dialect: DrawKernels("cuda", kernel))


def test_a_kernel_that_is_right_and_faster_is_taken(no_verdicts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _device(monkeypatch, cuda_kernel)
    monkeypatch.setattr(fused_draw, "_times", lambda *draws: [1e-4, 9e-4])
    found = verdict_for(60, mx.float32)
    assert found.kernels is not None and verdict_for(60, mx.float32) is found
    assert draws_line() == "one kernel (32 rows in 0.10 ms, by MLX operations in 0.90)"


def test_a_slower_kernel_is_left_with_a_warning(
    no_verdicts: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _device(monkeypatch, cuda_kernel)
    monkeypatch.setattr(fused_draw, "_times", lambda *draws: [9e-4, 1e-4])
    with caplog.at_level(logging.WARNING):
        assert verdict_for(60, mx.float32).kernels is None
    assert "drawn by MLX operations: 32 rows in 0.90 ms" in caplog.text
    assert draws_line().startswith("MLX operations")


def test_a_kernel_that_does_not_compile_is_left_with_a_warning(
    no_verdicts: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**text: Any) -> Any:
        raise RuntimeError("expected a\nsemicolon")

    _device(monkeypatch, broken)
    with caplog.at_level(logging.WARNING):
        assert verdict_for(60, mx.float32).kernels is None
    assert "the kernel failed: expected a semicolon" in caplog.text


def test_a_kernel_that_is_wrong_is_left_with_a_warning(
    no_verdicts: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(**text: Any) -> Any:
        right = cuda_kernel(**text)

        def launch(**given: Any) -> Any:
            tokens, is_broken = right(**given)
            return [mx.maximum(tokens, 1) - 1, is_broken]

        return launch

    _device(monkeypatch, wrong)
    with caplog.at_level(logging.WARNING):
        assert verdict_for(60, mx.float32).kernels is None
    assert "tokens wrong" in caplog.text


def test_logits_without_a_kernel_are_left_to_operations(no_verdicts: None) -> None:
    assert verdict_for(1 << 25, mx.float32).kernels is None
    assert "no kernel" in verdict_for(60, mx.float64).reason


def test_parameters_are_of_each_row_alone() -> None:
    rows = FusedDraw(
        DrawKernels("cuda", cuda_kernel), [SamplingParams(temperature=0.0), SamplingParams(min_p=0.25)], 1e-6
    )
    assert rows.params.tolist() == [[0.0, -math.inf, 1.0], [np.float32(math.log2(math.e)), -2.0, 1.0]]
