"""Hopper's prefill kernel on the CPU: what test_prefill.py asks of the other one, and which of both a shape takes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.cuda import test_kernels as kernels
from tests.cuda import test_prefill as prefill
from tests.cuda.emulator import cuda_kernel

from turboquant_kv.backends.gpu import store as gpu
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import BLACKWELL, HOPPER
from turboquant_kv.backends.gpu.flash import HOPPER_COLUMNS, HOPPER_DIMS, FlashKernels, FlashShape, hopper_blocks
from turboquant_kv.cache import layer_cache as caches
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError

launched: list[str] = []


def recording(**text: Any) -> Any:
    """The emulator's kernels; what is launched is written down."""
    kernel = cuda_kernel(**text)

    def launch(**given: Any) -> list[mx.array]:
        launched.append(text["name"])
        return kernel(**given)

    return launch


FLASH = FlashKernels("cuda", recording, HOPPER)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache made in a test prefills through this kernel and no other way."""

    def refuse(*_: Any, **__: Any) -> mx.array:
        raise AssertionError("MLX's attention was called")

    backend = GpuBackend("cuda", kernels.BACKEND.kernels.decode, kernels.BACKEND.kernels.pages, FLASH)
    monkeypatch.setattr(caches, "choose_backend", lambda name: backend)
    monkeypatch.setattr(prefill, "FLASH", FLASH)
    monkeypatch.setattr(gpu, "masked_attention", refuse)
    launched.clear()


def only_hopper() -> bool:
    return bool(launched) and all(name.startswith("turboquant_prefill_hopper_") for name in launched)


CASES = [  # query heads, KV heads, D, Dv, sink, page, codecs, dtype, where chunks end
    (2, 1, 128, 128, 32, 96, ("4t", "3t"), mx.float16, (20, 150, 310)),
    (2, 2, 128, 128, 32, 128, (4, 3), mx.bfloat16, (130, 300)),
    (3, 1, 64, 64, 32, 96, ("4t", "3t"), mx.bfloat16, (10, 260)),
    (4, 2, 64, 64, 0, 128, (4, 3), mx.float16, (64, 290)),
    (2, 1, 64, 128, 70, 48, (4, 3), mx.float16, (50, 90, 250)),
    (2, 1, 128, 64, 5, 16, ("3t", "2t"), mx.bfloat16, (40, 210)),
]


@pytest.mark.parametrize(("case", "turns"), [*((case, False) for case in CASES), (CASES[0], True), (CASES[2], True)])
def test_prefill_is_the_references(case: Any, turns: bool, rng: np.random.Generator) -> None:
    prefill.test_prefill_is_the_references(case, turns, rng)
    assert only_hopper()


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5]])
def test_capped_prefill_is_the_references(case: Any, rng: np.random.Generator) -> None:
    prefill.test_capped_prefill_is_the_references(case, rng)
    assert only_hopper()


@pytest.mark.parametrize(("case", "bound"), [(CASES[0], 60), (CASES[1], 1 << 30), (CASES[2], 1 << 30), (CASES[3], 400)])
def test_ragged_passes_are_the_references(
    case: Any, bound: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill.test_ragged_passes_are_the_references(case, bound, rng, monkeypatch)
    assert only_hopper()


@pytest.mark.parametrize(("sink", "page", "dim"), [(32, 96, 128), (32, 128, 64), (70, 48, 64), (0, 128, 128)])
def test_each_query_sees_its_columns_and_no_others(sink: int, page: int, dim: int, rng: np.random.Generator) -> None:
    prefill.test_each_query_sees_its_columns_and_no_others(sink, page, dim, rng)
    assert only_hopper()


def test_large_scores_neither_overflow_nor_vanish(rng: np.random.Generator) -> None:
    prefill.test_large_scores_neither_overflow_nor_vanish(rng)
    assert only_hopper()


def test_a_shape_takes_what_the_device_has() -> None:
    def shape(k_dim: int, v_dim: int, dtype: mx.Dtype = mx.float16) -> FlashShape:
        return FlashShape(2, 1, k_dim, v_dim, 96, 32, dtype)

    for k_dim in HOPPER_DIMS:
        for v_dim in HOPPER_DIMS:
            assert FLASH.tile(shape(k_dim, v_dim)) == HOPPER_COLUMNS
            assert hopper_blocks(shape(k_dim, v_dim)).arena.num_bytes <= HOPPER.shared_bytes
    assert FLASH.tile(shape(64, 96)) == FLASH.tile(shape(256, 128)) == 1
    assert FLASH.tile(shape(64, 64, mx.float32)) == 1, "which has no kernel at all"
    later = FlashKernels("cuda", cuda_kernel, BLACKWELL)
    assert later.tile(shape(128, 128)) == 1
    assert "Hopper" in FLASH.details and "Hopper" not in later.details
    assert FlashKernels("metal", cuda_kernel, HOPPER).tile(shape(128, 128)) == 1


def test_histories_in_rows_are_refused(rng: np.random.Generator) -> None:
    fmt, shape = KVFormat(), FlashShape(2, 1, 64, 64, 96, 32, mx.float16)
    view, q = prefill.random_view(rng, fmt, 50, 20), mx.zeros((1, 2, 20, 64), mx.float16)
    for tile in (1, HOPPER_COLUMNS):
        group = prefill.alone(view, fmt, 1, tile)
        rows = mx.zeros((group.num_rows, 64), mx.float16)
        if tile == HOPPER_COLUMNS:
            assert FLASH.attend(shape, q, (rows, rows), group, scale=1.0, sinks=None).shape == q.shape
        else:
            with pytest.raises(UnsupportedFormatError):
                FLASH.attend(shape, q, (rows, rows), group, scale=1.0, sinks=None)
