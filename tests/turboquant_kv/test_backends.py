"""Each backend against the reference: codes, decoded values, and attention over shapes, dtypes and odd lengths."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv.histories import (
    History,
    as_float64,
    encode_pages,
    expected,
    feed,
    new_cache,
    random_cuts,
    random_queries,
    random_rotary,
    relative_error,
)

from turboquant_kv.backends import choice as backends
from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.backends.gpu import backend as gpu
from turboquant_kv.codec import reference
from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS, KVFormat, UnsupportedFormatError
from turboquant_kv.codec.limits import MIN_TRELLIS_DIM
from turboquant_kv.codec.rotation import rotation_matrix

BACKENDS = ("cpu-numpy", "cpu-native", "mlx-ops")
# Histories are steady (histories.py), so all that differs is rounding: of float32 sums, measured below 1e-6, and of the
# output, 2^-11 and 2^-8 of each value at most.
FLOAT32_TOLERANCE = 1e-5
TOLERANCE = {mx.float32: FLOAT32_TOLERANCE, mx.float16: 1e-3, mx.bfloat16: 5e-3}
# Few rows: integer queries and weights. One output over few keys scatters; tests/turboquant_kv/native holds the error
# of many against the codec's own.
INTEGER_TOLERANCE = 3e-2
INTEGER_TOLERANCE_8_BITS = 5e-4


def tolerance(backend: str, dtype: Any = mx.float32, integers: float = INTEGER_TOLERANCE) -> float:
    return max(TOLERANCE[dtype], integers if backend == "cpu-native" else 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("head_dim", "bits"),
    [
        *itertools.product(SUPPORTED_HEAD_DIMS, [2, 3, 4, 8]),
        *itertools.product([d for d in SUPPORTED_HEAD_DIMS if d >= MIN_TRELLIS_DIM], ["2t", "3t", "4t"]),
    ],
)
def test_codes_are_the_references(backend: str, head_dim: int, bits: int | str, rng: np.random.Generator) -> None:
    fmt = KVFormat(k_bits=bits, v_bits=bits, page_tokens=16)
    history = History.random(rng, 2, 48, head_dim)
    means = history.means(rng)
    history.steady(rng, fmt, means)
    storage = choose_backend(backend).new_store(LayerShape(2, head_dim, head_dim, mx.float32), fmt, means)
    storage.grow(3)
    pages = np.array([2, 0, 1])
    rows = [choose_backend(backend).from_mlx(x)[0] for x in history.slice(0, 48)]
    encode_pages(storage, pages, 0, *rows)

    stored = storage.read(pages)
    for side, codec, x, codes, scales in (
        ("k", fmt.keys, history.k, stored.k_codes, stored.k_scales),
        ("v", fmt.values, history.v, stored.v_codes, stored.v_scales),
    ):
        rotation = rotation_matrix(head_dim, fmt.rotation_seed, "k" if side == "k" else "v")
        mean = (means.k if side == "k" else means.v)[:, None]
        want = reference.encode(x, codec, rotation, mean)
        got = codes.swapaxes(0, 1).reshape(2, 48, -1)
        np.testing.assert_array_equal(codec.decode(got, head_dim), codec.decode(want.codes, head_dim))
        np.testing.assert_array_equal(got, want.codes)
        np.testing.assert_array_equal(scales.swapaxes(0, 1).reshape(2, 48), want.scales)
        decoded = as_float64(mx.array(storage.decode(pages, 0)[0 if side == "k" else 1]))
        # float32, and the scales that multiply are the same: a few roundings of values up to about 6
        np.testing.assert_allclose(decoded, reference.decode(want, codec, head_dim, rotation, mean), atol=2e-5)


@pytest.mark.parametrize("scale", ["unbiased", "norm", "least_squares", "plain"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_scale_kind_is_the_references(backend: str, scale: str, rng: np.random.Generator) -> None:
    fmt = KVFormat(3, 2, scale=scale, page_tokens=16, centred=False)  # type: ignore[arg-type]
    history = History.random(rng, 1, 64, 128).steady(rng, fmt)
    storage = choose_backend(backend).new_store(LayerShape(1, 128, 128, mx.float32), fmt, None)
    storage.grow(4)
    encode_pages(storage, np.arange(4), 0, *(choose_backend(backend).from_mlx(x)[0] for x in history.slice(0, 64)))
    want = reference.encode(history.k, fmt.keys, rotation_matrix(128, fmt.rotation_seed, "k"))
    np.testing.assert_array_equal(storage.read(np.arange(4)).k_scales.reshape(1, 64), want.scales)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_huge_and_tiny_vectors_stay_finite(backend: str) -> None:
    fmt = KVFormat(4, 4, page_tokens=16, centred=False)
    x = np.zeros((1, 16, 64), np.float32)
    x[0, 1], x[0, 2], x[0, 3, 5] = 1e6, 1e-9, 3.0
    storage = choose_backend(backend).new_store(LayerShape(1, 64, 64, mx.float32), fmt, None)
    storage.grow(1)
    row = choose_backend(backend).from_mlx(mx.array(x[None]))[0]
    encode_pages(storage, [0], 0, row, row)
    decoded = as_float64(mx.array(storage.decode(np.array([0]), 0)[0]))
    assert np.isfinite(decoded).all()
    assert not decoded[0, 0].any()
    assert decoded[0, 3, 5] == pytest.approx(3.0, rel=1e-2)


CASES = [  # query heads, KV heads, D, Dv, sink, page, bits
    (4, 2, 128, 128, 32, 64, (4, 4)),
    (4, 4, 64, 64, 0, 16, (4, 3)),
    (7, 1, 80, 80, 5, 16, (3, 3)),
    (8, 2, 96, 128, 17, 32, (8, 4)),
    (2, 1, 192, 128, 32, 16, (2, 2)),
    (4, 2, 256, 256, 1, 64, (4, 2)),
    (6, 2, 64, 64, 32, 64, (4, "3t")),
    (4, 2, 128, 128, 32, 32, ("3t", "2t")),
    (7, 1, 80, 112, 5, 16, ("2t", "2t")),
    (8, 2, 64, 64, 32, 64, ("4t", "3t")),
    (3, 1, 256, 64, 0, 32, ("2t", 8)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_references(
    backend: str, dtype: Any, turns: bool, case: Any, rng: np.random.Generator
) -> None:
    num_q, num_kv, k_dim, v_dim, sink, page, (k_bits, v_bits) = case
    fmt = KVFormat(k_bits, v_bits, page_tokens=page, sink_tokens=sink)
    num_tokens = int(rng.integers(3 * page, 6 * page + sink))
    history = History.random(rng, num_kv, num_tokens, k_dim, v_dim, dtype)
    means = history.means(rng, random_rotary(rng, k_dim) if turns else None)
    history.steady(rng, fmt, means)
    cache = new_cache(fmt, backend, means)
    scale = k_dim**-0.5
    q = random_queries(rng, num_q, num_tokens, k_dim, dtype)
    want = expected(history, q, fmt, 0, scale, means)  # whose rows do not depend on cuts
    for start, stop in itertools.pairwise(random_cuts(rng, num_tokens, 5)):
        out = feed(cache, history, start, stop, q[:, :, start:stop], scale)
        assert out.dtype == dtype
        assert out.shape == (1, num_q, stop - start, v_dim)
        assert relative_error(out, want[:, :, start:stop]) < tolerance(backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_across_page_borders(backend: str, rng: np.random.Generator) -> None:
    fmt = KVFormat(8, 8, page_tokens=16, sink_tokens=4)
    history = History.random(rng, 2, 60, 64).steady(rng, fmt)
    cache = new_cache(fmt, backend)
    q = random_queries(rng, 4, 60, 64, mx.float32)
    want = expected(history, q, fmt, 0, 0.125, None)
    for p in range(60):
        error = relative_error(feed(cache, history, p, p + 1, q[:, :, p : p + 1], 0.125), want[:, :, p : p + 1])
        assert error < tolerance(backend, integers=INTEGER_TOLERANCE_8_BITS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["sinks", "window", "bool", "additive", "per head"])
def test_sinks_windows_and_masks(backend: str, kind: str, rng: np.random.Generator) -> None:
    fmt = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
    num_tokens, start = 90, 70
    history = History.random(rng, 2, num_tokens, 64)
    means = history.means(rng)
    history.steady(rng, fmt, means)
    cache = new_cache(fmt, backend, means)
    feed(cache, history, 0, start, random_queries(rng, 4, start, 64, mx.float32), 0.125)
    q = random_queries(rng, 4, num_tokens - start, 64, mx.float32)
    want_options: dict[str, Any] = {}
    given: dict[str, Any] = {}
    causal = np.arange(num_tokens)[None] <= np.arange(start, num_tokens)[:, None]
    if kind == "sinks":
        sinks = rng.standard_normal(4).astype(np.float32) + 2
        want_options, given = {"sinks": sinks}, {"sinks": mx.array(sinks)}
    elif kind == "window":
        want_options, given = {"window": 20}, {"mask": cache.make_mask(num_tokens - start, window_size=20)}
    elif kind == "bool":
        allowed = causal & (rng.random(causal.shape) < 0.5)
        allowed[:, 0] = True
        want_options, given = {"mask": allowed}, {"mask": mx.array(allowed)}
    else:
        shape = (4, *causal.shape) if kind == "per head" else causal.shape
        bias = rng.standard_normal(shape).astype(np.float32)
        given = {"mask": mx.array(np.where(causal, bias, -np.inf).astype(np.float32)[None])}
        want_options = {"mask": bias}
    out = feed(cache, history, start, num_tokens, q, 0.125, **given)
    want = expected(history, q, fmt, start, 0.125, means, **want_options)
    assert relative_error(out, want) < FLOAT32_TOLERANCE
    plain = expected(history, q, fmt, start, 0.125, means)
    assert relative_error(mx.array(plain.astype(np.float32)), want) > 0.02, "the option must have mattered"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_capped_scores_are_the_references(
    backend: str, dtype: Any, turns: bool, case: Any, rng: np.random.Generator
) -> None:
    """Chunks and single tokens; caps from one that few scores reach to one that nearly all do."""
    num_q, num_kv, k_dim, v_dim, sink, page, (k_bits, v_bits) = case
    fmt = KVFormat(k_bits, v_bits, page_tokens=page, sink_tokens=sink)
    num_tokens = int(rng.integers(3 * page, 6 * page + sink))
    history = History.random(rng, num_kv, num_tokens, k_dim, v_dim, dtype)
    means = history.means(rng, random_rotary(rng, k_dim) if turns else None)
    history.steady(rng, fmt, means)
    cache = new_cache(fmt, backend, means)
    scale, cap = 2 * k_dim**-0.5, float(rng.uniform(0.5, 4.0))
    q = random_queries(rng, num_q, num_tokens, k_dim, dtype)
    want = expected(history, q, fmt, 0, scale, means, cap=cap)  # whose rows do not depend on cuts
    cuts = [*random_cuts(rng, num_tokens - 2, 4), num_tokens - 1, num_tokens]
    for start, stop in itertools.pairwise(cuts):
        out = feed(cache, history, start, stop, q[:, :, start:stop], scale, cap=cap)
        assert relative_error(out, want[:, :, start:stop]) < tolerance(backend, dtype)
    plain = expected(history, q[:, :, -1:], fmt, num_tokens - 1, scale, means)
    assert relative_error(mx.array(plain.astype(np.float32)), want[:, :, -1:]) > 0.02, "the cap must have mattered"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["sinks", "window", "bool", "additive"])
def test_caps_come_before_masks_and_leave_sinks(backend: str, kind: str, rng: np.random.Generator) -> None:
    fmt = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
    num_tokens, start, cap = 90, 70, 2.0
    history = History.random(rng, 2, num_tokens, 64)
    means = history.means(rng)
    history.steady(rng, fmt, means)
    cache = new_cache(fmt, backend, means)
    feed(cache, history, 0, start, random_queries(rng, 4, start, 64, mx.float32), 0.5)
    q = random_queries(rng, 4, num_tokens - start, 64, mx.float32)
    causal = np.arange(num_tokens)[None] <= np.arange(start, num_tokens)[:, None]
    options: dict[str, Any]
    given: dict[str, Any]
    if kind == "sinks":
        sinks = rng.standard_normal(4).astype(np.float32) + 6  # above the cap
        options, given = {"sinks": sinks}, {"sinks": mx.array(sinks)}
    elif kind == "window":
        options, given = {"window": 20}, {"mask": cache.make_mask(num_tokens - start, window_size=20)}
    elif kind == "bool":
        allowed = causal & (rng.random(causal.shape) < 0.5)
        allowed[:, 0] = True
        options, given = {"mask": allowed}, {"mask": mx.array(allowed)}
    else:
        bias = 5 * rng.standard_normal(causal.shape).astype(np.float32)
        options = {"mask": bias}
        given = {"mask": mx.array(np.where(causal, bias, -np.inf).astype(np.float32)[None])}
    out = feed(cache, history, start, num_tokens, q, 0.5, cap=cap, **given)
    want = expected(history, q, fmt, start, 0.5, means, cap=cap, **options)
    assert relative_error(out, want) < FLOAT32_TOLERANCE


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(UnsupportedFormatError, match="cpu-numpy"):
        choose_backend("tpu")


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "mlx-ops"), ((8, 6), "gpu-cuda"), ((9, 0), "gpu-cuda")])
def test_auto_takes_cuda_kernels_where_the_device_can_run_them(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (backends, gpu):
        monkeypatch.setattr(module, "compute_capability", lambda: capability)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    for name in ("device_kernels", "device_page_kernels", "device_flash_kernels"):
        monkeypatch.setattr(gpu, name, lambda dialect: object())
    assert backends.choose_backend("auto").name == chosen
    if chosen == "mlx-ops":
        with pytest.raises(UnsupportedFormatError, match=r"compute capability 8\.0, this GPU has 7\.5"):
            backends.choose_backend("gpu")
