"""The fused kernels' CUDA text, tensor-core variant included, on the CPU against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.cuda.emulator import cuda_kernel
from tests.turboquant_kv.histories import (
    History,
    check_balanced_decode,
    expected,
    feed,
    key_means,
    new_cache,
    random_queries,
    random_rotary,
    relative_error,
    rounded,
)

from turboquant_kv.backends.base import LayerShape, Means, PageWrites
from turboquant_kv.backends.gpu import store as gpu
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.device import AMPERE, HOPPER, SMALL, Device
from turboquant_kv.backends.gpu.flash import FlashKernels
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.backends.gpu.tuning import Tuning
from turboquant_kv.cache import layer_cache as caches
from turboquant_kv.cache.layer_cache import LayerSource, TurboQuantKVCache
from turboquant_kv.codec import reference
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary
from turboquant_kv.codec.rotation import rotation_matrix

# As in tests/turboquant_kv/test_backends.py, and for the same reasons.
TOLERANCE = {mx.float32: 2e-3, mx.float16: 4e-3, mx.bfloat16: 1e-2}

NO_FLASH = FlashKernels("metal", cuda_kernel)  # no kernel prefills here: that is test_prefill.py's
BACKEND = GpuBackend(
    "cuda",
    DecodeKernels("cuda", cuda_kernel, device=HOPPER),
    PageKernels("cuda", cuda_kernel),
    NO_FLASH,
)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache made in a test attends through emulated CUDA."""
    monkeypatch.setattr(caches, "choose_backend", lambda name: BACKEND)


CASES = [  # query heads, KV heads, D, Dv, sink, page, bits, query rows, tokens, dtype
    (5, 1, 128, 128, 32, 64, (4, 4), 1, 300, mx.float16),
    (10, 2, 128, 128, 32, 64, (4, 3), 1, 170, mx.bfloat16),
    (7, 1, 128, 64, 5, 16, (3, 3), 2, 90, mx.float16),
    (4, 2, 64, 128, 8, 48, (3, 4), 1, 150, mx.bfloat16),
    (2, 1, 256, 256, 17, 32, (4, 2), 3, 120, mx.float16),
    (3, 1, 192, 192, 0, 16, (2, 3), 1, 83, mx.bfloat16),
    (4, 2, 64, 64, 4, 16, (4, 4), 8, 75, mx.float32),
    (3, 1, 96, 96, 4, 64, (4, 3), 1, 200, mx.float16),
    (2, 1, 80, 112, 4, 32, (3, 4), 1, 100, mx.bfloat16),
    (4, 2, 96, 80, 4, 16, (8, 3), 1, 75, mx.float16),
    (5, 1, 128, 128, 32, 64, ("3t", "2t"), 1, 300, mx.float16),
    (4, 2, 64, 256, 8, 48, ("2t", "3t"), 1, 150, mx.bfloat16),
    (3, 1, 256, 64, 17, 32, ("3t", "3t"), 3, 120, mx.float16),
    (2, 1, 80, 96, 4, 32, ("3t", "2t"), 1, 100, mx.float16),
    (4, 2, 96, 80, 4, 32, ("2t", "3t"), 1, 95, mx.bfloat16),
    (3, 1, 112, 192, 0, 64, ("3t", "3t"), 2, 90, mx.float16),
    (3, 1, 192, 112, 0, 32, (4, "2t"), 1, 83, mx.float16),
    (2, 1, 128, 64, 4, 16, ("2t", 3), 2, 90, mx.bfloat16),
    (4, 2, 64, 128, 4, 16, ("3t", 8), 8, 75, mx.float32),
    (5, 1, 128, 128, 32, 64, ("4t", "3t"), 1, 300, mx.float16),
    (4, 2, 64, 64, 4, 16, ("4t", "4t"), 2, 75, mx.bfloat16),
    (2, 1, 80, 96, 4, 32, ("4t", "4t"), 1, 100, mx.float16),
    (4, 2, 96, 80, 4, 64, ("4t", "3t"), 1, 95, mx.bfloat16),
    (3, 1, 256, 128, 17, 48, ("4t", "4t"), 1, 120, mx.float16),
    (2, 1, 112, 256, 0, 32, (4, "4t"), 2, 83, mx.float16),
    (4, 1, 64, 128, 4, 16, ("4t", 8), 3, 75, mx.float32),
    (4, 2, 32, 48, 4, 32, (4, 4), 1, 150, mx.float16),
    (2, 1, 48, 32, 8, 16, (3, 4), 2, 90, mx.bfloat16),
    (3, 1, 160, 160, 0, 32, (4, 3), 1, 100, mx.float16),
]


@pytest.mark.parametrize("case", CASES)
def test_decode_is_the_references(case: Any, rng: np.random.Generator) -> None:
    """Means turn in every other run: compiling for both takes longer than all other tests together."""
    turns = bool(rng.integers(2))
    num_q, num_kv, k_dim, v_dim, sink, page, bits, num_rows, num_tokens, dtype = case
    fmt = KVFormat(bits[0], bits[1], page_tokens=page, sink_tokens=sink)
    num_tokens += int(rng.integers(0, page))
    history = History.random(rng, num_kv, num_tokens + num_rows, k_dim, v_dim, dtype)
    means = history.means(rng, random_rotary(rng, k_dim) if turns else None)
    cache = new_cache(fmt, "gpu", means)
    feed(cache, history, 0, num_tokens, random_queries(rng, num_q, num_tokens, k_dim, dtype), 0.1)
    q = random_queries(rng, num_q, num_rows, k_dim, dtype)
    out = feed(cache, history, num_tokens, num_tokens + num_rows, q, 0.1)
    assert out.dtype == dtype
    assert relative_error(out, expected(history, q, fmt, num_tokens, 0.1, means)) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4], CASES[6], CASES[9], CASES[12], CASES[19], CASES[23]])
def test_capped_decode_is_the_references(case: Any, rng: np.random.Generator) -> None:
    """Of codes and of exact rows; attention sinks are above the cap. Means turn in every other run."""
    turns = bool(rng.integers(2))
    num_q, num_kv, k_dim, v_dim, sink, page, bits, num_rows, num_tokens, dtype = case
    fmt = KVFormat(bits[0], bits[1], page_tokens=page, sink_tokens=sink)
    num_tokens += int(rng.integers(0, page))
    history = History.random(rng, num_kv, num_tokens + num_rows, k_dim, v_dim, dtype)
    means = history.means(rng, random_rotary(rng, k_dim) if turns else None)
    cache = new_cache(fmt, "gpu", means)
    cap = float(rng.uniform(0.3, 1))
    feed(cache, history, 0, num_tokens, random_queries(rng, num_q, num_tokens, k_dim, dtype), 0.1, cap=cap)
    q = random_queries(rng, num_q, num_rows, k_dim, dtype)
    sinks = (rng.standard_normal(num_q) + 3).astype(np.float32)
    out = feed(cache, history, num_tokens, num_tokens + num_rows, q, 0.1, sinks=mx.array(sinks), cap=cap)
    want = expected(history, q, fmt, num_tokens, 0.1, means, sinks=sinks, cap=cap)
    assert relative_error(out, want) < TOLERANCE[dtype]
    plain = expected(history, q, fmt, num_tokens, 0.1, means, sinks=sinks)
    assert relative_error(out, plain) > 2 * TOLERANCE[dtype], "the cap must have mattered"


@pytest.mark.parametrize("device", [AMPERE, SMALL])
@pytest.mark.parametrize("bits", [(4, 3), (3, 3), ("3t", "2t"), ("2t", "3t"), ("4t", "3t")])
def test_smaller_devices_are_the_references(
    device: Device, bits: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy engine, less shared memory, other tables and fewer warps."""
    backend = GpuBackend("cuda", DecodeKernels("cuda", cuda_kernel, device=device), BACKEND.kernels.pages, NO_FLASH)
    monkeypatch.setattr(caches, "choose_backend", lambda name: backend)
    fmt = KVFormat(bits[0], bits[1], page_tokens=32, sink_tokens=4)
    dim = 128 if device is AMPERE else 256
    history = History.random(rng, 1, 170, dim, dtype=mx.float16)
    cache = new_cache(fmt, "gpu")
    feed(cache, history, 0, 165, random_queries(rng, 2, 165, dim, mx.float16), 0.1)
    q = random_queries(rng, 2, 5, dim, mx.float16)
    out = feed(cache, history, 165, 170, q, 0.1)
    assert relative_error(out, expected(history, q, fmt, 165, 0.1, None)) < TOLERANCE[mx.float16]


@pytest.mark.parametrize("fused", [False, True])
def test_parts_merge_in_either_way(fused: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last block or in a launch of their own; attention sinks join in both."""
    tuning = Tuning(4, 16, 2, 128, blocks=20, fused=fused)
    backend = GpuBackend("cuda", DecodeKernels("cuda", cuda_kernel, tuning), BACKEND.kernels.pages, NO_FLASH)
    monkeypatch.setattr(caches, "choose_backend", lambda name: backend)
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=8)
    history = History.random(rng, 1, 700, 64, dtype=mx.float16)
    cache = new_cache(fmt, "gpu")
    feed(cache, history, 0, 699, random_queries(rng, 3, 699, 64, mx.float16), 0.125)
    q = random_queries(rng, 3, 1, 64, mx.float16)
    sinks = rng.standard_normal(3).astype(np.float32) + 2
    out = feed(cache, history, 699, 700, q, 0.125, sinks=mx.array(sinks))
    want = expected(history, q, fmt, 699, 0.125, None, sinks=sinks)
    assert relative_error(out, want) < TOLERANCE[mx.float16]


WALKS = [(64, 32, 3), (128, 16, 4), (80, 16, 3), (96, 32, "3t")]  # dim, tile, codec of keys


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("case", WALKS)
def test_long_walks_turn_means_all_the_way(
    case: Any, halves: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few warps, each with more tiles than one product of 16 blocks covers; factors are a half, or the sum of two."""
    dim, tile, codec = case
    monkeypatch.setattr(gpu, "LONGEST_PLAIN_MEAN", np.inf if halves == 1 else 0.0)
    tuning = Tuning(4, tile, 2, 128, blocks=1)
    backend = GpuBackend("cuda", DecodeKernels("cuda", cuda_kernel, tuning), BACKEND.kernels.pages, NO_FLASH)
    monkeypatch.setattr(caches, "choose_backend", lambda name: backend)
    fmt = KVFormat(codec, 4, page_tokens=32, sink_tokens=5)
    num_tokens = int(rng.integers(2200, 2400))
    history = History.random(rng, 1, num_tokens + 3, dim, dtype=mx.float16)
    means = history.means(rng, random_rotary(rng, dim))
    cache = new_cache(fmt, "gpu", means)
    feed(cache, history, 0, num_tokens, random_queries(rng, 1, num_tokens, dim, mx.float16), 0.05)
    assert cache.sequence is not None
    storage: Any = cache.sequence.pool.stores[0]
    q = random_queries(rng, 2, 3, dim, mx.float16)
    assert storage.launch_for(q)._shape.turn_parts == halves
    out = feed(cache, history, num_tokens, num_tokens + 3, q, 0.05)
    assert relative_error(out, expected(history, q, fmt, num_tokens, 0.05, means)) < TOLERANCE[mx.float16]


def test_scores_of_a_large_mean_are_float32s(rng: np.random.Generator) -> None:
    """A mean adds up to 1000 to every score: of that, what halves leave out of a cosine or a query is tenths."""
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=32)
    num_tokens, rotary = 600 + int(rng.integers(0, 16)), Rotary(np.array([1e-4]), 2, 1)
    direction = rng.standard_normal(2)
    direction /= np.linalg.norm(direction)
    mean = np.zeros((1, 64), np.float32)
    mean[0, :2] = 1000 * direction
    history = History.random(rng, 1, num_tokens, 64, dtype=mx.float32)
    history.k = rounded(history.k + rotary.turned(mean[:, None], np.arange(num_tokens)[None]), mx.float32)
    # values that drift, so that early and late tokens' weights show
    history.v = rounded(history.v + np.linspace(0, 3, num_tokens)[None, :, None], mx.float32)
    means = Means(mean, history.v.mean(axis=1).astype(np.float32), rotary)
    cache = new_cache(fmt, "gpu", means)
    feed(cache, history, 0, num_tokens - 1, random_queries(rng, 8, num_tokens - 1, 64, mx.float32), 0.1)
    q = np.array(random_queries(rng, 8, 1, 64, mx.float32))
    q[..., :2] = direction * rng.uniform(5, 10, (1, 8, 1, 1))
    out = feed(cache, history, num_tokens - 1, num_tokens, mx.array(q), 0.1)
    want = expected(history, mx.array(q), fmt, num_tokens - 1, 0.1, means)
    assert relative_error(out, want) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("turns", [False, True])
def test_keys_beyond_the_window_are_not_seen(turns: bool, rng: np.random.Generator) -> None:
    """`reach` cuts codes, sink and window; walks begin at any tile then, with that tile's means."""
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=8)
    history = History.random(rng, 1, 330, 64, dtype=mx.float16)
    means = history.means(rng, random_rotary(rng, 64)) if turns else None
    cache = new_cache(fmt, "gpu", means)
    feed(cache, history, 0, 329, random_queries(rng, 3, 329, 64, mx.float16), 0.125)
    q = random_queries(rng, 3, 1, 64, mx.float16)
    assert cache.sequence is not None
    pool = cache.sequence.pool
    storage: Any = pool.stores[0]
    plan: Any = cache._step(pool, pool.shapes[0], 1).plan
    layer, launch = storage.append(plan, *history.slice(329, 330)), storage.launch_for(q)
    layer, figures = storage.layer_inputs(layer, plan, launch), plan.figures
    for reach in (1, 20, 150, 325):
        out = launch(layer, q, figures, plan.page_table, scale=0.125, reach=reach)
        want = expected(history, q, fmt, 329, 0.125, means, window=reach)
        assert relative_error(out, want) < TOLERANCE[mx.float16]


def test_a_ragged_batch_is_the_references(rng: np.random.Generator) -> None:
    """Lengths from a few tokens to several blocks in one launch."""
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=8)
    lengths = [int(n) for n in rng.permutation([3, 30, 75, 420])]
    histories = [History.random(rng, 2, n + 1, 64, dtype=mx.float16) for n in lengths]
    source = new_cache(fmt, "gpu").source
    rows = []
    for history, n in zip(histories, lengths, strict=True):
        rows.append(TurboQuantKVCache(source))
        feed(rows[-1], history, 0, n, random_queries(rng, 4, n, 64, mx.float16), 0.125)
    batch = TurboQuantKVCache.merge(rows)
    q = mx.concatenate([random_queries(rng, 4, 1, 64, mx.float16) for _ in rows])
    news = [h.slice(n, n + 1) for h, n in zip(histories, lengths, strict=True)]
    batch.update_and_fetch(*(mx.concatenate(list(side)) for side in zip(*news, strict=True)))
    out = batch.attend(q, scale=0.125, mask=None, sinks=None)
    for b, (history, n) in enumerate(zip(histories, lengths, strict=True)):
        want = expected(history, q[b : b + 1], fmt, n, 0.125, None)
        assert relative_error(out[b : b + 1], want) < TOLERANCE[mx.float16]


BALANCED = [  # query heads, dims, codecs, page, dtype; on tensor cores but for 8 bits
    (4, (128, 64), (4, 3), 64, mx.float16),
    (16, (64, 64), ("4t", "3t"), 32, mx.bfloat16),
    (2, (96, 80), (4, 4), 32, mx.bfloat16),
    (6, (64, 128), (3, 4), 48, mx.float32),
    (2, (64, 64), (8, 3), 16, mx.float16),
]


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("case", BALANCED)
def test_keys_are_balanced_where_they_are_appended(
    case: Any, turns: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_q, dims, bits, page, dtype = case
    fmt = KVFormat(bits[0], bits[1], page_tokens=page, sink_tokens=4)
    check_balanced_decode(rng, monkeypatch, fmt, num_q, dims, dtype, turns, 2 * TOLERANCE[dtype])


def test_keys_are_balanced_in_two_launches(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = DecodeKernels("cuda", cuda_kernel, Tuning(4, 16, 2, 128, blocks=20, fused=False))
    backend = GpuBackend("cuda", kernels, BACKEND.kernels.pages, NO_FLASH)
    monkeypatch.setattr(caches, "choose_backend", lambda name: backend)
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=4)
    check_balanced_decode(rng, monkeypatch, fmt, 4, (64, 64), mx.float16, False, 2 * TOLERANCE[mx.float16])


CHUNKED = [(4, 3), (2, 8), ("3t", "2t"), ("4t", "3t")]  # codecs


@pytest.mark.parametrize("dims", [(64, 128), (80, 96), (112, 192), (512, 256)])
@pytest.mark.parametrize(
    ("bits", "turns"), [*((bits, False) for bits in CHUNKED), ((4, 3), True), (("3t", "2t"), True)]
)
def test_prefill_in_chunks_is_the_references(bits: Any, turns: bool, dims: Any, rng: np.random.Generator) -> None:
    """Encoding, decoding and the mask: chunks begin in the sink, within a page and at one."""
    fmt = KVFormat(bits[0], bits[1], page_tokens=16, sink_tokens=12)
    history = History.random(rng, 2, 90, dims[0], dims[1], mx.float16)
    means = history.means(rng, random_rotary(rng, dims[0]) if turns else None)
    history.steady(rng, fmt, means)
    cache = new_cache(fmt, "gpu", means)
    q = random_queries(rng, 4, 90, dims[0], mx.float16)
    want = expected(history, q, fmt, 0, 0.125, means)  # whose rows do not depend on cuts
    for start, stop in itertools.pairwise([0, 9, 40, 60, 90]):
        out = feed(cache, history, start, stop, q[:, :, start:stop], 0.125)
        assert relative_error(out, want[:, :, start:stop]) < TOLERANCE[mx.float16]


CODED = [  # dim, codec, scale
    *((64, 4, "unbiased"), (128, 3, "norm"), (256, 2, "least_squares"), (64, 8, "plain"), (512, 3, "unbiased")),
    *((80, 3, "unbiased"), (96, 4, "least_squares"), (112, 2, "norm"), (192, 8, "plain"), (112, 3, "unbiased")),
    *((64, "3t", "unbiased"), (128, "2t", "norm"), (256, "3t", "least_squares"), (512, "2t", "plain")),
    *((80, "3t", "plain"), (96, "2t", "unbiased"), (112, "3t", "unbiased"), (192, "2t", "least_squares")),
    *((64, "4t", "least_squares"), (128, "4t", "unbiased"), (256, "4t", "norm"), (512, "4t", "plain")),
    *((80, "4t", "unbiased"), (96, "4t", "plain"), (112, "4t", "norm"), (192, "4t", "unbiased")),
]


@pytest.mark.parametrize("case", CODED)
def test_codes_are_the_references(case: Any, rng: np.random.Generator) -> None:
    """Float32 moves a value over a threshold now and then; scales of other vectors agree to a float16's last bits.

    Means turn in every other run, as when decoding.
    """
    turns = bool(rng.integers(2))
    dim, name, scale = case
    x = rng.standard_normal((2, 48, dim)).astype(np.float32)
    fmt = KVFormat(name, name, scale=scale, page_tokens=16)
    mean = rng.standard_normal((2, dim)).astype(np.float32)
    means = Means(mean, mean, random_rotary(rng, dim) if turns else None)
    first_page = int(rng.integers(0, 50))
    start = fmt.page_start(first_page)
    centre = np.broadcast_to(key_means(means, fmt, start + 48), (2, start + 48, dim))[:, start:]
    x += centre
    if not turns:
        x[1, 3] = mean[1]  # centred it is nothing at all
    storage = BACKEND.new_store(LayerShape(2, dim, dim, mx.float32), fmt, means)
    storage.grow(5)
    written = PageWrites.following(np.array([4, 0, 2]), first_page, fmt.page_tokens)
    storage.encode(written, mx.array(x), mx.array(x))
    pages = storage.read(np.array([4, 0, 2]))
    want = reference.encode(x, fmt.keys, rotation_matrix(dim, fmt.rotation_seed, "k"), centre)
    got = pages.k_codes.transpose(1, 0, 2, 3).reshape(2, 48, -1)
    same = fmt.keys.decode(got, dim) == fmt.keys.decode(want.codes, dim)
    assert same.mean() > 0.999
    got_scales = pages.k_scales.transpose(1, 0, 2).reshape(2, 48)
    unmoved = same.all(axis=-1)
    np.testing.assert_allclose(got_scales[unmoved], want.scales[unmoved], rtol=2e-3)


@pytest.mark.parametrize("turns", [False, True])
def test_a_layers_window_bounds_every_path(turns: bool, rng: np.random.Generator) -> None:
    """Prefill on MLX operations, decode by `reach`; pages and the sink that left the window are nobody's by then."""
    fmt = KVFormat(4, 4, page_tokens=32, sink_tokens=8)
    history = History.random(rng, 1, 330, 64, dtype=mx.float16)
    means = history.means(rng, random_rotary(rng, 64) if turns else None)
    cache = TurboQuantKVCache(LayerSource(fmt, "gpu", means, window=50))
    for start, stop in itertools.pairwise([0, 40, 190, 300, 303, 304, 305, 330]):
        q = random_queries(rng, 2, stop - start, 64, mx.float16)
        out = feed(cache, history, start, stop, q, 0.1, mask=cache.make_mask(stop - start, window_size=50))
        seen = History(history.k[:, :stop], history.v[:, :stop], mx.float16)
        want = expected(seen, q, fmt, start, 0.1, means, window=50)
        assert relative_error(out, want) < TOLERANCE[mx.float16]
    assert cache.sequence is not None
    assert cache.sequence.forgotten > fmt.sink_tokens
