"""Saving and loading of every layer mix: bit by bit, and refusing whatever contradicts itself."""

from __future__ import annotations

import copy
import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, ConcatenateKVCache, KVCache, RotatingKVCache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.cache.calibration import calibrate
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.cache.serialise import export_caches, import_caches
from turboquant_kv.codec.format import KVFormat

BASE = KVFormat(page_tokens=16, sink_tokens=8)
FORMATS = [None, BASE, BASE.with_(k_bits=8, v_bits=3)]


def through_json(header: Any) -> Any:
    return json.loads(json.dumps(header))


def assert_same(one: tuple[Any, list[Any]], other: tuple[Any, list[Any]]) -> None:
    assert one[0] == other[0]
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one[1], other[1], strict=True))


# MLX has no bfloat16 products of experts on a CPU.
KINDS_AND_DTYPES = [(kind, mx.float32) for kind in small_models.EVERY_KIND] + [
    (kind, mx.bfloat16) for kind in small_models.EVERY_KIND if kind != "with_sinks"
]


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_loaded_conversation_continues_bit_by_bit(
    kind: str, fmt: KVFormat | None, dtype: Any, rng: np.random.Generator
) -> None:
    model = small_models.EVERY_KIND[kind]()
    model.set_dtype(dtype)
    calibration = calibrate(model, random_tokens(rng, 90))
    runtime, restarted = (KVRuntime(model, fmt, calibration=calibration) for _ in range(2))
    for length in (1, 7, 40, 70):
        caches = runtime.make_cache()
        logits_of(model, caches, random_tokens(rng, length), [])
        for token in random_tokens(rng, 3):
            logits_of(model, caches, [token], [])
        saved = export_caches(caches)
        loaded = restarted.import_caches(through_json(saved[0]), [a.copy() for a in saved[1]])
        assert_same(saved, export_caches(loaded))
        assert restarted.measure(loaded).tokens == length + 3
        assert restarted.measure(loaded).compressed == runtime.measure(caches).compressed
        more = random_tokens(rng, 30)
        for part in (more[:1], more[1:20], more[20:]):
            assert np.array_equal(logits_of(model, loaded, part, []), logits_of(model, caches, part, []))


@pytest.mark.parametrize("kind", small_models.EVERY_KIND)
def test_a_row_that_left_a_mixed_batch_can_be_saved(kind: str, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    family = KVFamily(model, base=BASE)
    rows = []
    for name, n in (("4/4", 40), ("f16", 30)):
        rows.append(family.runtime(name).make_cache())
        logits_of(model, rows[-1], random_tokens(rng, n), [])
    batch = family.runtime("f16").merge_rows(rows)
    mx.eval(model(mx.array([[1], [2]]), cache=batch))
    for index, name in enumerate(("4/4", "f16")):
        runtime = family.runtime(name)
        single = runtime.fork_row(batch, index, runtime.usable_prefix_row(batch, index, 1000))
        loaded = family.import_caches(*export_caches(single))
        assert family.runtime_of(loaded) is runtime
        more = random_tokens(rng, 9)
        assert np.array_equal(logits_of(model, loaded, more, []), logits_of(model, single, more, []))


def test_pages_saved_by_one_backend_load_in_another(rng: np.random.Generator) -> None:
    model = small_models.dense()
    tokens = random_tokens(rng, 80)
    saved = None
    for backend in ("cpu-numpy", "cpu-native", "mlx-ops"):
        runtime = KVRuntime(model, BASE, backend=backend)
        if saved is None:
            caches = runtime.make_cache()
            logits_of(model, caches, tokens, [])
            saved = export_caches(caches)
        assert_same(saved, export_caches(runtime.import_caches(*saved)))


def filled(cache: Any, num_tokens: int, rng: np.random.Generator) -> Any:
    for _ in range(num_tokens):
        k = mx.array(rng.standard_normal((1, 2, 1, 4)).astype(np.float32))
        cache.update_and_fetch(k, k + 1)
    return cache


def test_every_class_of_cache_is_saved(rng: np.random.Generator) -> None:
    state = ArraysCache(3)
    state[0], state[2] = mx.ones((1, 2)), mx.zeros((1, 3, 4), mx.bfloat16)
    chunked = filled(ChunkedKVCache(8), 13, rng)
    chunked.maybe_trim_front()

    def empty() -> list[Any]:
        ring = RotatingKVCache(6)
        return [CacheList(KVCache(), CacheList(ring, ArraysCache(2))), ArraysCache(3), ChunkedKVCache(8), KVCache()]

    caches = empty()
    filled(caches[0][0], 5, rng)
    filled(caches[0][1][0], 9, rng)
    caches[1], caches[2] = state, chunked
    saved = export_caches(caches)
    loaded = import_caches(through_json(saved[0]), saved[1], empty())
    assert_same(saved, export_caches(loaded))
    assert loaded[1][1] is None
    for old, new in ((caches[0][1][0], loaded[0][1][0]), (chunked, loaded[2]), (caches[3], loaded[3])):
        k = mx.array(rng.standard_normal((1, 2, 1, 4)).astype(np.float32))
        for a, b in zip(old.update_and_fetch(k, k), new.update_and_fetch(k, k), strict=True):
            assert mx.array_equal(a, b)


def test_caches_without_a_known_state_are_refused_by_name(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="ConcatenateKVCache"):
        export_caches([filled(ConcatenateKVCache(), 3, rng)])


@pytest.fixture(scope="module")
def sliding_runtime() -> tuple[Any, KVRuntime, Any]:
    model = small_models.sliding()
    runtime = KVRuntime(model, BASE)
    caches = runtime.make_cache()
    logits_of(model, caches, random_tokens(np.random.default_rng(5), 60), [])
    return model, runtime, export_caches(caches)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    below = [leaf for key, child in children for leaf in leaves(child, (*path, key))]
    return [path, *below] if path else below


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_header_is_refused_or_harmless(sliding_runtime: Any, data: st.DataObject) -> None:
    _, runtime, (header, arrays) = sliding_runtime
    changed = copy.deepcopy(header)
    path = data.draw(st.sampled_from(leaves(changed)))
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    value: Any = data.draw(
        st.sampled_from([None, -1, 0, 1, 7, 10**30, 2.5, "x", "KVCache", [], {}, [1, 2, 3], "delete"])
    )
    if value == "delete":
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    try:
        loaded = runtime.import_caches(changed, arrays)
    except ValueError:
        pass
    else:
        assert all(np.array_equal(a, b) for a, b in zip(arrays, export_caches(loaded)[1], strict=True))
        runtime.release(loaded)
    assert runtime.unique_bytes() == 0, "a refused cache leaks nothing"
    runtime.check_integrity()


def test_swapped_or_missing_arrays_are_refused(sliding_runtime: Any, rng: np.random.Generator) -> None:
    _, runtime, (header, arrays) = sliding_runtime
    for damaged in (arrays[:-1], [*arrays, arrays[0]], arrays[::-1], [a.astype(np.float64) for a in arrays]):
        with pytest.raises(ValueError):
            runtime.import_caches(header, damaged)


def test_caches_of_another_model_or_format_are_refused(sliding_runtime: Any) -> None:
    model, _, saved = sliding_runtime
    for runtime in (
        KVRuntime(model, BASE.with_(v_bits=3)),
        KVRuntime(model, None),
        KVRuntime(small_models.dense(), BASE),
        KVRuntime(small_models.recurrent(), BASE),
    ):
        with pytest.raises(ValueError):
            runtime.import_caches(*saved)


def test_equal_beginnings_have_equal_pieces(rng: np.random.Generator) -> None:
    """`cut` tells where arrays may be cut: both conversations' pieces before the fork are the same bytes."""
    model = small_models.dense()
    runtime = KVRuntime(model, BASE)
    caches = runtime.make_cache()
    logits_of(model, caches, random_tokens(rng, 1100), [])
    fork = runtime.fork(caches, 1100)
    logits_of(model, fork, random_tokens(rng, 200), [])
    (header, short), (_, long) = export_caches(caches), export_caches(fork)
    cuts = [entry["cut"] for entry in header["arrays"]]
    assert [c for c in cuts if c is not None] == [[0, 64]] * 8
    for cut, a, b in zip(cuts, short, long, strict=True):
        if cut is not None:
            assert np.array_equal(a[: cut[1]], b[: cut[1]])
