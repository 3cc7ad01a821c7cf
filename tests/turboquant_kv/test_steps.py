"""Steps of a batch: one decision for all rows and layers, and every row as if it were alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv.histories import as_float64, relative_error
from tests.turboquant_kv.test_sequence import SHAPES, held, same

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, LayerSource, TurboQuantKVCache
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.protocol import UnsupportedModelError
from turboquant_kv.cache.sequence import PagedSequence
from turboquant_kv.cache.step import Positions
from turboquant_kv.codec.format import KVFormat

BACKENDS = ("cpu-numpy", "cpu-native", "mlx-ops")
FMT = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
GROUP = 2


class Inputs(NamedTuple):
    """Keys, values and queries of one layer, (B, H, T, D)."""

    k: mx.array
    v: mx.array
    q: mx.array

    def row(self, b: int, num_new: int) -> Inputs:
        """One conversation's, without padding."""
        return Inputs(*(x[b : b + 1, :, :num_new] for x in self))


def draw(rng: np.random.Generator, shape: LayerShape, batch: int, num_new: int) -> Inputs:
    kv, q = shape.num_kv_heads, GROUP * shape.num_kv_heads
    dims = [(kv, shape.k_dim), (kv, shape.v_dim), (q, shape.k_dim)]
    return Inputs(*(mx.array(rng.standard_normal((batch, h, num_new, d)).astype(np.float32)) for h, d in dims))


def attended(cache: Any, x: Inputs) -> mx.array:
    cache.update_and_fetch(x.k, x.v)
    return cache.attend(x.q, scale=0.125, mask=None if x.q.shape[2] == 1 else "causal", sinks=None)  # type: ignore[no-any-return]


def close(got: mx.array, want: mx.array) -> bool:
    """Where products of many rows round otherwise than those of few: seldom a code is its neighbour.

    Among few tokens that was measured to cost up to 0.013; other rows or keys cost about 1.
    """
    return relative_error(got, as_float64(want)) < 5e-2


class Alone:
    """One conversation of the twin pool, in all layers."""

    def __init__(self, pool: PagePool, caches: list[TurboQuantKVCache] | None = None) -> None:
        shared = PagedSequence(pool, range(len(SHAPES)))
        self.caches = caches or [
            TurboQuantKVCache(LayerSource.of_pool(pool, i), shared.of_layer(i)) for i in range(len(SHAPES))
        ]

    def held(self) -> list[Any]:
        return held([cache.sequence for cache in self.caches if cache.sequence is not None])


class Refused(Exception):
    pass


class Batch:
    """A batch in one pool, and in another each of its conversations alone."""

    def __init__(self, backend: str, rng: np.random.Generator) -> None:
        self.rng = rng
        self.pool, self.twin = (PagePool(choose_backend(backend), SHAPES, FMT) for _ in range(2))
        self.sources = [LayerSource.of_pool(self.pool, i) for i in range(len(SHAPES))]
        self.layers = [BatchTurboQuantKVCache(source, []) for source in self.sources]
        self.rows: list[Alone] = []
        self.exactly = backend != "mlx-ops"

    def join(self, num_tokens: int) -> None:
        one, alone = Alone(self.pool), Alone(self.twin)
        for i, shape in enumerate(SHAPES):
            x = draw(self.rng, shape, 1, num_tokens)
            self.compare(attended(one.caches[i], x), attended(alone.caches[i], x))
        self.add(one, alone)

    def add(self, one: Alone, alone: Alone) -> None:
        for batch, cache in zip(self.layers, one.caches, strict=True):
            batch.extend(TurboQuantKVCache.merge([cache]))
        for cache in one.caches:
            cache.release()
        self.rows.append(alone)

    def fork(self, b: int) -> None:
        """A conversation once more, which from now on goes its own way."""
        one = Alone(self.pool, [batch.extract(b) for batch in self.layers])
        self.add(one, Alone(self.twin, [cache.fork() for cache in self.rows[b].caches]))

    def leave(self, b: int) -> None:
        kept = [i for i in self.rng.permutation(len(self.rows)) if i != b]
        for batch in self.layers:
            batch.filter(kept)
        for cache in self.rows[b].caches:
            cache.release()
        self.rows = [self.rows[i] for i in kept]

    def step(self, num_new: int = 1) -> None:
        """All rows get as many tokens."""
        for i, shape in enumerate(SHAPES):
            x = draw(self.rng, shape, len(self.rows), num_new)
            out = attended(self.layers[i], x)
            for b, row in enumerate(self.rows):
                self.compare(out[b : b + 1], attended(row.caches[i], x.row(b, num_new)))

    def padded(self, lengths: list[int], chunk: int) -> None:
        """Rows get different numbers of tokens, padded on the right, in chunks that some rows have no part in."""
        longest = max(lengths)
        for batch in self.layers:
            batch.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
        for start in range(0, longest, chunk):
            num_new = min(chunk, longest - start)
            for i, shape in enumerate(SHAPES):
                x = draw(self.rng, shape, len(self.rows), num_new)
                out = attended(self.layers[i], x)
                for b, row in enumerate(self.rows):
                    mine = max(0, min(num_new, lengths[b] - start))
                    if mine:
                        self.compare(out[b : b + 1, :, :mine], attended(row.caches[i], x.row(b, mine)))
        for batch in self.layers:
            batch.finalize()

    def fail(self, monkeypatch: pytest.MonkeyPatch, failing: int, verb: str) -> None:
        """A step that a middle layer's store refuses, once it has begun."""
        books = self.books()
        before = [held([batch.sequences[b] for batch in self.layers]) for b in range(len(self.rows))]  # type: ignore[misc]

        def refuse(*_: Any, **__: Any) -> None:
            raise Refused

        with monkeypatch.context() as patch:
            patch.setattr(self.pool.stores[failing], verb, refuse)
            with pytest.raises(Refused):
                for i, shape in enumerate(SHAPES):
                    mx.eval(attended(self.layers[i], draw(self.rng, shape, len(self.rows), 1)))
        assert self.books() == books
        for b, contents in enumerate(before):
            assert same(held([batch.sequences[b] for batch in self.layers]), contents)  # type: ignore[misc]

    def books(self) -> tuple[int, int, int, int]:
        self.pool.check_integrity()
        return self.pool.num_used, self.pool.exact_bytes, self.pool.num_exact_rows, self.pool.num_tokens

    def cut(self, num_tokens: int) -> None:
        num_tokens = min(num_tokens, *(row.caches[0].offset for row in self.rows))
        for batch in self.layers:
            assert batch.trim(num_tokens) == num_tokens
        for row in self.rows:
            for cache in row.caches:
                cache.trim(num_tokens)

    def compare(self, got: mx.array, want: mx.array) -> None:
        if self.exactly:
            assert np.array_equal(np.array(got), np.array(want))
        else:
            assert close(got, want)

    def check(self) -> None:
        self.pool.check_integrity()
        lengths = [row.caches[0].offset for row in self.rows]
        for batch in self.layers:
            assert batch.lengths == lengths
            assert batch.offset.tolist() == lengths
        for b, row in enumerate(self.rows):
            mine = [batch.sequences[b] for batch in self.layers]
            assert len({id(layer.shared) for layer in mine if layer is not None}) == 1
            if self.exactly:
                assert same(held(mine), row.held())  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_come_go_and_fork_are_as_if_alone(
    backend: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(backend, rng)
    for length in rng.integers(1, 80, 3):
        batch.join(int(length))
    for _ in range(40):
        num_rows = len(batch.rows)
        kind = rng.choice(["step", "step", "step", "chunk", "padded", "join", "fork", "leave", "fail", "cut", "trim"])
        if kind == "join" and num_rows < 8:
            batch.join(int(rng.integers(1, 60)))
        elif kind == "fork" and num_rows < 8:
            batch.fork(int(rng.integers(num_rows)))
        elif kind == "leave" and num_rows > 2:
            batch.leave(int(rng.integers(num_rows)))
        elif kind == "chunk":
            batch.step(int(rng.integers(2, 40)))
        elif kind == "padded":
            batch.padded([int(n) for n in rng.integers(1, 50, num_rows)], int(rng.integers(5, 60)))
        elif kind == "fail":
            verb = str(rng.choice(["append", "attend", "append_and_attend"]))
            batch.fail(monkeypatch, int(rng.integers(len(SHAPES))), verb)
        elif kind == "cut":
            batch.cut(int(rng.integers(1, 4)))
        elif kind == "trim":
            batch.pool.trim()
            assert batch.pool.exact.num_free == 0
        else:
            batch.step()
        batch.check()
    for layer in batch.layers:
        layer.release()
    assert batch.books() == (0, 0, 0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_close_their_pages_in_one_step(backend: str, rng: np.random.Generator) -> None:
    """A full tail becomes a page when its successor begins, for all rows at once."""
    batch = Batch(backend, rng)
    for pages in (1, 2, 1, 3):
        batch.join(FMT.sink_tokens + FMT.page_tokens * pages)
    before = batch.pool.num_used
    batch.step()
    assert batch.pool.num_used == before + 4
    batch.check()
    batch.step(FMT.page_tokens)
    batch.step(3 * FMT.page_tokens + 1)
    batch.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forks_are_written_by_both(backend: str, rng: np.random.Generator) -> None:
    batch = Batch(backend, rng)
    batch.join(30)
    rows = batch.pool.num_exact_rows
    for _ in range(3):
        batch.fork(0)
    assert batch.pool.num_exact_rows == rows, "shared until they are written"
    batch.step()
    sink, tail = FMT.sink_tokens, 30 - FMT.sink_tokens - FMT.page_tokens
    assert batch.pool.num_exact_rows == sink + 4 * (tail + 1), "the sink stays shared, each has a tail of its own"
    batch.check()


def test_no_chain_of_steps_is_kept(rng: np.random.Generator) -> None:
    """Positions on the device are added to, and asked for or not, those of earlier steps are let go."""
    for asks in (True, False):
        positions = Positions([3, 70])
        for step in range(2000):
            positions = positions.advanced(1, None)
            if asks and step % 7 == 0:
                mx.eval(positions.array)
        assert positions.array.tolist() == [2003, 2070] == list(positions.lengths)
        assert positions.advanced(5, [5, 0]).array.tolist() == [2008, 2070]


def test_a_dropped_batch_gives_everything_back(rng: np.random.Generator) -> None:
    """Without the collector: no step and no positions hold on to conversations."""
    batch = Batch("cpu-numpy", rng)
    batch.join(20)
    batch.join(50)
    batch.step()
    pool = batch.pool
    del batch
    assert (pool.num_used, pool.exact_bytes) == (0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [0, 1])
def test_conversations_of_different_layers_step_together(backend: str, first: int, rng: np.random.Generator) -> None:
    """One has all layers under one numbering, the other is another conversation in each of them."""
    pool, twin = (PagePool(choose_backend(backend), SHAPES, FMT) for _ in range(2))
    sources = [LayerSource.of_pool(pool, i) for i in range(len(SHAPES))]
    whole, alone = Alone(pool), [Alone(twin), Alone(twin)]
    apart = [TurboQuantKVCache(source) for source in sources]
    order = [0, 1] if first == 0 else [1, 0]
    for i, shape in enumerate(SHAPES):
        for cache, twin_row, n in ((whole.caches[i], alone[0], 30), (apart[i], alone[1], 24)):
            x = draw(rng, shape, 1, n)
            attended(cache, x)
            attended(twin_row.caches[i], x)
    layers = []
    for i in range(len(SHAPES)):
        pair = [whole.caches[i], apart[i]]
        layers.append(TurboQuantKVCache.merge([pair[j] for j in order]))
    for num_new in (1, 5, 40, 1):
        for i, shape in enumerate(SHAPES):
            x = draw(rng, shape, 2, num_new)
            lengths = [alone[j].caches[i].offset for j in order]
            assert layers[i].offset.tolist() == lengths
            out = attended(layers[i], x)
            assert layers[i].offset.tolist() == [n + num_new for n in lengths]
            for b, j in enumerate(order):
                want = attended(alone[j].caches[i], x.row(b, num_new))
                assert close(out[b : b + 1], want)
        pool.check_integrity()
    whole_batch = [layer.sequences[order.index(0)] for layer in layers]
    assert same(held(whole_batch), alone[0].held()) or backend == "mlx-ops"  # type: ignore[arg-type]

    x = draw(rng, SHAPES[0], 2, 2)
    attended(layers[0], x)
    with pytest.raises(UnsupportedModelError, match="different tokens"):
        attended(layers[1], draw(rng, SHAPES[1], 2, 3))
    with pytest.raises(UnsupportedModelError, match="different tokens"):
        attended(layers[0], x)
    for layer in layers:
        layer.release()
    for cache in (*whole.caches, *apart):
        cache.release()
    assert (pool.num_used, pool.exact_bytes) == (0, 0)
    pool.check_integrity()
