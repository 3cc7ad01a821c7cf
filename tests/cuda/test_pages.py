"""The page kernels' text of both dialects on the CPU: encoding and decoding beside their readable twins."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.cuda.emulator import cuda_kernel
from tests.metal.emulator import metal_kernel
from tests.turboquant_kv.histories import as_float64, in_tiles, random_rotary

from turboquant_kv.backends.base import (
    NO_SPAN,
    ExactBuffers,
    ExactRows,
    LayerShape,
    Means,
    PageWrites,
    RowSpan,
    SequenceView,
    StepRows,
)
from turboquant_kv.backends.gpu import page_kernels as gpu_pages
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import HOPPER
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.backends.portable.canonical import CanonicalStorage
from turboquant_kv.codec.format import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, KVFormat
from turboquant_kv.codec.rotation import hadamard, hadamard_base


def new_backends() -> tuple[GpuBackend, ...]:
    """Kernels are made anew: some tests change what they are made from."""
    return (
        GpuBackend("cuda", DecodeKernels("cuda", cuda_kernel, device=HOPPER), PageKernels("cuda", cuda_kernel)),
        GpuBackend("metal", DecodeKernels("metal", metal_kernel), PageKernels("metal", metal_kernel)),
    )


CUDA, METAL = new_backends()


def exact_rows(rng: np.random.Generator, num_rows: int, dims: tuple[int, int], dtype: Any) -> ExactRows:
    """As models hand them over: heads lie behind tokens."""
    k, v = (
        mx.array(rng.standard_normal((num_rows, 2, d)).astype(np.float32)).astype(dtype).swapaxes(0, 1) for d in dims
    )
    return ExactRows(k, v)


def check_history(
    backend: GpuBackend,
    fmt: KVFormat,
    dims: tuple[int, int],
    num_pages: int,
    dtype: Any,
    rng: np.random.Generator,
    turns: bool = False,
) -> None:
    """Random pages between random exact rows of several sequences: decoded as MLX operations do it, exact ones copied.

    One has num_pages pages; the others have less or none, and one no query, and so no history.
    """
    k_mean, v_mean = (rng.standard_normal((2, d)).astype(np.float32) for d in dims)
    means = Means(k_mean, v_mean, random_rotary(rng, dims[0]) if turns else None)
    storage: Any = backend.new_store(LayerShape(2, *dims, dtype), fmt, means)
    storage.grow(num_pages + 2)
    for arrays in storage._arrays:
        arrays._codes = mx.array(rng.integers(0, 256, arrays.codes.shape).astype(np.uint8))
        arrays._scales = mx.array(rng.uniform(0.05, 0.15, arrays.scales.shape).astype(np.float16))
    views, num_rows = [], int(rng.integers(1, 5))
    for pages, num_queries in ((num_pages, 1), (int(rng.integers(0, num_pages + 1)), 3), (num_pages, 0), (0, 2)):
        num_sink = fmt.sink_tokens if pages else int(rng.integers(0, fmt.sink_tokens + 1))
        num_window = int(rng.integers(0, 40)) if pages else 1
        sink = RowSpan(0, num_rows, num_sink) if num_sink else None
        num_rows += num_sink + int(rng.integers(0, 3))
        window = RowSpan(0, num_rows, num_window) if num_window else None
        num_rows += num_window + int(rng.integers(0, 3))
        views.append(SequenceView(0, num_queries, rng.permutation(num_pages + 2)[:pages], sink, window))
    held = exact_rows(rng, num_rows, dims, dtype)
    plan = backend.prepare_step(StepRows(views))
    (group,) = plan.groups_for(fmt.page_tokens, 2)
    got = storage.histories(group, ExactBuffers(*held, *held), plan.page_table)
    first_row = 0
    for view in views:
        if view.num_queries:
            first_row = check_rows(storage, view, held, got, first_row)
    assert got[0].shape[0] == got[1].shape[0] == first_row


def check_rows(
    storage: Any, view: SequenceView, held: ExactRows, got: tuple[mx.array, mx.array], first_row: int
) -> int:
    """A sequence's history, of both heads, among all rows; where it ends."""
    sink, window = view.sink or NO_SPAN, view.window or NO_SPAN
    for i, (rows, all_rows) in enumerate(zip(held, got, strict=True)):
        decoded = rows[:, :0]
        if len(view.page_ids):
            decoded = CanonicalStorage.decode(storage, view.page_ids, 0)[i]
        first, last = (rows[:, span.first : span.first + span.num_rows] for span in (sink, window))
        want = mx.concatenate([first, decoded, last], axis=1)
        end = first_row + 2 * want.shape[1]
        x = all_rows[first_row:end].reshape(want.shape)
        assert x.dtype == want.dtype
        tolerance = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[want.dtype]
        np.testing.assert_allclose(as_float64(x), as_float64(want), rtol=tolerance, atol=tolerance)
        exact = np.r_[: sink.num_rows, sink.num_rows + decoded.shape[1] : want.shape[1]]
        assert np.array_equal(as_float64(x)[:, exact], as_float64(want)[:, exact])
    return end


DECODED = [  # dims of keys and values, bits, sink, pages, dtype; every dim and width is there
    ((128, 64), (4, 3), 32, 3, mx.bfloat16),
    ((128, 128), (3, 8), 5, 1, mx.float16),
    ((64, 256), (2, 4), 0, 4, mx.float32),
    ((512, 512), (3, 4), 3, 2, mx.bfloat16),
    ((80, 96), (3, 4), 7, 3, mx.float16),
    ((112, 192), (4, 3), 33, 2, mx.bfloat16),
    ((192, 80), (8, 2), 0, 5, mx.float32),
    ((96, 112), (2, 8), 1, 0, mx.float16),
    ((128, 64), ("3t", "2t"), 5, 3, mx.float16),
    ((96, 256), ("2t", "3t"), 3, 2, mx.bfloat16),
    ((80, 512), ("3t", "2t"), 0, 2, mx.float32),
    ((192, 112), (4, "3t"), 7, 2, mx.float16),
    ((128, 64), ("4t", "3t"), 5, 3, mx.bfloat16),
    ((80, 512), ("4t", "4t"), 2, 2, mx.float16),
]


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("case", DECODED)
@pytest.mark.parametrize("backend", [CUDA, METAL], ids=["cuda", "metal"])
def test_histories_are_decoded_as_their_twins(
    backend: GpuBackend, case: Any, turns: bool, rng: np.random.Generator
) -> None:
    dims, bits, sink, num_pages, dtype = case
    fmt = KVFormat(bits[0], bits[1], page_tokens=int(rng.choice([16, 48])), sink_tokens=sink)
    check_history(backend, fmt, dims, num_pages, dtype, rng, turns)


TILED = [DECODED[0], DECODED[1], ((64, 64), ("4t", "3t"), 32, 4, mx.float16), ((128, 64), (4, 3), 0, 0, mx.bfloat16)]


@pytest.mark.parametrize("case", TILED)
@pytest.mark.parametrize("backend", [CUDA, METAL], ids=["cuda", "metal"])
def test_tiles_hold_what_rows_do(backend: GpuBackend, case: Any, rng: np.random.Generator) -> None:
    """Histories in tiles are the same rows in other places, and zeros up to the end of each head's last tile."""
    dims, bits, sink, num_pages, dtype = case
    fmt = KVFormat(bits[0], bits[1], page_tokens=48, sink_tokens=sink)
    storage: Any = backend.new_store(LayerShape(2, dims[0], dims[1], dtype), fmt, None)
    storage.grow(num_pages + 1)
    for arrays in storage._arrays:
        arrays._codes = mx.array(rng.integers(0, 256, arrays.codes.shape).astype(np.uint8))
        arrays._scales = mx.array(rng.uniform(0.05, 0.15, arrays.scales.shape).astype(np.float16))
    held, views = exact_rows(rng, 200, dims, dtype), []
    for pages, num_queries, num_window in ((num_pages, 3, 37), (0, 0, 5), (num_pages // 2, 1, 128 - sink), (0, 2, 1)):
        windows = RowSpan(0, sink, num_window)
        sinks = RowSpan(0, 0, sink) if sink else None
        views.append(SequenceView(0, num_queries, rng.permutation(num_pages + 1)[:pages], sinks, windows))
    plan = backend.prepare_step(StepRows(views))
    (rows,), (tiles,) = (plan.groups_for(48, 2, tile) for tile in (1, 128))
    assert tiles.num_places % 128 == 0 and tiles.num_places > rows.num_places
    got = [storage.histories(group, ExactBuffers(*held, *held), plan.page_table) for group in (rows, tiles)]
    for plain, tiled in zip(*got, strict=True):
        assert tiled.shape == (tiles.num_rows, plain.shape[1])
        for one, placed in zip(rows.sequences, tiles.sequences, strict=True):
            want = plain[rows.rows_of(one)].reshape(2, one.num_columns, plain.shape[1])
            if one.num_columns:
                # two kernels, whose sums a compiler may round in two ways
                assert mx.allclose(tiled[tiles.rows_of(placed)], in_tiles(want, 128), rtol=1e-2, atol=1e-3)


def test_threads_may_hold_twice_as_much(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """LANE_DIMS and ROUNDS are there to be tuned: other values compute the same."""
    monkeypatch.setattr(gpu_pages, "LANE_DIMS", 16)
    monkeypatch.setattr(gpu_pages, "ROUNDS", 3)
    for backend in new_backends():
        for bits in SUPPORTED_BITS:
            check_history(backend, KVFormat(bits, bits, page_tokens=16), (64, 128), 3, mx.bfloat16, rng)


@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_every_dim_has_kernels_of_its_own(dim: int) -> None:
    """H is kron(A, Sylvester), a vector's lanes fill whole warps, and what they share fits Metal's 32 KiB."""
    side = gpu_pages.SideShape(2, dim, 3, 16, "unbiased", mx.float16)
    base, lanes = hadamard_base(dim), side.lanes
    power = dim // len(base)
    assert np.array_equal(np.kron(base, hadamard(dim)[:power, :power] * base[0, 0]), hadamard(dim))
    assert 32 % lanes == 0
    if side.base > 1:
        vectors = gpu_pages.THREADS // lanes
        assert vectors * (5 * dim + 4 * lanes) + 2 * 4 * 256 <= 32 << 10


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("backend", [CUDA, METAL], ids=["cuda", "metal"])
def test_pages_are_centred_where_they_stand(backend: GpuBackend, dim: int, rng: np.random.Generator) -> None:
    """Written in two goes and read back: keys that are their own means, which are long, come back as nothing else."""
    fmt = KVFormat(4, 4, page_tokens=32, sink_tokens=3)
    mean = (20 * rng.standard_normal((2, dim))).astype(np.float32)
    means = Means(mean, mean, random_rotary(rng, dim))
    k = means.k_rows(fmt, np.arange(7, 10)) + 0.01 * rng.standard_normal((2, 96, dim)).astype(np.float32)
    storage = backend.new_store(LayerShape(2, dim, dim, mx.float32), fmt, means)
    storage.grow(5)
    for first, last in ((0, 2), (2, 3)):
        rows = mx.array(k[:, 32 * first : 32 * last])
        pages = PageWrites.following(np.array([4, 0, 2])[first:last], 7 + first, fmt.page_tokens)
        storage.encode(pages, rows, rows)
    got = as_float64(storage.decode(np.array([4, 0, 2]), 7)[0])
    np.testing.assert_allclose(got, k, atol=0.01)


@pytest.mark.parametrize("dim", [64, 128, 80, 192])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_rows_of_every_layout_give_the_same_codes(dim: int, bits: int, rng: np.random.Generator) -> None:
    """Contiguous, heads behind tokens, and dims apart from each other: Metal reads them where they lie."""
    fmt = KVFormat(bits, bits, page_tokens=16)
    x = rng.standard_normal((2, 32, dim)).astype(np.float32)
    storage = METAL.new_store(LayerShape(2, dim, dim, mx.float16), fmt, None)
    storage.grow(6)
    layouts = [mx.array(x), mx.array(x.swapaxes(0, 1).copy()).swapaxes(0, 1), mx.array(np.repeat(x, 2, 2))[:, :, ::2]]
    for i, rows in enumerate(layouts):
        pages = PageWrites.following(np.array([2 * i, 2 * i + 1]), 2 * i, fmt.page_tokens)
        storage.encode(pages, rows.astype(mx.float16), rows.astype(mx.float16))
    written = [storage.read(np.array([2 * i, 2 * i + 1])) for i in range(3)]
    assert written[0].k_codes.any()
    for other in written[1:]:
        assert np.array_equal(other.k_codes, written[0].k_codes)
        assert np.array_equal(other.v_scales, written[0].v_scales)


@pytest.mark.parametrize("dims", [(64, 128), (80, 112)])
@pytest.mark.parametrize("backend", [CUDA, METAL], ids=["cuda", "metal"])
def test_grown_arrays_hold_what_they_held(backend: GpuBackend, dims: tuple[int, int], rng: np.random.Generator) -> None:
    """A launch copies them: of pages whole words, though a vector's codes may be none; of exact rows each head's."""
    num_pages, num_rows = int(rng.integers(1, 5)), int(rng.integers(1, 40))
    store: Any = backend.new_store(LayerShape(2, *dims, mx.float16), KVFormat.parse("3/3"), None)
    store.grow(num_pages)
    for arrays in store._arrays:
        arrays._codes = mx.array(rng.integers(0, 256, arrays.codes.shape).astype(np.uint8))
        arrays._scales = mx.array(rng.uniform(0.05, 0.15, arrays.scales.shape).astype(np.float16))
    rows = exact_rows(rng, num_rows, dims, mx.float16)
    store.grow_rows(num_rows)
    store.put_rows(0, rows)
    before = store.read(np.arange(num_pages))
    store.grow(num_pages + int(rng.integers(1, 40)))
    store.grow_rows(num_rows + int(rng.integers(1, 40)))
    after, held = store.read(np.arange(num_pages)), store.get_rows(0, num_rows)
    for field in fields(before):
        assert np.array_equal(getattr(before, field.name), getattr(after, field.name)), field.name
    assert mx.array_equal(held.k, rows.k) and mx.array_equal(held.v, rows.v)
