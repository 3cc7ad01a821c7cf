"""What a layer does in a step does not grow with the number of conversations: calls of Python and into kernels."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.base import LayerShape, Means
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, LayerSource, TurboQuantKVCache
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.sequence import PagedSequence
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary

BATCHES = (1, 8, 64)
NUM_LAYERS, HEADS, DIM = 4, 2, 64
SHAPE = LayerShape(HEADS, DIM, DIM, mx.float32)
FMT = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
# Tokens held before the step, and tokens of the step. A full tail becomes a page when its successor begins.
STEPS = {
    "no page closes": (30, 1),
    "all rows close a page": (FMT.sink_tokens + 2 * FMT.page_tokens, 1),
    "all rows close a page and fill others": (FMT.sink_tokens + FMT.page_tokens, 2 * FMT.page_tokens + 1),
    "all rows fill pages that were begun": (30, 40),
    "the sink is not full": (3, 1),
}


def new_batch(backend: str, batch_size: int, num_tokens: int) -> list[BatchTurboQuantKVCache]:
    """One cache per layer, all rows of the same length."""
    rotary = Rotary(10000.0 ** (-np.arange(DIM // 2) / (DIM // 2)), 1, DIM // 2)
    means = Means(np.ones((HEADS, DIM), np.float32), np.ones((HEADS, DIM), np.float32), rotary)
    pool = PagePool(choose_backend(backend), [SHAPE] * NUM_LAYERS, FMT, [means] * NUM_LAYERS)
    sources = [LayerSource.of_pool(pool, i) for i in range(NUM_LAYERS)]
    layers = [BatchTurboQuantKVCache(source, []) for source in sources]
    for _ in range(batch_size):
        shared = PagedSequence(pool, range(NUM_LAYERS))
        for i, layer in enumerate(layers):
            one = TurboQuantKVCache(sources[i], shared.of_layer(i))
            one.append(mx.zeros((1, HEADS, num_tokens, DIM)), mx.zeros((1, HEADS, num_tokens, DIM)))
            layer.extend(BatchTurboQuantKVCache(sources[i], [shared.of_layer(i)]))
    for layer in layers:
        layer.evaluate()
    return layers


class Counted:
    """Stands for a native object and counts what is called on it."""

    def __init__(self, native: Any, calls: Counter[str]) -> None:
        self._native, self._calls = native, calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._native, name)
        if not callable(value):
            return value

        def counted(*args: Any) -> Any:
            self._calls[name] += 1
            return value(*args)

        return counted


def python_calls(work: Callable[[], Any]) -> Counter[str]:
    """Python functions that `work` enters, by name."""
    calls = Counter[str]()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def calls_of_layers(layers: list[BatchTurboQuantKVCache], num_new: int, attends: bool) -> list[Counter[str]]:
    """Of each layer but the first, which decides for all, and the last, which ends the step for all."""
    batch_size = len(layers[0].sequences)
    k, q = mx.zeros((batch_size, HEADS, num_new, DIM)), mx.zeros((batch_size, 2 * HEADS, num_new, DIM))
    mx.eval(k, q)
    counts = []
    for layer in layers:

        def work(layer: BatchTurboQuantKVCache = layer) -> None:
            assert layer.offset is not None
            if not attends:
                layer.append(k, k)
                return
            layer.update_and_fetch(k, k)
            layer.attend(q, scale=0.1, mask=layer.make_mask(num_new) and "causal", sinks=None)

        counts.append(python_calls(work))
    return counts[1:-1]


@pytest.mark.parametrize("step", STEPS)
def test_a_native_layer_costs_the_same_for_any_number_of_rows(step: str) -> None:
    num_tokens, num_new = STEPS[step]
    python, native = [], []
    for batch_size in BATCHES:
        layers = new_batch("cpu-native", batch_size, num_tokens)
        pool: Any = layers[0].source.pool
        of_layers = [Counter[str]() for _ in layers]
        for store, calls in zip(pool.stores, of_layers, strict=True):
            store.store, store._kernels = Counted(store.store, calls), Counted(store._kernels, calls)
        python.append(calls_of_layers(layers, num_new, True))
        native.append(of_layers)
        assert [layer.lengths for layer in layers] == [[num_tokens + num_new] * batch_size] * NUM_LAYERS
    assert python[0] == python[1] == python[2]
    assert native[0] == native[1] == native[2]
    assert all(calls["attend"] == 1 for calls in native[0])
    closes, fills = "close a page" in step, "fill" in step
    assert all(calls["encode"] == closes + fills for calls in native[0])


@pytest.mark.parametrize("backend", ["cpu-numpy", "cpu-native", "mlx-ops"])
@pytest.mark.parametrize("step", STEPS)
def test_appending_costs_the_same_for_any_number_of_rows(backend: str, step: str) -> None:
    """Attention apart, which the portable backends walk conversation by conversation."""
    num_tokens, num_new = STEPS[step]
    counts = [calls_of_layers(new_batch(backend, n, num_tokens), num_new, False) for n in BATCHES]
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("step", STEPS)
def test_appending_to_mlx_arrays_is_as_many_operations_for_any_number_of_rows(step: str) -> None:
    num_tokens, num_new = STEPS[step]
    operations = []
    for batch_size in BATCHES[1:]:  # one row's are slices
        layers = new_batch("mlx-ops", batch_size, num_tokens)
        pool: Any = layers[0].source.pool
        k = mx.random.normal((batch_size, HEADS, num_new, DIM))
        mx.eval(k)
        for layer in layers:
            layer.append(k, k)
        operations.append([operations_of(store.pending_arrays()) for store in pool.stores])
    assert operations[0] == operations[1]


def operations_of(arrays: list[mx.array]) -> int:
    """How many operations will compute these arrays."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue().count("shape=rectangle")
