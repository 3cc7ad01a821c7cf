"""Random keys and values, and the caches that hold them, for the tests of caches and backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from turboquant_kv.backends.base import (
    Array,
    AttentionCall,
    Backend,
    ExactBuffers,
    ExactRows,
    LayerStore,
    Means,
    PageWrites,
    SequenceView,
    StepRows,
)
from turboquant_kv.backends.gpu.store import GpuStore
from turboquant_kv.cache.layer_cache import LayerSource, TurboQuantKVCache
from turboquant_kv.codec import trellis_reference
from turboquant_kv.codec.codebook import thresholds
from turboquant_kv.codec.codec import Codec
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.reference import attend, turning_means
from turboquant_kv.codec.rotary import Rotary
from turboquant_kv.codec.rotation import rotation_matrix
from turboquant_kv.codec.scalar import ScalarCodec
from turboquant_kv.codec.scalar_reference import quantise
from turboquant_kv.codec.scales import fitted_scale, unit_variance
from turboquant_kv.codec.trellis import TrellisCodec

Floats = npt.NDArray[np.float64]

# What float32 may do to a coordinate of unit variance, or to a scale in proportion, generously: 512 roundings of 6e-8
# add up to 1.4e-6 at random.
ROUNDING = 5e-6


@dataclass
class History:
    """Full keys and values of one conversation, k (Hkv, N, D) and v (Hkv, N, Dv), as the model's dtype holds them."""

    k: Floats
    v: Floats
    dtype: Any

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        num_heads: int,
        num_tokens: int,
        k_dim: int,
        v_dim: int | None = None,
        dtype: Any = mx.float32,
    ) -> History:
        """Gaussian with an offset per head and channel, so that centring matters."""

        def draw(dim: int) -> Floats:
            offset = rng.standard_normal((num_heads, 1, dim))
            return rounded(rng.standard_normal((num_heads, num_tokens, dim)) + offset, dtype)

        return cls(draw(k_dim), draw(v_dim or k_dim), dtype)

    @property
    def num_tokens(self) -> int:
        return int(self.k.shape[1])

    def slice(self, start: int, stop: int) -> tuple[mx.array, mx.array]:
        """Keys and values (1, H, T, D) as a model would hand them over."""
        k, v = (mx.array(a[None, :, start:stop].astype(np.float32)).astype(self.dtype) for a in (self.k, self.v))
        return k, v

    def means(self, rng: np.random.Generator, rotary: Rotary | None = None) -> Means:
        """Roughly the right means: calibration never sees the text it will serve.

        rotary: keys get a bias of ten times their length that turns with their position, and the mean is that bias.
        """
        k, v = (
            (a.mean(axis=1) + 0.1 * rng.standard_normal(a[:, 0].shape)).astype(np.float32) for a in (self.k, self.v)
        )
        if rotary is None:
            return Means(k, v)
        bias = 10 * rng.standard_normal(k.shape)
        self.k[:] = rounded(self.k + rotary.turned(bias[:, None], np.arange(self.num_tokens)[None]), self.dtype)
        return Means((bias + 0.1 * rng.standard_normal(k.shape)).astype(np.float32), v, rotary)

    def steady(self, rng: np.random.Generator, fmt: KVFormat, means: Means | None = None) -> History:
        """Move every vector, by a tenth, whose codes or scale hang on rounding; returns the history itself.

        A coordinate within ROUNDING of a threshold may get the neighbour of the reference's code: about one in 1e5,
        which is one test in many, and then a single output may move by a percent. A tolerance wide enough for that
        would let real errors pass, so tests that compare two computations of the same codes have none to move.
        """
        for x, which, codec, mean in (
            (self.k, "k", fmt.keys, None if means is None else key_means(means, fmt, self.num_tokens)),
            (self.v, "v", fmt.values, None if means is None else means.v[:, None]),
        ):
            rotation = rotation_matrix(x.shape[-1], fmt.rotation_seed, "k" if which == "k" else "v")
            centre = np.broadcast_to(0.0 if mean is None or not fmt.centred else mean, x.shape)
            shaky = np.nonzero(np.ones(x.shape[:-1], bool))  # only what was moved needs another look
            while len(shaky[0]):
                hangs = hangs_on_rounding((x[shaky] - centre[shaky]) @ rotation.T.astype(np.float64), codec, rng)
                shaky = tuple(places[hangs] for places in shaky)
                x[shaky] = rounded(x[shaky] + 0.1 * rng.standard_normal(x[shaky].shape), self.dtype)
        return self


def key_means(means: Means, fmt: KVFormat, num_keys: int) -> Floats:
    """What keys are centred by, as the reference says: (H, num_keys or 1, D)."""
    if means.rotary is None:
        return means.k[:, None].astype(np.float64)
    return turning_means(means.k, means.rotary, fmt, num_keys)


def hangs_on_rounding(y: Floats, codec: Codec, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which rotated vectors y (..., D) have codes, or a scale between two float16 values, that rounding may change."""
    z, rms = unit_variance(y)
    table = codec.table().astype(np.float64)
    if isinstance(codec, TrellisCodec):
        # A path that another one nearly equals loses to it when the vector is moved one way or the opposite one.
        moved = 4 * ROUNDING * rng.standard_normal(z.shape)
        found, *tries = trellis_reference.search(np.stack([z, z + moved, z - moved]), table)
        by_edge = np.any([(found != other).any(-1) for other in tries], axis=0)
        decoded = table[found]
    else:
        assert isinstance(codec, ScalarCodec)
        edges = thresholds(codec.bits).astype(np.float64)
        above = np.searchsorted(edges, z)
        nearest = np.minimum(
            np.abs(z - edges[np.maximum(above - 1, 0)]), np.abs(z - edges[np.minimum(above, len(edges) - 1)])
        )
        by_edge = (nearest < ROUNDING).any(-1)
        decoded = table[quantise(z, codec.bits)]
    scale = rms * fitted_scale(z, decoded, codec.scale)
    split = (scale * (1 - ROUNDING)).astype(np.float16) != (scale * (1 + ROUNDING)).astype(np.float16)
    shaky: npt.NDArray[np.bool_] = by_edge | split
    return shaky


def random_rotary(rng: np.random.Generator, dim: int) -> Rotary:
    """RoPE of either layout over all of `dim` or three quarters of it, frequencies from 1 downwards, some scaled."""
    num_pairs = int(rng.choice([dim // 2, dim * 3 // 8]))
    frequencies = 10000.0 ** (-np.arange(num_pairs) / num_pairs) / float(rng.choice([1.0, 4.0]))
    stride, gap = (1, num_pairs) if rng.random() < 0.5 else (2, 1)
    return Rotary(frequencies, stride, gap, float(rng.choice([1.0, 1.2])))


def rounded(x: Floats, dtype: Any) -> Floats:
    return np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32), np.float64)


def random_queries(rng: np.random.Generator, num_q_heads: int, num_rows: int, dim: int, dtype: Any) -> mx.array:
    """(1, Hq, T, D)."""
    return mx.array(rng.standard_normal((1, num_q_heads, num_rows, dim)).astype(np.float32)).astype(dtype)


def as_float64(x: mx.array) -> Floats:
    return np.array(x.astype(mx.float32), np.float64)


def expected(
    history: History, q: mx.array, fmt: KVFormat, q_start: int, scale: float, means: Means | None, **options: Any
) -> Floats:
    """What the reference says these queries (1, Hq, T, D) get at q_start: (1, Hq, T, Dv)."""
    k_mean: Any = None if means is None else means.k
    v_mean = None if means is None else means.v
    if means is not None and means.rotary is not None:
        k_mean = key_means(means, fmt, history.num_tokens)
    out = attend(as_float64(q)[0], history.k, history.v, fmt, q_start, scale, k_mean, v_mean, **options)
    return out[None]


def relative_error(x: mx.array, reference: Floats) -> float:
    """Root-mean-square error over root-mean-square of the reference."""
    return float(np.linalg.norm(as_float64(x) - reference) / np.linalg.norm(reference))


def encode_pages(store: LayerStore, page_ids: Sequence[int] | Any, first_page: int, k: Array, v: Array) -> None:
    """Write pages first_page, ... of a conversation; k (H, P*page, D) and v (H, P*page, Dv) as the backend has them."""
    store.encode(PageWrites.following(np.asarray(page_ids), first_page, store.fmt.page_tokens), k, v)


def call_over(
    backend: Backend,
    q: mx.array,
    views: Sequence[SequenceView],
    exact: Sequence[Array],
    scale: float,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
) -> AttentionCall:
    """Queries (B, Hq, T, D) over views whose exact rows lie in sink keys and values, window keys and values."""
    return AttentionCall(q, backend.prepare_step(StepRows(views, q.shape[2])), ExactBuffers(*exact), scale, mask, sinks)


def new_cache(fmt: KVFormat, backend: str, means: Means | None = None) -> TurboQuantKVCache:
    return TurboQuantKVCache(LayerSource(fmt, backend, means))


def feed(
    cache: TurboQuantKVCache, history: History, start: int, stop: int, q: mx.array, scale: float, **options: Any
) -> mx.array:
    """One model step: append tokens start..stop and attend with queries (1, Hq, stop-start, D)."""
    cache.update_and_fetch(*history.slice(start, stop))
    mask = options.pop("mask", None if stop - start == 1 else "causal")
    return cache.attend(q, scale=scale, mask=mask, sinks=options.pop("sinks", None), **options)


def check_balanced_decode(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    fmt: KVFormat,
    num_q_heads: int,
    dims: tuple[int, int],
    dtype: Any,
    turns: bool,
    tolerance: float,
) -> None:
    """Decode steps of two conversations whose keys are balanced, two KV heads, one of a page's end within them.

    The kernel's multiplication gives the very outputs and exact rows that MLX's before the launch does.
    """
    factors = np.exp(rng.uniform(-1.5, 1.5, (2, dims[0])))
    lengths = [fmt.page_start(1) - 2, int(rng.integers(1, fmt.page_start(2)))]
    drawn = History.random(rng, 2, max(lengths) + 3, *dims, dtype)
    means = drawn.means(rng, random_rotary(rng, dims[0]) if turns else None)
    given = History(rounded(drawn.k / factors[:, None], dtype), drawn.v, dtype)
    held = History(rounded(given.k * rounded(factors, dtype)[:, None], dtype), drawn.v, dtype)
    queries = [mx.concatenate([random_queries(rng, num_q_heads, 1, dims[0], dtype) for _ in lengths]) for _ in range(3)]

    def decoded() -> tuple[list[mx.array], ExactRows]:
        source = new_cache(fmt, "gpu", replace(means, key_factors=factors.astype(np.float32))).source
        rows = [TurboQuantKVCache(source) for _ in lengths]
        for row, n in zip(rows, lengths, strict=True):
            row.append(*given.slice(0, n))
        batch, outputs = TurboQuantKVCache.merge(rows), []
        for i, q in enumerate(queries):
            news = [given.slice(n + i, n + i + 1) for n in lengths]
            batch.update_and_fetch(*(mx.concatenate(list(side)) for side in zip(*news, strict=True)))
            outputs.append(batch.attend(q, scale=0.1, mask=None, sinks=None))
        assert source.pool is not None
        return outputs, source.pool.stores[0].get_rows(0, source.pool.exact.num_rows)

    by_kernel, rows = decoded()
    with monkeypatch.context() as patched:
        patched.setattr(GpuStore, "balances", lambda *_: False)
        by_operations, known_rows = decoded()
    for out, known in zip((*by_kernel, *rows), (*by_operations, *known_rows), strict=True):
        assert mx.array_equal(out, known)
    inverse: Floats = np.repeat(rounded(1 / factors, dtype), num_q_heads // 2, axis=0)[:, None]
    for i, (out, q) in enumerate(zip(by_kernel, queries, strict=True)):
        divided = mx.array((as_float64(q) * inverse).astype(np.float32)).astype(dtype)
        for b, n in enumerate(lengths):
            seen = History(held.k[:, : n + i + 1], held.v[:, : n + i + 1], dtype)
            want = expected(seen, divided[b : b + 1], fmt, n + i, 0.1, means)
            assert relative_error(out[b : b + 1], want) < tolerance


def random_cuts(rng: np.random.Generator, num_tokens: int, num_chunks: int) -> list[int]:
    """0 = first < ... < last = num_tokens."""
    inner = rng.choice(np.arange(1, num_tokens), size=min(num_chunks - 1, num_tokens - 1), replace=False)
    return [0, *sorted(int(c) for c in inner), num_tokens]


def in_tiles(rows: mx.array, tile: int) -> mx.array:
    """Histories (H, columns, D) as src/history.h lays out tiles of so many columns, (H * places, D); of 1: as rows."""
    if tile == 1:
        return rows.reshape(-1, rows.shape[2])
    num_heads, num_columns, dim = rows.shape
    num_tiles = -(-num_columns // tile)
    filled = np.zeros((num_heads, num_tiles * tile, dim), np.float32)
    filled[:, :num_columns] = np.array(rows.astype(mx.float32))
    pieces = filled.reshape(num_heads, num_tiles, tile, dim // 64, 8, 8)  # of eight dims each
    out = np.zeros((num_heads, num_tiles, dim // 64, tile, 8, 8), np.float32)
    for column in range(tile):
        for piece in range(8):
            out[:, :, :, column, piece ^ (column & 7)] = pieces[:, :, column, :, piece]
    return mx.array(out.reshape(-1, dim)).astype(rows.dtype)
