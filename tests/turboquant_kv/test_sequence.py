"""One conversation in several layers: decided once, written by each, undone together."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.backends.base import LayerShape, StepPlan, StepRows
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.cache.layer_cache import LayerSource, TurboQuantKVCache
from turboquant_kv.cache.layer_contents import contents_of, restore
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.protocol import UnsupportedModelError
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.cache.sequence import LayerSequence, PagedSequence
from turboquant_kv.codec.format import KVFormat

BACKENDS = ("cpu-numpy", "cpu-native", "mlx-ops")
FMT = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
SHAPES = (LayerShape(2, 64, 64, mx.float32), LayerShape(1, 128, 64, mx.float32), LayerShape(2, 64, 80, mx.float32))


class Conversation:
    """Three layers of different geometry, without queries."""

    def __init__(self, pool: PagePool, rng: np.random.Generator) -> None:
        self.pool, self.rng = pool, rng
        shared = PagedSequence(pool, range(len(SHAPES)))
        self.layers = [shared.of_layer(i) for i in range(len(SHAPES))]
        self.caches = [TurboQuantKVCache(LayerSource.of_pool(pool, layer.layer), layer) for layer in self.layers]

    def draw(self, num_tokens: int) -> list[tuple[mx.array, mx.array]]:
        def one(shape: LayerShape, dim: int) -> mx.array:
            return mx.array(self.rng.standard_normal((1, shape.num_kv_heads, num_tokens, dim)).astype(np.float32))

        return [(one(s, s.k_dim), one(s, s.v_dim)) for s in SHAPES]

    def append(self, num_tokens: int, num_layers: int = len(SHAPES)) -> None:
        for layer, (k, v) in list(enumerate(self.draw(num_tokens)))[:num_layers]:
            self.caches[layer].append(k, v)


def new_pool(backend: str) -> PagePool:
    return PagePool(choose_backend(backend), SHAPES, FMT)


def held(layers: list[LayerSequence]) -> list[np.ndarray[Any, Any]]:
    """Everything that the layers hold, as NumPy arrays."""
    arrays = []
    for layer in layers:
        contents = contents_of(layer)
        pages = (contents.pages.k_codes, contents.pages.k_scales, contents.pages.v_codes, contents.pages.v_scales)
        arrays += [np.array(a) for a in (*contents.sink, *pages, *contents.tail)]
    return arrays


def same(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [3, 8, 20, 24, 70])
@pytest.mark.parametrize("more", [1, 5, 40])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_step_that_not_all_layers_wrote_never_happened(
    backend: str, num_tokens: int, more: int, num_layers: int, rng: np.random.Generator
) -> None:
    pool = new_pool(backend)
    one = Conversation(pool, rng)
    one.append(num_tokens)
    before, used, exact = held(one.layers), pool.num_used, pool.exact_bytes
    one.append(more, num_layers)
    assert [len(layer) for layer in one.layers] == [num_tokens + more * (i < num_layers) for i in range(3)]
    forks = [layer.fork() for layer in one.layers]
    assert len({id(fork.shared) for fork in forks}) == 1, "all layers join one fork"
    for layers in (one.layers, forks):
        assert [len(layer) for layer in layers] == [num_tokens] * 3
        assert same(held(layers), before)
    assert (pool.num_used, pool.exact_bytes) == (used, exact)
    one.append(more, num_layers)
    for layer in one.layers[:num_layers]:
        layer.cut(num_tokens)
    assert same(held(one.layers), before)
    one.append(more)
    assert [len(layer) for layer in one.layers] == [num_tokens + more] * 3
    for layer in (*one.layers, *forks):
        layer.release()
    assert (pool.num_used, pool.exact_bytes, pool.num_exact_rows) == (0, 0, 0)
    pool.check_integrity()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_layer_that_fails_undoes_the_step_of_all(
    failing: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = new_pool("cpu-numpy")
    one = Conversation(pool, rng)
    one.append(30)
    before, used, exact = held(one.layers), pool.num_used, pool.exact_bytes

    def refuse(*_: Any) -> None:
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(pool.stores[failing], "encode", refuse)
        with pytest.raises(MemoryError):
            one.append(50)
    assert [len(layer) for layer in one.layers] == [30] * 3
    assert (pool.num_used, pool.exact_bytes) == (used, exact)
    assert same(held(one.layers), before)


def test_forks_of_different_states_are_different_forks(rng: np.random.Generator) -> None:
    one = Conversation(new_pool("cpu-numpy"), rng)
    one.append(20)
    early = one.layers[0].fork()
    one.append(1)
    late = [layer.fork() for layer in one.layers]
    again = [layer.fork() for layer in one.layers]
    assert len({id(layer.shared) for layer in late}) == len({id(layer.shared) for layer in again}) == 1
    assert len({id(layer.shared) for layer in (early, late[0], again[0])}) == 3
    assert (len(early), len(late[0])) == (20, 21)


def test_each_layer_is_cut_by_its_own_count(rng: np.random.Generator) -> None:
    """As mlx-lm does it: `trim(n)` on one layer after the other."""
    pool = new_pool("cpu-numpy")
    one = Conversation(pool, rng)
    one.append(70)
    for layer in one.layers:
        layer.cut(len(layer) - 30)
    assert [len(layer) for layer in one.layers] == [40] * 3
    assert pool.num_used == 2
    one.append(1)
    with pytest.raises(UnsupportedModelError, match="different numbers"):
        one.layers[1].cut(3)
        one.append(1)


def test_layers_must_get_the_same_tokens(rng: np.random.Generator) -> None:
    one = Conversation(new_pool("cpu-numpy"), rng)
    k, v = one.draw(3)[0]
    one.caches[0].append(k, v)
    k, v = one.draw(4)[1]
    with pytest.raises(UnsupportedModelError, match="different tokens"):
        one.caches[1].append(k, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_contents_come_back_bit_by_bit(backend: str, rng: np.random.Generator) -> None:
    one = Conversation(new_pool(backend), rng)
    one.append(75)
    other = new_pool("cpu-numpy" if backend != "cpu-numpy" else "mlx-ops")
    restored = restore(other, {i: contents_of(layer) for i, layer in enumerate(one.layers)})
    assert same(held([restored.of_layer(i) for i in range(3)]), held(one.layers))
    with pytest.raises(ValueError, match="geometry"):
        restore(other, {1: contents_of(one.layers[0])})
    short = Conversation(new_pool(backend), rng)
    short.append(40)
    with pytest.raises(ValueError, match="different numbers"):
        restore(other, {0: contents_of(one.layers[0]), 1: contents_of(short.layers[1])})
    assert other.num_used == FMT.num_pages(75)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stage", ["move", "rebuild"])
def test_a_trim_that_fails_loses_nothing(
    backend: str, stage: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = new_pool(backend)
    first, second = Conversation(pool, rng), Conversation(pool, rng)
    first.append(100)
    second.append(100)
    before = held(second.layers)
    for layer in first.layers:
        layer.release()
    calls = 0

    def refuse(*_: Any) -> None:
        nonlocal calls
        calls += 1
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        if stage == "move":
            patch.setattr(pool.stores[1], "write", refuse)
        else:
            patch.setattr(pool, "_rebuilt", refuse)
        with pytest.raises(MemoryError):
            pool.trim()
    assert calls == 1
    pool.check_integrity()
    assert same(held(second.layers), before)
    assert pool.trim() > 0 or backend == "mlx-ops"
    assert same(held(second.layers), before)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_step_is_prepared_once_for_all_layers(
    num_rows: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of layers; each step anew."""
    model = small_models.dense()
    runtime = KVRuntime(model, FMT, backend="cpu-numpy")
    rows = []
    for n in range(num_rows):
        rows.append(runtime.make_cache())
        logits_of(model, rows[-1], random_tokens(rng, 20 + n), [])
    batch = runtime.merge_rows(rows)
    cache = batch[0]
    backend, plans = cache.source.pool.backend, list[StepPlan]()
    prepare = backend.prepare_step

    def counted(rows: StepRows) -> StepPlan:
        assert [view.q_start for view in rows.views] == [20 + n + len(plans) for n in range(num_rows)]
        plans.append(prepare(rows))
        return plans[-1]

    monkeypatch.setattr(backend, "prepare_step", counted)
    assert len(batch) > 1
    for step in range(1, 4):
        mx.eval(model(mx.array([[1]] * num_rows), cache=batch))
        assert len(plans) == step


def test_caches_of_one_conversation_copy_together(rng: np.random.Generator) -> None:
    """As mlx-lm's prompt caches do it: a deep copy of the list, or of each layer."""
    model = small_models.dense()
    runtime = KVRuntime(model, FMT)
    caches = runtime.make_cache()
    logits_of(model, caches, random_tokens(rng, 50), [])
    more = random_tokens(rng, 5)
    want = logits_of(model, copy.deepcopy(caches), more, [])
    assert np.array_equal(logits_of(model, [copy.deepcopy(cache) for cache in caches], more, []), want)
    assert np.array_equal(logits_of(model, caches, more, []), want)
    assert all(isinstance(cache, TurboQuantKVCache) for cache in caches)
