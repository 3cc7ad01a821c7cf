"""Decode steps in one call, at every level: those of the layers' two calls and their attention, and what is refused."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv.native.test_block import F16, Q4, Q4_32, Q8, Layer, turn_of

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.native import backend, linear
from turboquant_kv.backends.native.backend import NativeStore, load_kernels
from turboquant_kv.backends.native.block import BlockShape, reference_norm
from turboquant_kv.backends.native.decoder import LayerToken, NativeDecoder
from turboquant_kv.backends.native.linear import NativeWeights, Quantised
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, LayerSource, TurboQuantKVCache
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.sequence import PagedSequence
from turboquant_kv.cache.token_step import TokenStep, begin_token
from turboquant_kv.codec.format import KVFormat

kernels, _ = load_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the native kernels are not built")
LEVELS: list[str] = [] if kernels is None else kernels.isa_levels()
FMT = KVFormat(4, 4, page_tokens=16, sink_tokens=4)
SHAPE = BlockShape(4, 2, 64, 64, 32, is_interleaved=False)
WIDTH, HIDDEN, NUM_IDS, SCALE = 128, 192, 70, 0.125
KINDS: list[list[Any]] = [[Q4] * 7, [Q4_32, Q8, F16, Q4, Q4_32, Q4_32, Q8]]


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    level: str = request.param
    for module in (linear, backend):
        monkeypatch.setattr(module, "isa_choice", lambda: level)
    return level


class Model:
    """Two random layers between a table, a norm and a head, and caches of a few conversations."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.layers = [Layer(rng, SHAPE, WIDTH, HIDDEN, kinds, head_norms=bool(i)) for i, kinds in enumerate(KINDS)]
        codes, scales, biases = mx.quantize(mx.array(rng.standard_normal((NUM_IDS, WIDTH))), 64, 4)
        self.table = NativeWeights(codes, Quantised(scales, biases, 4, 64))
        self.norm = rng.uniform(0.5, 2, WIDTH).astype(np.float32)
        blocks = [layer.native for layer in self.layers]
        self.decoder = NativeDecoder(self.table, blocks, (mx.array(self.norm), 1e-5), self.table)
        shape = LayerShape(SHAPE.num_kv_heads, SHAPE.head_dim, SHAPE.v_dim, mx.float32)
        self.pool = PagePool(backend.NativeBackend(), [shape] * 2, FMT, [None] * 2)

    def batch(self, lengths: tuple[int, ...]) -> list[BatchTurboQuantKVCache]:
        """Conversations of these lengths, with the same contents each time."""
        rng, singles = np.random.default_rng(7), []
        for length in lengths:
            shared = PagedSequence(self.pool, range(2))
            row = [TurboQuantKVCache(LayerSource.of_pool(self.pool, i), shared.of_layer(i)) for i in range(2)]
            for cache in row:
                k, v = (mx.array(rng.standard_normal((1, 2, length, 64)).astype(np.float32)) for _ in range(2))
                cache.append(k, v)
            singles.append(row)
        return [TurboQuantKVCache.merge([row[layer] for row in singles]) for layer in range(2)]

    def by_layers(self, ids: Any, turn: Any, caches: list[BatchTurboQuantKVCache]) -> Any:
        x = np.array(self.table.look_up(mx.array(ids)))[:, None]
        for layer, cache in zip(self.layers, caches, strict=True):
            q, k, v = layer.native.inputs(x, turn[:, None])
            attended = cache.attend_floats(q, k, v, scale=SCALE, mask=None)
            assert attended is not None
            x = layer.native.outputs(x, attended)
        return self.decoder.logits(np.ascontiguousarray(x[:, 0])), x[:, 0]

    def given(self, turn: Any, step: TokenStep) -> list[LayerToken]:
        stores = [store for store in step.stores if isinstance(store, NativeStore)]
        return [LayerToken(store, turn, SCALE, None) for store in stores]


@pytest.mark.usefixtures("isa")
def test_a_step_is_that_of_its_layers_to_the_bit(rng: np.random.Generator) -> None:
    """While sinks and tails grow and move and pages close."""
    model = Model(rng)
    one, other = model.batch((3, 36, 19)), model.batch((3, 36, 19))
    for _ in range(20):
        ids, turn = rng.integers(0, NUM_IDS, 3), turn_of(rng, SHAPE, 3, 1)[:, 0]
        wanted, last = model.by_layers(ids, turn, one)
        step = begin_token(other, 3)
        assert step is not None and step.positions == [length - 1 for length in one[0].lengths]
        got = model.decoder.step(ids, step.plan, model.given(turn, step))
        step.done()
        assert np.array_equal(got, wanted)
        dense = np.array(model.table.look_up(mx.arange(NUM_IDS)))
        reference = reference_norm(last, model.norm, 1e-5) @ dense.T
        assert np.linalg.norm(got - reference) <= 3e-4 * np.linalg.norm(reference)
    for mine, theirs in zip(one, other, strict=True):
        for row in range(3):
            states = [cache.extract(row).state for cache in (mine, theirs)]
            assert all(isinstance(a, str) or mx.array_equal(a, b) for a, b in zip(*states, strict=True))


def test_caches_that_are_not_one_pool_s_begin_nothing(rng: np.random.Generator) -> None:
    model = Model(rng)
    batch, others = model.batch((5, 9)), Model(rng).batch((5, 9))
    refused: list[list[Any]] = [[], [batch[0], others[1]], [batch[0], batch[0]], [batch[0], model.batch((5, 9))[1]]]
    refused.append([batch[0], None])
    for caches in refused:
        assert begin_token(caches, 2) is None
    assert begin_token(batch, 3) is None
    batch[0].prepare(lengths=[1, 0], right_padding=[0, 1])
    assert begin_token(batch, 2) is None
    batch[0].finalize()
    assert [cache.lengths for cache in batch] == [[5, 9]] * 2
    step = begin_token(batch, 2)
    assert step is not None
    step.undo()
    assert [cache.lengths for cache in batch] == [[5, 9]] * 2


@pytest.mark.usefixtures("isa")
def test_what_the_kernels_do_not_take_is_refused(rng: np.random.Generator) -> None:
    """Before anything is written: the good step after them gives what it gives alone."""
    assert kernels is not None
    model = Model(rng)
    ids, turn = rng.integers(0, NUM_IDS, 2), turn_of(rng, SHAPE, 2, 1)[:, 0]
    wanted, _ = model.by_layers(ids, turn, model.batch((36, 7)))
    step = begin_token(model.batch((36, 7)), 2)  # the first one's tail is full
    assert step is not None
    plan, rows = step.plan, step.plan.rows
    assert isinstance(plan, backend.NativeStepPlan) and rows.closed is not None
    layers = [(store.store, *store.exact_arrays(), turn, SCALE, 0, None, None) for store in step.stores]  # type: ignore[attr-defined]
    out = np.zeros((2, NUM_IDS), np.float32)
    good: dict[str, Any] = {"tokens": ids, "figures": plan.figures, "page_ids": plan.page_ids, "writes": rows.writes}
    good |= {"copies": rows.copies, "closed": tuple(rows.closed), "layers": layers, "logits": out}

    def changed(place: int, value: Any) -> list[Any]:
        return [layers[0], tuple(value if i == place else part for i, part in enumerate(layers[1]))]

    far = np.array([[0, 1], [0, 1 << 40]])
    factors = np.ones((2, 64), np.float32)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"tokens": np.array([0, NUM_IDS])}, "not among the table"),
        ({"tokens": np.array([0, -1])}, "not among the table"),
        ({"tokens": ids[:1]}, "along axis 0"),
        ({"tokens": ids.astype(np.int32)}, "type"),
        ({"figures": plan.figures[:1]}, "along axis 0"),
        ({"figures": plan.figures + 1}, "."),
        ({"page_ids": plan.page_ids + (1 << 20)}, "page id"),
        ({"writes": far}, "rows to move"),
        ({"writes": far[::-1].copy()}, "rows to move"),
        ({"writes": -rows.writes - 1}, "rows to move"),
        ({"writes": rows.writes[:1]}, "along axis 0"),
        ({"copies": far}, "rows to move"),
        ({"closed": (rows.closed.page_ids + (1 << 20), *rows.closed[1:])}, "page id"),
        ({"closed": (*rows.closed[:2], rows.closed.starts + (1 << 20))}, "page_tokens rows"),
        ({"closed": (rows.closed[0], rows.closed.numbers - 9, rows.closed[2])}, "first_page"),
        ({"layers": layers[:1]}, "other layers"),
        ({"layers": [layers[0], layers[1][:7]]}, "eight"),
        ({"layers": changed(1, layers[1][1][:1])}, "along axis 0"),
        ({"layers": changed(1, layers[1][1][:, :1])}, "."),
        ({"layers": changed(2, np.zeros(layers[1][2].shape, np.float16))}, "type"),
        ({"layers": changed(3, turn[:1])}, "along axis 0"),
        ({"layers": changed(5, -1)}, "window"),
        ({"layers": changed(6, factors[:1])}, "along axis 0"),
        ({"layers": changed(6, factors)}, "query factors"),
        ({"logits": out[:, 1:]}, "along axis 1"),
        ({"logits": out.astype(np.float64)}, "type"),
    ]
    for change, said in bad:
        with pytest.raises(ValueError, match=said):
            model.decoder._decoder.step(**{**good, **change})
    model.decoder._decoder.step(**good)
    assert np.array_equal(out, wanted)
    step.done()
    empty = np.zeros((0, NUM_IDS), np.float32)
    assert model.decoder.logits(np.zeros((0, WIDTH), np.float32)).shape == empty.shape
    with pytest.raises(ValueError, match="along axis 1"):
        model.decoder._decoder.logits(np.zeros((1, 64), np.float32), out[:1])


def test_parts_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    assert kernels is not None
    model = Model(rng)
    blocks = [layer.native for layer in model.layers]
    norm = mx.array(model.norm), 1e-5
    wide = NativeWeights(mx.zeros((NUM_IDS, 192), mx.float16))
    for table, some, given, head, said in (
        (wide, blocks, norm, model.table, "embedding do not fit"),
        (model.table, blocks, norm, wide, "the head does not fit"),
        (model.table, [], norm, model.table, "a decoder layer"),
        (model.table, blocks, (mx.ones(64), 1e-5), model.table, "along axis 0"),
        (model.table, blocks, (mx.array(model.norm), -1.0), model.table, "eps"),
    ):
        with pytest.raises(ValueError, match=said):
            NativeDecoder(table, some, given, head)
