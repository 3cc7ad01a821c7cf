"""ScalarCodec in float32, written once for NumPy and for MLX arrays.

The fast twin of scalar_reference.py: same formulas, same packed bytes (docs/codec.md); `xp` is the module.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.base import Array
from turboquant_kv.backends.portable.kit import ArrayKit
from turboquant_kv.codec.codebook import centroids, thresholds
from turboquant_kv.codec.codec import ScaleKind
from turboquant_kv.codec.scalar import ScalarCodec

FLOAT16_MAX = 65504.0
# The 8-bit thresholds are at least 0.016 apart and end below 5: cells of 1/128 up to 8 hold one at most.
GRID_STEPS = 128
GRID_EDGE = 8


@lru_cache
def unpacking_table(bits: int) -> npt.NDArray[np.float32]:
    """Centroids by packed word, (2^w, codes per word): bytes, or 12-bit words for 3 bits.

    Sized to stay in the first cache levels.
    """
    word_bits = 12 if bits == 3 else 8
    words = np.arange(1 << word_bits)
    digits = [(words >> (bits * j)) & ((1 << bits) - 1) for j in range(word_bits // bits)]
    return centroids(bits).astype(np.float32)[np.stack(digits, axis=-1)]


def table_indices(xp: Any, packed: Array, bits: int) -> Array:
    """Packed codes (..., n) uint8 to table rows: (..., n) uint8, or (..., n/3, 2) uint16 for 3 bits."""
    if bits != 3:
        return packed
    triple = packed.reshape(*packed.shape[:-1], -1, 3).astype(xp.uint16)
    low = triple[..., 0] | ((triple[..., 1] & 15) << 8)
    high = (triple[..., 1] >> 4) | (triple[..., 2] << 4)
    return xp.stack([low, high], axis=-1)


def pack(xp: Any, codes: Array, bits: int) -> Array:
    """Codes (..., D) to the little-endian bitstream of packing.py, (..., D*bits/8) uint8."""
    if bits == 8:
        return codes.astype(xp.uint8)
    per_group = 8 if bits == 3 else 8 // bits
    grouped = codes.astype(xp.uint32).reshape(*codes.shape[:-1], -1, per_group)
    word = grouped[..., 0]
    for j in range(1, per_group):
        word = word | (grouped[..., j] << (bits * j))
    if bits != 3:
        return word.astype(xp.uint8)
    split = xp.stack([word & 255, (word >> 8) & 255, word >> 16], axis=-1)
    return split.astype(xp.uint8).reshape(*codes.shape[:-1], -1)


@lru_cache
def search_grid(bits: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """A code to start from per grid cell of width 1/GRID_STEPS, and the thresholds closed by infinity.

    Cells are narrower than any two thresholds' distance, so one comparison finishes the search.
    """
    limits = np.append(thresholds(bits), np.float32(np.inf))
    cells = np.arange(2 * GRID_EDGE * GRID_STEPS) / GRID_STEPS - GRID_EDGE
    return np.searchsorted(limits, cells, side="left").astype(np.int32), limits


def nearest_code(xp: Any, y: Array, start_codes: Array, limits: Array) -> Array:
    """Index of the nearest centroid: limits[c - 1] < y <= limits[c]."""
    cell = xp.clip((y + GRID_EDGE) * GRID_STEPS, 0, 2 * GRID_EDGE * GRID_STEPS - 1).astype(xp.int32)
    code = start_codes[cell]
    return code + (y > limits[code]).astype(xp.int32)


def stored_scales(xp: Any, y: Array, energy: Array, scale: ScaleKind, c: Array) -> Array:
    """Float16 scales (...) that multiply decoded values c (..., D) to stand for y (..., D) of this energy |y|^2 (...).

    c: None will do for plain scales. The formulas are codec/scales.py's. Zero vectors get scale 0; magnitudes beyond
    float16 are clamped (arXiv 2504.19874 section 3; scales: docs/codec.md).
    """
    if scale == "plain":
        s = xp.sqrt(energy / y.shape[-1])
    else:
        c_energy, inner = (c * c).sum(axis=-1), (y * c).sum(axis=-1)
        safe_inner = xp.where(inner <= 0.0, 1.0, inner)
        s = {
            "norm": xp.sqrt(energy / c_energy),
            "least_squares": inner / c_energy,
            "unbiased": energy / safe_inner,
        }[scale]
    return xp.where(energy == 0.0, 0.0, xp.minimum(s, FLOAT16_MAX)).astype(xp.float16)


class ScalarKernels:
    """Implements kit.CodecKernels for ScalarCodec."""

    def __init__(self, kit: ArrayKit, codec: ScalarCodec) -> None:
        self._xp, self._codec = kit.xp, codec
        start_codes, limits = search_grid(codec.bits)
        self._search = kit.from_numpy(start_codes), kit.from_numpy(limits)
        self._book = kit.from_numpy(codec.table())
        self._look_up = kit.look_up(unpacking_table(codec.bits))

    def encode(self, y: Array) -> tuple[Array, Array]:
        xp = self._xp
        energy = (y * y).sum(axis=-1)
        rms = xp.sqrt(energy / y.shape[-1])
        codes = nearest_code(xp, y / xp.where(rms == 0.0, 1.0, rms)[..., None], *self._search)
        c = None if self._codec.scale == "plain" else self._book[codes]
        return pack(xp, codes, self._codec.bits), stored_scales(xp, y, energy, self._codec.scale, c)

    def decode(self, codes: Array, head_dim: int) -> Array:
        found = self._look_up(table_indices(self._xp, codes, self._codec.bits))
        return found.reshape(*codes.shape[:-1], head_dim)
