"""Batches of several formats: each row gets, bit for bit, what it gets alone; the verbs keep order and books."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, KVCache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.histories import History, random_queries
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.backends.base import SequenceView
from turboquant_kv.backends.native.backend import sliding_window
from turboquant_kv.backends.plain_attention import plain_attention
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, LayerSource, TurboQuantKVCache
from turboquant_kv.cache.mixed_batch import MixedBatchCache, PlainRows, extend_rows, merge_rows
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.protocol import AttendingCache, UnsupportedModelError
from turboquant_kv.codec.format import KVFormat

BASE = KVFormat(page_tokens=16, sink_tokens=8)
DIM, HEADS, Q_HEADS, SCALE = 64, 2, 4, 0.125
FORMATS = ["4/4", "f16", "8/4", "4/3", "f16", "4/4"]
BACKENDS = ["cpu-numpy", "cpu-native", "mlx-ops"]


class Layer:
    """One layer's sources by format, and conversations in it with their random histories."""

    def __init__(self, rng: np.random.Generator, backend: str, dtype: Any = mx.float32) -> None:
        self.rng, self.dtype = rng, dtype
        bits = {"4/4": (4, 4), "8/4": (8, 4), "4/3": (4, 3)}
        self.sources = {name: LayerSource(BASE.with_(k_bits=k, v_bits=v), backend) for name, (k, v) in bits.items()}

    def new_row(self, fmt: str, length: int) -> Any:
        cache = KVCache() if fmt == "f16" else TurboQuantKVCache(self.sources[fmt])
        if length:
            history = History.random(self.rng, HEADS, length, DIM, dtype=self.dtype)
            attend(cache, *history.slice(0, length), random_queries(self.rng, Q_HEADS, length, DIM, self.dtype))
        return cache

    def step(self, num_rows: int, num_tokens: int = 1) -> tuple[mx.array, mx.array, mx.array]:
        """Keys, values (B, H, T, D) and queries (B, Hq, T, D) of one step."""
        k, v, q = (
            mx.array(self.rng.standard_normal((num_rows, heads, num_tokens, DIM)).astype(np.float32)).astype(self.dtype)
            for heads in (HEADS, HEADS, Q_HEADS)
        )
        return k, v, q

    def check(self) -> None:
        for source in self.sources.values():
            if source.pool is not None:
                source.pool.check_integrity()


def attend(
    cache: Any, keys: mx.array, values: mx.array, queries: mx.array, window: int | None = None, cap: float = 0.0
) -> mx.array:
    """One model step over any cache, plain ones through mlx-lm's own attention, which knows no cap."""
    mask = cache.make_mask(keys.shape[2], return_array=window is not None, window_size=window)
    k, v = cache.update_and_fetch(keys, values)
    if isinstance(cache, KVCache) and cap:
        return plain_attention(queries, k, v, scale=SCALE, mask=mask, cap=cap)
    if isinstance(cache, KVCache):
        return mx.fast.scaled_dot_product_attention(queries, k, v, scale=SCALE, mask=mask)
    out: mx.array = cache.attend(queries, scale=SCALE, mask=mask, sinks=None, cap=cap)
    return out


def assert_rows_equal(
    batch: Any, alone: list[Any], layer: Layer, *, window: int | None = None, tokens: int = 1, cap: float = 0.0
) -> None:
    """One step of the batch and of each row alone, compared bit for bit."""
    assert batch.offset.tolist() == [c.offset for c in alone]
    k, v, q = layer.step(len(alone), tokens)
    out = attend(batch, k, v, q, window, cap)
    for b, cache in enumerate(alone):
        want = attend(cache, k[b : b + 1], v[b : b + 1], q[b : b + 1], window, cap)
        assert mx.array_equal(out[b : b + 1], want), f"row {b}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("cap", [0.0, 0.7])
def test_every_row_gets_what_it_gets_alone(
    cap: float, backend: str, dtype: Any, window: int | None, rng: np.random.Generator
) -> None:
    layer = Layer(rng, backend, dtype)
    alone = [layer.new_row(fmt, int(n)) for fmt, n in zip(FORMATS, rng.integers(0, 70, len(FORMATS)), strict=True)]
    (batch,) = merge_rows([[c] for c in alone])
    assert isinstance(batch, MixedBatchCache)
    assert len(batch.groups) == 4
    for tokens in (1, 1, 5, 1):
        assert_rows_equal(batch, alone, layer, window=window, tokens=tokens, cap=cap)
    layer.check()


def test_a_right_padded_chunk_reaches_each_row_without_its_padding(rng: np.random.Generator) -> None:
    layer = Layer(rng, "cpu-numpy")
    alone = [layer.new_row(fmt, 5) for fmt in FORMATS]
    (batch,) = merge_rows([[c] for c in alone])
    lengths = [int(n) for n in rng.integers(1, 12, len(FORMATS))]
    batch.prepare(lengths=lengths, right_padding=[12 - n for n in lengths])
    for start, stop in ((0, 7), (7, 12)):
        k, v, q = layer.step(len(alone), stop - start)
        out = attend(batch, k, v, q)
        for b, cache in enumerate(alone):
            n = min(stop - start, max(0, lengths[b] - start))
            if n:
                want = attend(cache, k[b : b + 1, :, :n], v[b : b + 1, :, :n], q[b : b + 1, :, :n])
                assert mx.allclose(out[b : b + 1, :, :n], want, atol=1e-5)
        assert batch.offset.tolist() == [c.offset for c in alone]
    batch.finalize()
    assert_rows_equal(batch, alone, layer)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_rows_come_go_and_swap_places(data: st.DataObject) -> None:
    layer = Layer(np.random.default_rng(data.draw(st.integers(0, 2**31))), "cpu-numpy")
    batch = merge_rows([[layer.new_row("4/4", 3)]])
    alone = [layer.new_row("4/4", 0)]
    batch[0].filter([])
    alone.clear()
    for _ in range(data.draw(st.integers(2, 6))):
        verb = data.draw(st.sampled_from(["join", "join", "leave", "step", "trim", "extract"]))
        if verb == "join" or not alone:
            names = data.draw(st.lists(st.sampled_from(FORMATS), min_size=1, max_size=3))
            new = [layer.new_row(name, data.draw(st.integers(0, 40))) for name in names]
            batch = extend_rows(batch, merge_rows([[c] for c in new]))
            alone += new
            del new  # no hidden holder of pages
        elif verb == "leave":
            kept = data.draw(st.lists(st.sampled_from(range(len(alone))), unique=True))
            batch[0].filter(mx.array(kept, dtype=mx.int32))
            alone = [alone[i] for i in kept]
        elif verb == "step":
            assert_rows_equal(batch[0], alone, layer)
        elif verb == "trim":
            n = batch[0].trim(data.draw(st.integers(0, 3)))
            assert all(c.trim(n) == n for c in alone)
        else:
            row = data.draw(st.sampled_from(range(len(alone))))
            single = batch[0].extract(row)
            assert type(single) is type(alone[row])
            pair = merge_rows([[single]])[0], copy.deepcopy(alone[row])
            assert_rows_equal(pair[0], [pair[1]], layer)
            del single, pair
    if alone:
        assert_rows_equal(batch[0], alone, layer)
    for held in (*batch, *alone):
        if isinstance(held, AttendingCache):
            held.release()
    assert all(s.pool is None or s.pool.num_used == s.pool.exact_bytes == 0 for s in layer.sources.values())
    layer.check()


def test_rows_of_one_format_need_no_mixed_batch(rng: np.random.Generator) -> None:
    layer = Layer(rng, "cpu-numpy")
    compressed, plain = ([[layer.new_row(fmt, 20)] for _ in range(3)] for fmt in ("4/4", "f16"))
    assert type(merge_rows(compressed)[0]) is BatchTurboQuantKVCache
    assert type(merge_rows(plain)[0]) is PlainRows
    assert type(merge_rows(plain, padded=True)[0]) is BatchKVCache
    assert type(extend_rows(merge_rows(compressed), merge_rows(compressed))[0]) is BatchTurboQuantKVCache


def test_a_padded_batch_of_mlx_lm_can_be_joined(rng: np.random.Generator) -> None:
    layer = Layer(rng, "cpu-numpy")
    alone = [layer.new_row(fmt, n) for fmt, n in (("f16", 20), ("f16", 33), ("4/3", 50))]
    padded = merge_rows([[c] for c in alone[:2]], padded=True)
    (batch,) = extend_rows(padded, merge_rows([[alone[2]]]))
    assert_rows_equal(batch, alone, layer)


@pytest.mark.parametrize("kind", small_models.EVERY_KIND)
def test_whole_models_decode_mixed_batches_like_single_ones(kind: str, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    family = KVFamily(model, base=BASE, backend="cpu-numpy")
    names = ["4/4", "f16", "4/3"]
    runtime = family.runtime("f16")
    rows = []
    for name, n in zip(names, (40, 25, 70), strict=True):
        rows.append(family.runtime(name).make_cache())
        logits_of(model, rows[-1], random_tokens(rng, n), [])
    alone = [runtime.merge_rows([copy.deepcopy(row)]) for row in rows]
    batch = runtime.merge_rows(rows)
    for _ in range(3):
        tokens = random_tokens(rng, 3)
        out = np.array(model(mx.array(tokens)[:, None], cache=batch)[:, -1])
        for b in range(3):
            want = np.array(model(mx.array([[tokens[b]]]), cache=alone[b])[0, -1])
            # A product of three rows rounds differently from three of one row, and rings are padded in a batch.
            assert np.linalg.norm(out[b] - want) / np.linalg.norm(want) < 1e-4
    fork = runtime.fork_row(batch, 2, runtime.usable_prefix_row(batch, 2, 200))
    assert family.runtime_of(fork) is family.runtime("4/3")
    for held in (*rows, *alone, batch, fork):
        runtime.release(held)
    assert family.unique_bytes() == 0
    family.check_integrity()


@pytest.mark.parametrize("lengths", [(20, 70), (70, 20), (20, 5), (70, 90)])
def test_rows_shorter_than_a_window_do_not_hide_it(lengths: tuple[int, int], rng: np.random.Generator) -> None:
    """The native kernels take windows themselves, in whatever order short and long rows come."""
    layer = Layer(rng, "cpu-native")
    alone = [layer.new_row("4/4", n) for n in lengths]
    (batch,) = merge_rows([[c] for c in alone])
    mask = batch.make_mask(1, return_array=True, window_size=30)
    views = [SequenceView(n, 1, np.empty(0, np.int64), None, None) for n in lengths]
    assert sliding_window(mask, views) == (30 if max(lengths) > 30 else 0)
    narrower = batch.make_mask(1, return_array=True, window_size=4)
    assert sliding_window(mx.concatenate([mask[:1], narrower[1:]]), views) is None, "two windows are none"
    assert_rows_equal(batch, alone, layer, window=30)


def test_rows_whose_ring_has_wrapped_lose_nothing_and_say_so(rng: np.random.Generator) -> None:
    """A row in compressed pages goes back anywhere near; a ring that was written over cannot, whatever row it is."""
    model = small_models.sliding()
    family = KVFamily(model, base=BASE)
    for num_more, can_go_back in ((3, True), (40, False)):
        rows = [family.runtime(name).make_cache() for name in ("4/4", "f16")]
        for row in rows:
            logits_of(model, row, random_tokens(rng, 10), [])
        batch = merge_rows(rows)
        for _ in range(num_more):
            mx.eval(model(mx.array([random_tokens(rng, 1)] * 2), cache=batch))
        assert isinstance(batch[0], MixedBatchCache)
        assert [cache.is_trimmable() for cache in batch] == [can_go_back, can_go_back, True]
        before = [cache.lengths for cache in batch]
        if can_go_back:
            batch[0].trim_rows([1, 2])
            assert batch[0].trim(1) == 1
            assert batch[0].lengths == [before[0][0] - 2, before[0][1] - 3]
            continue
        with pytest.raises(UnsupportedModelError, match="its ring has overwritten"):
            batch[0].trim(1)
        with pytest.raises(UnsupportedModelError, match="its ring has overwritten"):
            batch[0].trim_rows([1, 1])
        assert [cache.lengths for cache in batch] == before
        batch[0].trim_rows([1, 0])
        assert batch[0].lengths == [before[0][0] - 1, before[0][1]]
