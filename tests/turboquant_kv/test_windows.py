"""Sliding windows on compressed pages: queries see exactly the window, what is out of it goes back to the pool."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gemma3_text
from mlx_lm.models.cache import KVCache, RotatingKVCache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.histories import (
    History,
    as_float64,
    expected,
    feed,
    random_cuts,
    random_queries,
    random_rotary,
    relative_error,
)
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.cache import windows
from turboquant_kv.cache.calibration import calibrate
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, LayerSource, TurboQuantKVCache
from turboquant_kv.cache.leaves import leaves
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.probe import probe_layers
from turboquant_kv.cache.protocol import BatchRows, UnsupportedModelError
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError

BACKENDS = ["cpu-numpy", "cpu-native", "mlx-ops"]
FMT = KVFormat(page_tokens=16, sink_tokens=8)
NEARLY_EXACT = FMT.with_(k_bits=8, v_bits=8)
# Few query rows take integers in the native kernels; test_backends.py says how far these may be off.
TOLERANCE = {"cpu-numpy": 1e-5, "mlx-ops": 1e-5, "cpu-native": 3e-2}
KINDS = ["sliding", "with_sinks", "convolved"]


def held_pages(cache: TurboQuantKVCache) -> int:
    assert cache.sequence is not None
    return len(cache.sequence.page_ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 5, 16, 40, 100])
@pytest.mark.parametrize("turns", [False, True])
def test_queries_see_what_the_reference_says(backend: str, window: int, turns: bool, rng: np.random.Generator) -> None:
    history = History.random(rng, 2, 300, 64)
    means = history.means(rng, random_rotary(rng, 64) if turns else None)
    history.steady(rng, FMT, means)
    source = LayerSource(FMT, backend, means, window)
    cache, sinks = TurboQuantKVCache(source), mx.array(rng.standard_normal(4).astype(np.float32))
    cuts = [*random_cuts(rng, 250, 6), *range(251, 301)]
    decoded: list[tuple[mx.array, Any]] = []
    for start, stop in itertools.pairwise(cuts):
        q = random_queries(rng, 4, stop - start, 64, mx.float32)
        mask = cache.make_mask(stop - start, window_size=window)
        assert mask == (None if stop - start == 1 else "causal")
        out = feed(cache, history, start, stop, q, 0.1, mask=mask, sinks=sinks)
        seen = History(history.k[:, :stop], history.v[:, :stop], mx.float32)
        want = expected(seen, q, FMT, start, 0.1, means, sinks=np.array(sinks), window=window)
        if stop - start == 1:
            decoded.append((out, want))
        else:
            assert relative_error(out, want) < TOLERANCE[backend]
        assert held_pages(cache) <= (window + windows.spare(FMT)) // FMT.page_tokens + 1
        assert cache.offset == stop
    outs, wants = (list(side) for side in zip(*decoded, strict=True))  # one by one they scatter where a sink takes most
    assert relative_error(mx.concatenate(outs, axis=2), np.concatenate(wants, axis=2)) < TOLERANCE[backend]
    assert source.pool is not None
    assert source.pool.num_used == held_pages(cache), "pages that left the window are the pool's again"
    source.pool.check_integrity()
    cache.release()
    assert source.pool.num_used == source.pool.exact_bytes == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrower_mask_is_kept_to(backend: str, rng: np.random.Generator) -> None:
    """A model may ask for a smaller window than its cache has, or for an array."""
    history = History.random(rng, 2, 120, 64).steady(rng, FMT)
    cache = TurboQuantKVCache(LayerSource(FMT, backend, None, 40))
    feed(cache, history, 0, 110, random_queries(rng, 4, 110, 64, mx.float32), 0.1)
    for stop, window, as_array in ((111, 12, False), (116, 12, False), (117, 40, True), (120, 90, True)):
        start = cache.offset
        q = random_queries(rng, 4, stop - start, 64, mx.float32)
        mask = cache.make_mask(stop - start, return_array=as_array, window_size=window)
        assert isinstance(mask, mx.array)
        out = feed(cache, history, start, stop, q, 0.1, mask=mask)
        seen = History(history.k[:, :stop], history.v[:, :stop], mx.float32)
        want = expected(seen, q, FMT, start, 0.1, None, window=min(window, 40))
        assert relative_error(out, want) < TOLERANCE[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_batch_are_bit_for_bit_what_they_are_alone(backend: str, rng: np.random.Generator) -> None:
    source = LayerSource(FMT, backend, None, 24)

    def drawn(num_rows: int, heads: int, num_tokens: int) -> mx.array:
        return mx.array(rng.standard_normal((num_rows, heads, num_tokens, 64)).astype(np.float32))

    alone = [TurboQuantKVCache(source) for _ in range(4)]
    for cache, n in zip(alone, (3, 30, 61, 200), strict=True):
        cache.append(drawn(1, 2, n), drawn(1, 2, n))
    batch = TurboQuantKVCache.merge(alone)
    for step in range(60):
        k, v, q = drawn(4, 2, 1), drawn(4, 2, 1), drawn(4, 4, 1)
        batch.update_and_fetch(k, v)
        out = batch.attend(q, scale=0.1, mask=batch.make_mask(1, window_size=24), sinks=None)
        for b, cache in enumerate(alone):
            cache.update_and_fetch(k[b : b + 1], v[b : b + 1])
            want = cache.attend(q[b : b + 1], scale=0.1, mask=cache.make_mask(1, window_size=24), sinks=None)
            assert mx.array_equal(out[b : b + 1], want)
        if step % 7 == 0:
            assert source.pool is not None
            assert source.pool.trim() >= 0  # numbers pages anew
            source.pool.check_integrity()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forks_and_cuts_see_what_they_would_have_seen(backend: str, rng: np.random.Generator) -> None:
    history = History.random(rng, 1, 400, 64).steady(rng, FMT)  # chunks round differently
    cache = TurboQuantKVCache(LayerSource(FMT, backend, None, 40))
    num_cut = 0
    while cache.offset < 360:
        start = cache.offset
        stop = min(400, start + int(rng.integers(1, 30)))
        feed(cache, history, start, stop, random_queries(rng, 2, stop - start, 64, mx.float32), 0.1)
        sequence = cache.sequence
        assert sequence is not None
        length = sequence.exact_cut(max(0, stop - int(rng.integers(0, 60))))
        if not length:
            continue
        num_cut += length < stop
        fork = cache.fork()
        fork.trim(stop - length)
        cold = TurboQuantKVCache(cache.source)
        feed(cold, history, 0, length, random_queries(rng, 2, length, 64, mx.float32), 0.1)
        q = random_queries(rng, 2, 20, 64, mx.float32)
        of_fork, of_cold = (feed(c, history, length, length + 20, q, 0.1) for c in (fork, cold))
        assert relative_error(of_fork, as_float64(of_cold)) < 1e-5
        fork.release()
        cold.release()
    assert num_cut > 2
    with pytest.raises(UnsupportedModelError, match="cannot go back from"):
        cache.trim(200)
    cache.trim(cache.offset)
    assert cache.offset == 0
    q = random_queries(rng, 2, 90, 64, mx.float32)
    fresh = TurboQuantKVCache(cache.source)
    of_emptied, of_fresh = (feed(c, history, 0, 90, q, 0.1) for c in (cache, fresh))
    assert mx.array_equal(of_emptied, of_fresh)
    for one in (cache, fresh):
        one.release()
    assert cache.source.pool is not None
    cache.source.pool.check_integrity()
    assert cache.source.pool.num_used == 0


@pytest.mark.parametrize("num_tokens", [7, 39, 45])
def test_a_conversation_that_forgot_nothing_goes_back_anywhere(num_tokens: int, rng: np.random.Generator) -> None:
    history = History.random(rng, 1, num_tokens, 64)
    cache = TurboQuantKVCache(LayerSource(FMT, "cpu-numpy", None, 40))
    cache.append(*history.slice(0, num_tokens))
    sequence = cache.sequence
    assert sequence is not None
    unbounded = TurboQuantKVCache(LayerSource(FMT, "cpu-numpy"))
    unbounded.append(*history.slice(0, num_tokens))
    assert unbounded.sequence is not None
    for length in range(num_tokens + 1):
        assert sequence.exact_cut(length) == unbounded.sequence.exact_cut(length)
    cut = int(rng.integers(1, num_tokens))
    cache.trim(num_tokens - cut)
    assert cache.offset == cut


def test_a_saved_prompt_cache_goes_on(rng: np.random.Generator) -> None:
    history = History.random(rng, 2, 200, 64)
    for length in (5, 60, 170):
        cache = TurboQuantKVCache(LayerSource(FMT, "auto", None, 24))
        feed(cache, history, 0, length, random_queries(rng, 2, length, 64, mx.float32), 0.1)
        loaded = TurboQuantKVCache.from_state(cache.state)
        batch = BatchTurboQuantKVCache.from_state([cache.state])
        assert (loaded.offset, loaded.nbytes) == (length, cache.nbytes)
        q = random_queries(rng, 2, 1, 64, mx.float32)
        row = batch.extract(0)
        outs = [feed(c, history, length, length + 1, q, 0.1) for c in (cache, loaded, row)]
        assert mx.array_equal(outs[0], outs[1])
        assert mx.array_equal(outs[0], outs[2])


def chunks(model: Any, caches: list[Any], tokens: list[int]) -> np.ndarray[Any, Any]:
    return logits_of(model, caches, tokens, [40, 100, *range(190, len(tokens))])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_models_compute_what_they_do_with_rings(kind: str, backend: str, rng: np.random.Generator) -> None:
    """Far beyond the window: to rounding while pages are exact, and within what 8-bit codes do where they are not."""
    model, tokens = small_models.EVERY_KIND[kind](), random_tokens(rng, 220)
    runtime = KVRuntime(model, NEARLY_EXACT, calibration=calibrate(model, tokens), backend=backend)
    caches, rings = runtime.make_cache(), KVRuntime(model, None).make_cache()
    assert not any(isinstance(cache, RotatingKVCache) for cache in leaves(caches))
    got, want = chunks(model, caches, tokens), chunks(model, rings, tokens)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05
    exact = KVRuntime(model, KVFormat(8, 8, page_tokens=256, sink_tokens=8), backend=backend)
    got = chunks(model, exact.make_cache(), tokens)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-4
    assert runtime.measure(caches).total <= runtime.bytes_for(220)
    runtime.release(caches)
    runtime.check_integrity()
    assert runtime.unique_bytes() == 0


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 40, 47, 48, 49, 120, 333])
def test_bytes_are_bounded_as_planned(num_tokens: int, rng: np.random.Generator) -> None:
    shape, window = LayerShape(1, 64, 64, mx.float32), 24
    cache = TurboQuantKVCache(LayerSource(FMT, "cpu-numpy", None, window))
    history = History.random(rng, 1, num_tokens, 64)
    for start in range(num_tokens):
        cache.append(*history.slice(start, start + 1))
        assert cache.nbytes <= windows.bytes_for(FMT, shape, window, num_tokens)
        assert cache.nbytes <= windows.bytes_for(FMT, shape, window, start + 1)


def test_long_windows_take_a_third() -> None:
    """What README and docs promise of the default format, in half precision."""
    shape, fmt = LayerShape(4, 256, 256, mx.bfloat16), KVFormat()
    ratios = [w * shape.raw_token_bytes / windows.longest_bytes(fmt, shape, w) for w in (128, 512, 1024, 4096)]
    assert [round(ratio, 1) for ratio in ratios] == [1.2, 2.5, 3.0, 3.7]


def test_what_short_windows_cost_is_told() -> None:
    """Pages of 96 tokens are longer than a window of 24."""
    model = small_models.sliding()
    for fmt, told in ((KVFormat(), r"times their bytes$"), (FMT, r"in 1/[12]\.\d of their bytes$")):
        runtime = KVRuntime(model, fmt)
        assert re.search(told, runtime.description)
        (shape,) = {window.shape for window in runtime.layers.windows if window is not None}
        ratio = windows.longest_bytes(fmt, shape, 24) / (24 * shape.raw_token_bytes)
        assert f"{max(ratio, 1 / ratio):.1f}" in runtime.description


def with_odd_rings(head_dim: int) -> Any:
    """Rings whose heads have another dimension than the full layer's, which is 64."""
    model = small_models.sliding()
    for number in (0, 1):
        attention = gemma3_text.Attention(dataclasses.replace(model.args, head_dim=head_dim), number)
        model.layers[number].self_attn = attention
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(("head_dim", "name"), [(24, "8/8"), (48, "4t/4t")])
def test_rings_that_cannot_be_stored_stay_as_they_are(head_dim: int, name: str, rng: np.random.Generator) -> None:
    model, tokens = with_odd_rings(head_dim), random_tokens(rng, 150)
    family = KVFamily(model, base=FMT, calibration=calibrate(model, tokens))
    runtime = family.runtime(name)
    assert runtime.description == f"{name}, 2 of 3 layers f16"
    caches, plain = runtime.make_cache(), family.runtime("f16").make_cache()
    assert [type(cache) for cache in caches] == [RotatingKVCache, RotatingKVCache, TurboQuantKVCache]
    got, want = (logits_of(model, held, tokens, [149]) for held in (caches, plain))  # a ring keeps its latest chunk
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.5
    assert runtime.measure(caches).total <= runtime.bytes_for(len(tokens))
    more = random_tokens(rng, 3)
    want = logits_of(model, runtime.fork(caches, len(tokens)), more, [])
    loaded = family.import_caches(*family.export_caches(caches))
    assert np.array_equal(logits_of(model, loaded, more, []), want)
    exact = family.convert(caches, name, "f16")
    assert [type(cache) for cache in exact] == [RotatingKVCache, RotatingKVCache, KVCache]
    batch = runtime.merge_rows([caches, exact])
    together = np.array(model(mx.array([more, more]), cache=batch))
    assert np.linalg.norm(together[0] - want) / np.linalg.norm(want) < 0.05


def test_a_model_of_which_nothing_can_be_stored_is_refused() -> None:
    model = with_odd_rings(24)
    layers = probe_layers(model)
    only_rings = dataclasses.replace(layers, shapes=(None,) * 3)
    with pytest.raises(UnsupportedFormatError, match="head_dim 24"):
        KVRuntime(model, FMT, layers=only_rings)


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_are_saved_and_change_formats(kind: str, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    family = KVFamily(model, base=FMT, calibration=calibrate(model, random_tokens(rng, 100)))
    for length in (6, 30, 90, 220):
        runtime = family.runtime("8/8")
        caches = runtime.make_cache()
        logits_of(model, caches, random_tokens(rng, length), [])
        mx.eval(model(mx.array([[3]]), cache=caches))
        more = random_tokens(rng, 30)
        want = logits_of(model, runtime.fork(caches, length + 1), more, [])
        loaded = family.import_caches(*family.export_caches(caches))
        assert np.array_equal(logits_of(model, loaded, more, []), want)
        plain = family.convert(caches, "8/8", "f16")
        kinds = {type(c) for c in leaves(plain)} & {TurboQuantKVCache, KVCache, RotatingKVCache}
        assert kinds == {KVCache, RotatingKVCache}
        again, smaller = family.convert(plain, "f16", "8/8"), family.convert(caches, "8/8", "8/4")
        # Codes of `again` are those of `caches` but where rounding decided one, which 8 bits make small.
        for other, most in ((plain, 0.05), (again, 1e-2), (smaller, 0.5)):
            got = logits_of(model, other, more, [])
            assert np.linalg.norm(got - want) / np.linalg.norm(want) < most
        del loaded, plain, again, smaller, other
        runtime.release(caches)
        family.check_integrity()


def test_a_conversation_that_forgot_too_much_is_not_loaded(rng: np.random.Generator) -> None:
    model = small_models.sliding()
    family = KVFamily(model, base=FMT)
    caches = family.runtime("4/4").make_cache()
    logits_of(model, caches, random_tokens(rng, 200), [])
    header, arrays = family.export_caches(caches)
    places = [layer for layer in header["layers"] if "forgotten" in layer]
    assert len(places) == 2
    assert all(layer["forgotten"] > 0 for layer in places)
    for value in (0, 8, 197, 1000, -1, "8"):
        damaged = copy.deepcopy(header)
        for layer in damaged["layers"]:
            if "forgotten" in layer:
                layer["forgotten"] = value
        with pytest.raises(ValueError, match=r"saved|forgotten|tokens"):
            family.import_caches(damaged, arrays)


@pytest.mark.parametrize("kind", ["sliding", "with_sinks"])
def test_every_row_of_such_a_model_needs_no_padding(kind: str, rng: np.random.Generator) -> None:
    """Rows of different lengths, prompts read together: each gets what it gets alone, but for rounding."""
    model = small_models.EVERY_KIND[kind]()
    runtime = KVRuntime(model, NEARLY_EXACT, backend="cpu-numpy")  # rounding may decide a code; of 8 bits it is small
    rows = [runtime.make_cache() for _ in range(3)]
    for row, n in zip(rows, (5, 60, 150), strict=True):
        logits_of(model, row, random_tokens(rng, n), [])
    batch = runtime.merge_rows(rows)
    alone = [runtime.merge_rows([row]) for row in rows]
    assert all(isinstance(cache, BatchRows) for cache in batch)
    tokens = [random_tokens(rng, n) for n in (9, 4, 12)]
    for cache in batch:
        cache.prepare(lengths=[9, 4, 12], right_padding=[3, 8, 0])
    out = np.array(model(mx.array([t + [0] * (12 - len(t)) for t in tokens]), cache=batch))
    for cache in batch:
        cache.finalize()
    for b, one in enumerate(alone):
        want = np.array(model(mx.array([tokens[b]]), cache=one))[0]
        assert np.linalg.norm(out[b, : len(want)] - want) / np.linalg.norm(want) < 5e-3
    for _ in range(40):
        step = random_tokens(rng, 3)
        out = np.array(model(mx.array(step)[:, None], cache=batch)[:, -1])
        for b, one in enumerate(alone):
            want = np.array(model(mx.array([[step[b]]]), cache=one)[0, -1])
            assert np.linalg.norm(out[b] - want) / np.linalg.norm(want) < 3e-2
    for held in (*rows, *alone, batch):
        runtime.release(held)
    assert runtime.unique_bytes() == 0
