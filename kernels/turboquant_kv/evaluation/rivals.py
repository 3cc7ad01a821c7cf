"""What other programs do to keys and values, as caches that can be compared in the same table.

Each replaces every key and value, the newest included, by what its codes stand for: none has an exact window. They
store plain arrays in the model's dtype, so they save no memory; `bytes_for` is what their programs would take. Their
scales are counted as float16, which is what those programs keep beside 16-bit weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError, check_head_dim
from turboquant_kv.codec.reference import decode, encode
from turboquant_kv.codec.rotation import Which, rotation_matrix
from turboquant_kv.codec.scalar import ScalarCodec
from turboquant_kv.codec.scales import stored

Rows = npt.NDArray[np.float64]
RoundTrip = Callable[[Rows], Rows]
"""(..., D) to what its codes stand for."""


class Rival(ABC):
    """One way to store keys and values."""

    name: str
    description: str

    @abstractmethod
    def check(self, shape: LayerShape) -> None:
        """Raises UnsupportedFormatError for a layer that it cannot store."""

    @abstractmethod
    def new_cache(self, shape: LayerShape) -> Any:
        """An empty cache of one conversation in one such layer."""

    @abstractmethod
    def bytes_for(self, shape: LayerShape, num_tokens: int) -> int:
        """Bytes that its own program allocates for so many tokens in one such layer."""


class RoundTripCache(KVCache):  # type: ignore[misc]
    """mlx-lm's cache over keys and values that went through codes as they arrived."""

    def __init__(self, keys: RoundTrip, values: RoundTrip) -> None:
        super().__init__()
        self._keys, self._values = keys, values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys (1, H, T, D) and values (1, H, T, Dv); returns all decoded ones so far."""
        fetched: tuple[mx.array, mx.array] = super().update_and_fetch(
            _through(self._keys, keys), _through(self._values, values)
        )
        return fetched


def _through(round_trip: RoundTrip, x: mx.array) -> mx.array:
    return mx.array(round_trip(np.array(x.astype(mx.float32), np.float64)).astype(np.float32)).astype(x.dtype)


@dataclass(frozen=True)
class Rotated(Rival):
    """The paper's codec as others ship it: rotation, Lloyd-Max, one norm per vector, no mean, nothing exact."""

    fmt: KVFormat
    name: str
    description: str

    def check(self, shape: LayerShape) -> None:
        check_head_dim(shape.k_dim)
        check_head_dim(shape.v_dim)

    def new_cache(self, shape: LayerShape) -> RoundTripCache:
        k, v = (self._round_trip(side, dim) for side, dim in (("k", shape.k_dim), ("v", shape.v_dim)))
        return RoundTripCache(k, v)

    def _round_trip(self, side: str, dim: int) -> RoundTrip:
        which: Which = "k" if side == "k" else "v"
        codec = self.fmt.keys if side == "k" else self.fmt.values
        rotation = rotation_matrix(dim, self.fmt.rotation_seed, which)
        return lambda x: decode(encode(x, codec, rotation), codec, dim, rotation)

    def bytes_for(self, shape: LayerShape, num_tokens: int) -> int:
        return num_tokens * self.fmt.token_bytes(shape.num_kv_heads, shape.k_dim, shape.v_dim)


@dataclass(frozen=True)
class ProductForm(Rotated):
    """The paper's second algorithm for keys: bits - 1 of Lloyd-Max under the plain norm, then signs of S residual.

    Keys come back as the vector whose product with a query is the unbiased estimate. Values are Lloyd-Max alone.
    """

    def _round_trip(self, side: str, dim: int) -> RoundTrip:
        if side == "v":
            return super()._round_trip(side, dim)
        codec = ScalarCodec(self.fmt.k_bits - 1, "plain")
        rotation, sketch = rotation_matrix(dim, self.fmt.rotation_seed, "k"), _gaussian(dim)
        weight = np.sqrt(np.pi / 2) / dim  # of a Gaussian row s, E |<s, u>| is sqrt(2 / pi)

        def round_trip(x: Rows) -> Rows:
            coarse = decode(encode(x, codec, rotation), codec, dim, rotation)
            residual = x - coarse
            signs = np.where(residual @ sketch.T > 0, 1.0, -1.0)
            norms = stored(np.linalg.norm(residual, axis=-1)).astype(np.float64)
            return np.asarray(coarse + weight * norms[..., None] * (signs @ sketch))

        return round_trip

    def bytes_for(self, shape: LayerShape, num_tokens: int) -> int:
        """One more float16 per key than the same bits of Lloyd-Max."""
        return super().bytes_for(shape, num_tokens) + 2 * num_tokens * shape.num_kv_heads


@lru_cache
def _gaussian(dim: int) -> Rows:
    return np.random.default_rng(dim).standard_normal((dim, dim))


@dataclass(frozen=True)
class Affine(Rival):
    """mlx-lm's own quantised cache: an affine grid per group of coordinates, in MLX's own kernels."""

    bits: int
    group_size: int = 64

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"mlx-q{self.bits}"

    @property
    def description(self) -> str:  # type: ignore[override]
        return f"mlx-lm's affine {self.bits} bit, groups of {self.group_size}"

    def check(self, shape: LayerShape) -> None:
        for dim in (shape.k_dim, shape.v_dim):
            if dim % self.group_size:
                raise UnsupportedFormatError(f"head dimension {dim} has no groups of {self.group_size}")

    def new_cache(self, shape: LayerShape) -> Any:
        return QuantizedKVCache(self.group_size, self.bits)

    def bytes_for(self, shape: LayerShape, num_tokens: int) -> int:
        step: int = QuantizedKVCache.step
        dims = shape.k_dim + shape.v_dim
        token = shape.num_kv_heads * (dims * self.bits // 8 + 4 * dims // self.group_size)  # scale and bias, float16
        return -(-num_tokens // step) * step * token


@dataclass(frozen=True)
class Blocks(Rival):
    """llama.cpp's q8_0 and q4_0: blocks of 32 coordinates on a grid through zero, one float16 scale each."""

    bits: int
    block: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"q{self.bits}_0"

    @property
    def description(self) -> str:  # type: ignore[override]
        return f"blocks of {self.block} at {self.bits} bit, one float16 scale each"

    def check(self, shape: LayerShape) -> None:
        for dim in (shape.k_dim, shape.v_dim):
            if dim % self.block:
                raise UnsupportedFormatError(f"head dimension {dim} has no blocks of {self.block}")

    def new_cache(self, shape: LayerShape) -> RoundTripCache:
        return RoundTripCache(self.round_trip, self.round_trip)

    def round_trip(self, x: Rows) -> Rows:
        """(..., D): the scale is computed in full precision, stored as float16, and only decoding sees the stored one.

        At 8 bits the grid is symmetric; below, the coordinate of largest magnitude takes the end of the grid that has
        no counterpart, with its sign in the scale.
        """
        blocks = x.reshape(*x.shape[:-1], -1, self.block)
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
        most = 2 ** (self.bits - 1)
        scale = np.abs(extreme) / (most - 1) if self.bits == 8 else extreme / -most
        codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0))
        kept = np.clip(codes, -most, most - 1) * stored(scale).astype(np.float64)
        return np.asarray(kept.reshape(x.shape))

    def bytes_for(self, shape: LayerShape, num_tokens: int) -> int:
        dims = shape.k_dim + shape.v_dim
        return num_tokens * shape.num_kv_heads * (dims * self.bits // 8 + 2 * dims // self.block)


def standard_rivals() -> tuple[Rival, ...]:
    """Those that tables are made with."""
    return (
        Rotated(KVFormat(4, 4, scale="norm", centred=False), "r44", "rotation, Lloyd-Max 4/4, one norm, uncentred"),
        ProductForm(KVFormat(4, 4, scale="plain", centred=False), "prod44", "product form keys, Lloyd-Max values, 4/4"),
        Affine(4),
        Affine(8),
        Blocks(4),
        Blocks(8),
    )
