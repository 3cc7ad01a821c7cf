"""The emulated kernels' tests (tests/cuda), run by the real device."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.cuda import test_kernels as emulated
from tests.cuda import test_pages as pages
from tests.cuda import test_prefill as prefill
from tests.cuda import test_prefill_hopper as hopper
from tests.turboquant_kv.histories import History, feed, new_cache, random_queries

from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import compute_capability
from turboquant_kv.backends.gpu.flash import HOPPER_COLUMNS, FlashShape
from turboquant_kv.backends.gpu.source import mlx_factory
from turboquant_kv.cache import layer_cache as caches
from turboquant_kv.codec.format import KVFormat


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache made in a test attends through the device's own kernels."""
    backend = GpuBackend()
    monkeypatch.setattr(caches, "choose_backend", lambda name: backend)
    monkeypatch.setattr(emulated, "BACKEND", backend)
    monkeypatch.setattr(prefill, "FLASH", backend.kernels.flash)
    if backend.kernels.dialect == "cuda":  # of tests that make backends of their own
        monkeypatch.setattr(emulated, "cuda_kernel", mlx_factory("cuda"))


test_decode_is_the_references = emulated.test_decode_is_the_references
test_capped_decode_is_the_references = emulated.test_capped_decode_is_the_references
test_parts_merge_in_either_way = emulated.test_parts_merge_in_either_way
test_a_ragged_batch_is_the_references = emulated.test_a_ragged_batch_is_the_references
test_prefill_in_chunks_is_the_references = emulated.test_prefill_in_chunks_is_the_references
test_codes_are_the_references = emulated.test_codes_are_the_references
test_prefill_is_the_references = prefill.test_prefill_is_the_references
test_capped_prefill_is_the_references = prefill.test_capped_prefill_is_the_references
test_rows_of_a_batch_past_their_queries_are_zeros = prefill.test_rows_of_a_batch_past_their_queries_are_zeros
test_large_scores_neither_overflow_nor_vanish = prefill.test_large_scores_neither_overflow_nor_vanish


@pytest.mark.skipif(not mx.cuda.is_available(), reason="the prefill kernel is CUDA's")
@pytest.mark.parametrize(("sink", "page", "dim"), [(32, 64, 64), (7, 16, 64), (70, 48, 128), (0, 64, 256)])
def test_each_query_sees_its_columns_and_no_others(sink: int, page: int, dim: int, rng: np.random.Generator) -> None:
    prefill.test_each_query_sees_its_columns_and_no_others(sink, page, dim, rng)


on_hopper = pytest.mark.skipif(compute_capability()[0] != 9, reason="the kernel is Hopper's")
LONG = [  # several blocks of queries, and tiles enough that places are used many times
    (5, 1, 128, 128, 32, 96, ("4t", "3t"), mx.float16, (300, 1500, 2300)),
    (6, 2, 64, 64, 32, 128, (4, 3), mx.bfloat16, (700, 1900)),
]


@on_hopper
@pytest.mark.parametrize("case", [*hopper.CASES, *LONG])
def test_hopper_prefill_is_the_references(case: Any, rng: np.random.Generator) -> None:
    num_q, num_kv, k_dim, v_dim, sink, page, _, dtype, _ = case
    shape = FlashShape(num_q, num_kv, k_dim, v_dim, page, sink, dtype)
    assert prefill.FLASH.tile(shape) == HOPPER_COLUMNS, "another kernel would be tested"
    prefill.test_prefill_is_the_references(case, False, rng)


@on_hopper
@pytest.mark.parametrize("case", [*hopper.CASES, *LONG])
def test_capped_hopper_prefill_is_the_references(case: Any, rng: np.random.Generator) -> None:
    prefill.test_capped_prefill_is_the_references(case, rng)


@on_hopper
@pytest.mark.parametrize("bound", [400, 1 << 30])
@pytest.mark.parametrize("case", hopper.CASES)
def test_ragged_passes_on_hopper_are_the_references(
    case: Any, bound: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill.test_ragged_passes_are_the_references(case, bound, rng, monkeypatch)


@on_hopper
@pytest.mark.parametrize(("sink", "page", "dim"), [(32, 96, 128), (32, 128, 64), (70, 48, 64), (0, 128, 128)])
def test_each_query_on_hopper_sees_its_columns_and_no_others(
    sink: int, page: int, dim: int, rng: np.random.Generator
) -> None:
    prefill.test_each_query_sees_its_columns_and_no_others(sink, page, dim, rng)


@pytest.mark.parametrize("case", pages.TILED)
def test_tiles_hold_what_rows_do(case: Any, rng: np.random.Generator) -> None:
    pages.test_tiles_hold_what_rows_do(GpuBackend(), case, rng)


def test_pages_are_written_in_place(rng: np.random.Generator) -> None:
    """A step that closes a page costs far less memory than the pool: nobody copies it, but where it, or rows, grow."""
    fmt = KVFormat(4, 4)
    history = History.random(rng, 8, 4096 + 330, 128, dtype=mx.float16)
    cache = new_cache(fmt, "gpu")
    mx.eval(feed(cache, history, 0, 4096, random_queries(rng, 8, 4096, 128, mx.float16), 0.1))
    assert cache.sequence is not None
    pool = cache.sequence.pool
    closed = 0
    for p in range(4096, 4096 + 330):
        q = random_queries(rng, 8, 1, 128, mx.float16)
        mx.eval(q)
        mx.reset_peak_memory()
        before, used = mx.get_active_memory(), pool.num_used
        held, num_rows = pool.stores[0].allocated_bytes, pool.stores[0].num_rows
        mx.eval(feed(cache, history, p, p + 1, q, 0.1))
        if (pool.stores[0].allocated_bytes, pool.stores[0].num_rows) == (held, num_rows):
            assert mx.get_peak_memory() - before < held / 2
            closed += pool.num_used - used
    assert closed > 0
