"""Each instruction-set level that this CPU has, against the reference: formats, head dims, groups, ends, precision."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv.histories import (
    History,
    as_float64,
    call_over,
    encode_pages,
    expected,
    feed,
    new_cache,
    random_queries,
    random_rotary,
    relative_error,
)

from turboquant_kv.backends.base import CanonicalPages, LayerShape, Means, RowSpan, SequenceView
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.backends.native import backend as native
from turboquant_kv.codec import reference
from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS, KVFormat, code_bytes
from turboquant_kv.codec.limits import MIN_TRELLIS_DIM
from turboquant_kv.codec.rotation import rotation_matrix

KERNELS, WHY_MISSING = native.load_kernels()
LEVELS: list[str] = KERNELS.isa_levels() if KERNELS is not None else []
# Eight-bit queries and weights: about 0.2%, up to 1% where one output has few keys. A mistake costs more, and what the
# arithmetic may cost in the mean of many outputs is held by the test of integer errors.
INTEGER_TOLERANCE = 3e-2
# Sixteen-bit ones, of the 8-bit formats: measured up to 1.2e-4.
FINE_INTEGER_TOLERANCE = 5e-4
FLOAT_TOLERANCE = 1e-5  # float tiles of steady histories: summing in float32, measured below 1e-6
BITS: list[tuple[int | str, int | str]] = [(2, 3), (3, 2), (4, 4), (8, 8)]
TRELLIS_DIMS = [dim for dim in SUPPORTED_HEAD_DIMS if dim >= MIN_TRELLIS_DIM]
TRELLIS_BITS: list[tuple[int | str, int | str]] = [("2t", "3t"), ("3t", "4t"), ("4t", "2t")]


def test_the_kernels_are_built() -> None:
    assert KERNELS is not None, WHY_MISSING
    assert LEVELS[-1] == "portable", "built with TURBOQUANT_LEVELS=native; `make test` builds every level"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells what its CPUs can do in this file")
def test_every_level_that_this_cpu_has_is_built_and_tested() -> None:
    """A build for one machine alone (TURBOQUANT_LEVELS=native) would have these tests see less."""
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    needs = {
        "avx512-vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512vbmi"},
        "avx2": {"avx2", "fma", "f16c"},
        "neon-dotprod": {"asimddp"},
        "portable": set(),
    }
    assert [level for level, needed in needs.items() if needed <= flags] == LEVELS


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_build_for_this_cpu_alone_would_have_its_fastest_level(tmp_path: Path) -> None:
    """What CMake asks for TURBOQUANT_LEVELS=native answers with the file of the level that is chosen here."""
    program = tmp_path / "fastest_level"
    source = Path(native.__file__).parents[2] / "native" / "src" / "fastest_level.cpp"
    subprocess.run(["c++", "-std=c++17", str(source), "-o", str(program)], check=True)
    (name,) = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
    assert LEVELS[0].startswith(name) and source.with_name(f"kernels_{name}.cpp").is_file()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(native.ISA_SWITCH, request.param)
    assert choose_backend("cpu-native").name == f"cpu-native/{request.param}"
    return str(request.param)


def attended(history: History, fmt: KVFormat, q: mx.array, scale: float, means: Any = None, **options: Any) -> mx.array:
    """The last rows' attention, everything before them fed in one step."""
    cache = new_cache(fmt, "cpu-native", means)
    start = history.num_tokens - q.shape[2]
    first = mx.zeros((1, q.shape[1], start, q.shape[3]), q.dtype)
    feed(cache, history, 0, start, first, scale)
    return feed(cache, history, start, history.num_tokens, q, scale, **options)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_every_format_and_head_dim(
    level: str, dim: int, bits: tuple[int | str, int | str], rng: np.random.Generator
) -> None:
    fmt = KVFormat(*bits, page_tokens=16, sink_tokens=3)
    history = History.random(rng, 2, int(rng.integers(60, 120)), dim)
    means = history.means(rng)
    history.steady(rng, fmt, means)
    integers = FINE_INTEGER_TOLERANCE if bits == (8, 8) else INTEGER_TOLERANCE
    # 1 and 3 rows take integer arithmetic, 20 rows float tiles.
    for num_rows, tolerance in ((1, integers), (3, integers), (20, FLOAT_TOLERANCE)):
        q = random_queries(rng, 4, num_rows, dim, mx.float32)
        want = expected(history, q, fmt, history.num_tokens - num_rows, dim**-0.5, means)
        assert relative_error(attended(history, fmt, q, dim**-0.5, means), want) < tolerance


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 9, 16])
def test_every_group_of_query_heads(level: str, group: int, rng: np.random.Generator) -> None:
    fmt = KVFormat(4, 3, page_tokens=48, sink_tokens=5)  # three groups of tokens a page: an odd one is left over
    history = History.random(rng, 2, 200, 64, 80).steady(rng, fmt)
    for num_rows, tolerance in ((1, INTEGER_TOLERANCE), (2, INTEGER_TOLERANCE), (30, FLOAT_TOLERANCE)):
        q = random_queries(rng, 2 * group, num_rows, 64, mx.float32)
        want = expected(history, q, fmt, 200 - num_rows, 0.125, None)
        assert relative_error(attended(history, fmt, q, 0.125), want) < tolerance


@pytest.mark.parametrize("bits", [*BITS, *TRELLIS_BITS])
@pytest.mark.parametrize("cap", [0.3, 5.0, 50.0])
def test_capped_scores(level: str, cap: float, bits: tuple[int | str, int | str], rng: np.random.Generator) -> None:
    """Scores of a deviation of about 12, from far beyond the cap to where it bends them little."""
    fmt = KVFormat(*bits, page_tokens=16, sink_tokens=3)
    history = History.random(rng, 2, int(rng.integers(100, 160)), 64, 80)
    means = history.means(rng, random_rotary(rng, 64) if rng.random() < 0.5 else None)
    history.steady(rng, fmt, means)
    # integer queries: an error of scores weighs more where they are large
    integers = FINE_INTEGER_TOLERANCE * 10 if bits == (8, 8) else 2 * INTEGER_TOLERANCE
    for num_rows, tolerance in ((1, integers), (3, integers), (20, 3 * FLOAT_TOLERANCE)):
        q = random_queries(rng, 6, num_rows, 64, mx.float32)
        out = attended(history, fmt, q, 1.0, means, cap=cap)
        want = expected(history, q, fmt, history.num_tokens - num_rows, 1.0, means, cap=cap)
        assert relative_error(out, want) < tolerance


def test_caps_that_are_none_are_refused(level: str, rng: np.random.Generator) -> None:
    fmt = KVFormat(4, 4, page_tokens=16, sink_tokens=3)
    history = History.random(rng, 2, 40, 64)
    for cap in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cap"):
            attended(history, fmt, random_queries(rng, 4, 1, 64, mx.float32), 1.0, cap=cap)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_model_dtypes(level: str, dtype: Any, rng: np.random.Generator) -> None:
    fmt = KVFormat(4, 4, page_tokens=32, sink_tokens=7)
    history = History.random(rng, 2, 150, 96, dtype=dtype).steady(rng, fmt)
    for num_rows in (1, 24):
        q = random_queries(rng, 4, num_rows, 96, dtype)
        out = attended(history, fmt, q, 0.1)
        assert out.dtype == dtype
        assert relative_error(out, expected(history, q, fmt, 150 - num_rows, 0.1, None)) < INTEGER_TOLERANCE


@pytest.mark.parametrize(
    ("num_rows", "tolerance"), [(1, FINE_INTEGER_TOLERANCE), (4, FINE_INTEGER_TOLERANCE), (30, FLOAT_TOLERANCE)]
)
def test_attention_sinks_and_sliding_windows(
    level: str, num_rows: int, tolerance: float, rng: np.random.Generator
) -> None:
    fmt = KVFormat(8, 8, page_tokens=16, sink_tokens=8)  # which keys are seen shows best where little is lost
    history = History.random(rng, 2, 170, 64).steady(rng, fmt)
    start = 170 - num_rows
    q = random_queries(rng, 4, num_rows, 64, mx.float32)
    sinks = rng.standard_normal(4).astype(np.float32) + 2
    positions, keys = np.arange(start, 170)[:, None], np.arange(170)
    for window in (1, 5, 37, 160):
        mask = mx.array((keys <= positions) & (keys > positions - window))
        out = attended(history, fmt, q, 0.125, mask=mask, sinks=mx.array(sinks))
        want = expected(history, q, fmt, start, 0.125, None, sinks=sinks, window=window)
        assert relative_error(out, want) < tolerance


@pytest.mark.parametrize("sharpness", [1.0, 4.0])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 3), (4, 4), (8, 8), ("3t", "2t"), ("4t", "3t")])
def test_integer_error_stays_ten_times_below_the_codecs(
    level: str, bits: tuple[int | str, int | str], sharpness: float, rng: np.random.Generator
) -> None:
    # At sharpness 4 a few keys carry a head's softmax: 8 of them vary from 10 to 20 times, 128 from 12 to 16.
    fmt = KVFormat(*bits, page_tokens=64, sink_tokens=0)
    history = History.random(rng, 16, 400, 128)
    means = history.means(rng)
    q = random_queries(rng, 128, 1, 128, mx.float32)
    scale = sharpness * 128**-0.5
    through_codes = expected(history, q, fmt, 399, scale, means)  # float64 attention over the decoded values
    exact = expected(history, q, KVFormat(page_tokens=416, sink_tokens=0), 399, scale, None)
    codec_error = float(np.linalg.norm(through_codes - exact))
    own_error = float(np.linalg.norm(as_float64(attended(history, fmt, q, scale, means)) - through_codes))
    assert own_error < codec_error / 10, f"{codec_error / own_error:.1f} times below"


@pytest.mark.parametrize(
    ("dim", "bits"), [*itertools.product(SUPPORTED_HEAD_DIMS, BITS), *itertools.product(TRELLIS_DIMS, TRELLIS_BITS)]
)
def test_the_layout_is_a_lossless_tiling(
    level: str, dim: int, bits: tuple[int | str, int | str], rng: np.random.Generator
) -> None:
    fmt = KVFormat(*bits, page_tokens=32)
    lead = (3, 2, 32)
    pages = CanonicalPages(
        rng.integers(0, 256, (*lead, fmt.keys.code_bytes(dim)), np.uint8),
        rng.random(lead).astype(np.float16),
        rng.integers(0, 256, (*lead, fmt.values.code_bytes(dim)), np.uint8),
        rng.random(lead).astype(np.float16),
    )
    storage = choose_backend("cpu-native").new_store(LayerShape(2, dim, dim, mx.float16), fmt, None)
    storage.grow(5)
    storage.write(np.array([4, 0, 2]), pages)
    again = storage.read(np.array([4, 0, 2]))
    for name in ("k_codes", "k_scales", "v_codes", "v_scales"):
        np.testing.assert_array_equal(getattr(again, name), getattr(pages, name))
    assert storage.allocated_bytes == 5 * fmt.page_bytes(2, dim, dim)


def test_pages_of_every_run_and_slab_have_room_of_their_own(rng: np.random.Generator) -> None:
    fmt, num_pages = KVFormat(3, 2, page_tokens=16), 2 * 1024 + 21  # past two slabs, the last run not full
    lead = (num_pages, 3, 16)
    pages = CanonicalPages(
        rng.integers(0, 256, (*lead, code_bytes(64, 3)), np.uint8),
        rng.random(lead).astype(np.float16),
        rng.integers(0, 256, (*lead, code_bytes(80, 2)), np.uint8),
        rng.random(lead).astype(np.float16),
    )
    storage = choose_backend("cpu-native").new_store(LayerShape(3, 64, 80, mx.float16), fmt, None)
    storage.grow(num_pages)
    order = rng.permutation(num_pages)
    storage.write(order, pages)
    again = storage.read(order)
    for name in ("k_codes", "k_scales", "v_codes", "v_scales"):
        np.testing.assert_array_equal(getattr(again, name), getattr(pages, name))


@pytest.mark.parametrize("num_rows", [1, 4])
def test_every_entry_of_the_8_bit_tables_is_looked_up(level: str, num_rows: int, rng: np.random.Generator) -> None:
    """Uniform codes, as no text gives them: all levels multiply the same 16-bit integers."""
    fmt, lead = KVFormat(8, 8, page_tokens=32, sink_tokens=0), (3, 2, 32)
    codes, scales = (rng.integers(0, 256, (2, *lead, 64), np.uint8), (1 + rng.random((2, *lead))).astype(np.float16))
    q = random_queries(rng, 4, num_rows, 64, mx.float32)
    x = rng.standard_normal((2, num_rows, 64)).astype(np.float32)
    view = SequenceView(96, num_rows, np.arange(3), None, RowSpan(96, 0, num_rows))
    outputs = []
    for name in (level, LEVELS[-1]):
        backend = native.NativeBackend()
        storage = native.NativeStore(backend._kernels, LayerShape(2, 64, 64, mx.float32), fmt, None, name)
        storage.grow(3)
        storage.write(np.arange(3), CanonicalPages(codes[0], scales[0], codes[1], scales[1]))
        outputs.append(storage.attend(call_over(backend, q, [view], (x, x, x, x), 0.05)))
    # A query's coordinate may round to the next of 65,000 steps, measured up to 2e-5; one wrong low byte costs 3e-4.
    assert relative_error(outputs[0], as_float64(outputs[1])) < 5e-5


@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("dim", [64, 80, 112, 128])
def test_trellis_codes_are_the_references(
    level: str, dim: int, bits: tuple[int | str, int | str], rng: np.random.Generator
) -> None:
    fmt = KVFormat(*bits, page_tokens=16, centred=False)
    history = History.random(rng, 2, 32, dim).steady(rng, fmt)
    storage = choose_backend("cpu-native").new_store(LayerShape(2, dim, dim, mx.float32), fmt, None)
    storage.grow(2)
    encode_pages(storage, np.arange(2), 0, history.k.astype(np.float32), history.v.astype(np.float32))
    pages = storage.read(np.arange(2))
    for x, codec, which, codes, scales in (
        (history.k, fmt.keys, "k", pages.k_codes, pages.k_scales),
        (history.v, fmt.values, "v", pages.v_codes, pages.v_scales),
    ):
        want = reference.encode(x, codec, rotation_matrix(dim, fmt.rotation_seed, which))
        np.testing.assert_array_equal(codes.swapaxes(0, 1).reshape(2, 32, -1), want.codes)
        np.testing.assert_array_equal(scales.swapaxes(0, 1).reshape(2, 32), want.scales)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("dim", TRELLIS_DIMS)
def test_random_trellis_codes_decode_as_the_reference_says(
    level: str, dim: int, bits: tuple[int | str, int | str], rng: np.random.Generator
) -> None:
    """Every branch before every place, as no search gives them: in decoded rows and in both kinds of attention."""
    fmt = KVFormat(*bits, page_tokens=32, sink_tokens=0, centred=False)
    lead = (3, 2, 32)
    k_codes, v_codes = (
        rng.integers(0, 256, (*lead, codec.code_bytes(dim)), np.uint8) for codec in (fmt.keys, fmt.values)
    )
    scales = (1 + rng.random((2, *lead))).astype(np.float16)
    storage = choose_backend("cpu-native").new_store(LayerShape(2, dim, dim, mx.float32), fmt, None)
    storage.grow(3)
    storage.write(np.arange(3), CanonicalPages(k_codes, scales[0], v_codes, scales[1]))
    k, v = (
        np.moveaxis(
            (codec.decode(codes, dim) * scale[..., None]) @ rotation_matrix(dim, fmt.rotation_seed, which), 1, 0
        )
        for codec, codes, scale, which in ((fmt.keys, k_codes, scales[0], "k"), (fmt.values, v_codes, scales[1], "v"))
    )
    k, v = k.reshape(2, 96, dim), v.reshape(2, 96, dim)
    for rows, want in zip(storage.decode(np.arange(3), 0), (k, v), strict=True):
        np.testing.assert_allclose(rows, want, atol=2e-5)
    for num_rows, tolerance in ((1, INTEGER_TOLERANCE), (20, FLOAT_TOLERANCE)):
        q = random_queries(rng, 4, num_rows, dim, mx.float32)
        x = rng.standard_normal((2, num_rows, dim)).astype(np.float32)
        view = SequenceView(96, num_rows, np.arange(3), None, RowSpan(96, 0, num_rows))
        call = call_over(choose_backend("cpu-native"), q, [view], (x, x, x, x), 0.03)
        logits = (
            0.03 * as_float64(q)[0].reshape(2, 2, num_rows, dim) @ np.concatenate([k, x], 1)[:, None].swapaxes(2, 3)
        )
        logits = np.where(np.arange(96 + num_rows) <= 96 + np.arange(num_rows)[:, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ np.concatenate([v, x], 1)[:, None]
        assert relative_error(storage.attend(call), out.reshape(1, 4, num_rows, dim)) < tolerance


# Spans of means are 16 blocks of 16 tokens: a span holds several pages, or is what is left of them, or a page holds
# several spans.
@pytest.mark.parametrize(("group", "page"), [(1, 16), (3, 48), (4, 64), (8, 256), (9, 320), (2, 512), (5, 16)])
def test_means_that_turn(level: str, group: int, page: int, rng: np.random.Generator) -> None:
    fmt = KVFormat(8, 8, page_tokens=page, sink_tokens=int(rng.integers(40)))
    num_tokens = int(rng.integers(1100, 1300))
    history = History.random(rng, 2, num_tokens, 64)
    means = history.means(rng, random_rotary(rng, 64))
    history.steady(rng, fmt, means)
    for num_rows, tolerance in ((1, FINE_INTEGER_TOLERANCE), (3, FINE_INTEGER_TOLERANCE), (20, FLOAT_TOLERANCE)):
        q = random_queries(rng, 2 * group, num_rows, 64, mx.float32)
        want = expected(history, q, fmt, num_tokens - num_rows, 0.03, means)
        assert relative_error(attended(history, fmt, q, 0.03, means), want) < tolerance


@pytest.mark.parametrize("num_rows", [1, 20])
def test_means_that_turn_behind_sliding_windows(level: str, num_rows: int, rng: np.random.Generator) -> None:
    fmt = KVFormat(8, 8, page_tokens=16, sink_tokens=8)
    history = History.random(rng, 2, 900, 64)
    means = history.means(rng, random_rotary(rng, 64))
    history.steady(rng, fmt, means)
    start = 900 - num_rows
    q = random_queries(rng, 4, num_rows, 64, mx.float32)
    positions, keys = np.arange(start, 900)[:, None], np.arange(900)
    for window in (100, int(rng.integers(200, 800))):  # pages seen begin anywhere in a span
        mask = mx.array((keys <= positions) & (keys > positions - window))
        want = expected(history, q, fmt, start, 0.03, means, window=window)
        tolerance = FINE_INTEGER_TOLERANCE if num_rows == 1 else FLOAT_TOLERANCE
        assert relative_error(attended(history, fmt, q, 0.03, means, mask=mask), want) < tolerance


def test_means_that_turn_stay_exact_far_from_the_start(level: str, rng: np.random.Generator) -> None:
    """Angles of single precision would be off by a hundredth here. All pages but the last few are out of the window."""
    fmt, first_page, window = KVFormat(8, 8, page_tokens=32, sink_tokens=3), 6000, 300
    start = fmt.page_start(first_page)
    rotary = random_rotary(rng, 64)
    bias = 10 * rng.standard_normal((2, 64))
    x = rng.standard_normal((2, 2, 10 * 32, 64)).astype(np.float32)
    x[0] += rotary.turned(bias[:, None], start + np.arange(320)[None]).astype(np.float32)
    means = Means(bias.astype(np.float32), np.zeros((2, 64), np.float32), rotary)
    storage = choose_backend("cpu-native").new_store(LayerShape(2, 64, 64, mx.float32), fmt, means)
    storage.grow(10)
    encode_pages(storage, np.arange(10), first_page, x[0], x[1])
    k, v = storage.decode(np.arange(10), first_page)
    centre, rotation = means.k_rows(fmt, first_page + np.arange(10)), rotation_matrix(64, fmt.rotation_seed, "k")
    encoded = reference.encode(x[0], fmt.keys, rotation, centre)
    miss = np.abs(k - reference.decode(encoded, fmt.keys, 64, rotation, centre)).max(-1)
    assert np.mean(miss > 1e-3) < 0.05, "a code by a threshold may be its neighbour, in one vector of a hundred"

    end = start + 320
    pages = np.concatenate([np.zeros(first_page, np.int64), np.arange(10)])
    sink, own = np.zeros((2, 3, 64), np.float32), rng.standard_normal((2, 1, 64)).astype(np.float32)
    view = SequenceView(end, 1, pages, RowSpan(0, 0, 3), RowSpan(end, 0, 1))
    q = random_queries(rng, 2, 1, 64, mx.float32)
    mask = mx.array((np.arange(end + 1) > end - window)[None])
    call = call_over(choose_backend("cpu-native"), q, [view], (sink, sink, own, own), 0.03, mask)
    seen_k, seen_v = (np.concatenate([a[:, 320 - window + 1 :], own], axis=1).astype(np.float64) for a in (k, v))
    logits = 0.03 * as_float64(q)[0] @ seen_k.swapaxes(1, 2)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    want = (weights / weights.sum(-1, keepdims=True) @ seen_v)[None]
    assert relative_error(storage.attend(call), want) < FINE_INTEGER_TOLERANCE


def test_threads_and_splits_change_no_bit(level: str, rng: np.random.Generator) -> None:
    assert KERNELS is not None
    fmt = KVFormat(4, 3, page_tokens=64, sink_tokens=4)
    history = History.random(rng, 1, 4700, 64).steady(rng, fmt)  # three segments
    q = random_queries(rng, 4, 1, 64, mx.float32)
    usual = KERNELS.num_threads()
    try:
        outputs = []
        for num_threads in (1, 3):
            KERNELS.set_num_threads(num_threads)
            outputs.append(attended(history, fmt, q, 0.125))
    finally:
        KERNELS.set_num_threads(usual)
    assert mx.array_equal(outputs[0], outputs[1])
    assert relative_error(outputs[0], expected(history, q, fmt, 4699, 0.125, None)) < INTEGER_TOLERANCE
