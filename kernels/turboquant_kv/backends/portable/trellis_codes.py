"""TrellisCodec in float32, written once for NumPy and for MLX arrays.

The fast twin of trellis_reference.py: same search, same packed bytes; `xp` is the module. All vectors and states of
one coordinate are a few array operations, so the search costs as many steps as a vector has coordinates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from turboquant_kv.backends.base import Array
from turboquant_kv.backends.portable.codes import stored_scales
from turboquant_kv.backends.portable.kit import ArrayKit
from turboquant_kv.codec.trellis import TrellisCodec
from turboquant_kv.codec.trellis_reference import BLOCK, NUM_STATES, subset

# State t is reached from t >> 1 and from (t >> 1) + 4, in both cases by branch t & 1.
_LOW = [t >> 1 for t in range(NUM_STATES)]
_HIGH = [(t >> 1) + NUM_STATES // 2 for t in range(NUM_STATES)]
_LOW_SUBSETS = [subset(s, t & 1) for t, s in enumerate(_LOW)]
_HIGH_SUBSETS = [subset(s, t & 1) for t, s in enumerate(_HIGH)]


class TrellisKernels:
    """Implements kit.CodecKernels for TrellisCodec."""

    def __init__(self, kit: ArrayKit, codec: TrellisCodec) -> None:
        self._xp, self._codec = kit.xp, codec
        book = codec.table()
        self._book = kit.from_numpy(book)
        self._look_up = kit.look_up(book[:, None])
        self._subsets = [book[s::4].astype(np.float64) for s in range(4)]

    def encode(self, y: Array) -> tuple[Array, Array]:
        xp = self._xp
        energy = (y * y).sum(axis=-1)
        rms = xp.sqrt(energy / y.shape[-1])
        found = self._search(y / xp.where(rms == 0.0, 1.0, rms)[..., None])
        c = None if self._codec.scale == "plain" else self._book[found]
        return _packed(xp, found, self._codec.bits), stored_scales(xp, y, energy, self._codec.scale, c)

    def decode(self, codes: Array, head_dim: int) -> Array:
        return self._look_up(_unpacked(self._xp, codes, self._codec.bits)).reshape(*codes.shape[:-1], head_dim)

    def _search(self, z: Array) -> Array:
        """Levels (..., D) int32 of z (..., D)."""
        xp, dim = self._xp, z.shape[-1]
        columns = z.reshape(-1, dim).T  # (D, N)
        nearest, errors = self._by_subset(columns)
        cost = xp.concatenate([xp.zeros((1, columns.shape[1])), xp.full((NUM_STATES - 1, columns.shape[1]), np.inf)])
        cost = cost.astype(xp.float32)
        low, high = xp.array(_LOW), xp.array(_HIGH)
        low_subsets, high_subsets = xp.array(_LOW_SUBSETS), xp.array(_HIGH_SUBSETS)
        from_high = []
        for i in range(dim):
            by_low, by_high = cost[low] + errors[i][low_subsets], cost[high] + errors[i][high_subsets]
            from_high.append(by_high < by_low)
            cost = xp.minimum(by_low, by_high)
        state = xp.argmin(cost, axis=0).astype(xp.int32)
        found: list[Any] = []
        for i in reversed(range(dim)):
            is_high = xp.take_along_axis(from_high[i], state[None], axis=0)[0].astype(xp.int32)
            before = (state >> 1) + NUM_STATES // 2 * is_high
            which = 2 * ((state & 1) ^ (before >> 1 & 1) ^ (before >> 2 & 1)) + (before & 1)
            found.append(xp.take_along_axis(nearest[i], which[None], axis=0)[0])
            state = before
        return xp.stack(found[::-1], axis=-1).reshape(z.shape)

    def _by_subset(self, z: Array) -> tuple[Array, Array]:
        """(D, 4, N): each subset's nearest level of z (D, N) and its squared error."""
        xp = self._xp
        levels, errors = [], []
        for s, values in enumerate(self._subsets):
            index = sum((z > float(np.float32(t))).astype(xp.int32) for t in (values[1:] + values[:-1]) / 2)
            levels.append(4 * index + s)
            errors.append((z - self._book[levels[-1]]) ** 2)
        return xp.stack(levels, axis=1), xp.stack(errors, axis=1)


def _packed(xp: Any, found: Array, bits: int) -> Array:
    """trellis_reference.pack of levels (..., D)."""
    dim = found.shape[-1]
    high = found >> 1 & 1
    branch: list[Any] = []
    zeros = xp.zeros_like(high[..., 0])
    for i in range(dim):
        back = [branch[i - k] if i >= k else zeros for k in (2, 3)]
        branch.append(high[..., i] ^ back[0] ^ back[1])
    planes = [_interleaved(xp, xp.stack(branch, axis=-1))]
    own = found >> 2
    if bits >= 3:
        four = (own & 3).reshape(*own.shape[:-1], -1, 4)
        planes.append(four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6)
    if bits != 3:
        planes.append(_interleaved(xp, own >> (bits - 2)))
    return xp.concatenate(planes, axis=-1).astype(xp.uint8)


def _interleaved(xp: Any, bits: Array) -> Array:
    """Zeros and ones (..., D) to bytes (..., D/8): coordinate k of a block of 16 in bit 2k, k + 8 in bit 2k + 1."""
    half = bits.reshape(*bits.shape[:-1], -1, 2, 2, 4)  # block, which eight, which four of them, one
    both = half[..., 0, :, :] | half[..., 1, :, :] << 1
    out = both[..., 0] | both[..., 1] << 2 | both[..., 2] << 4 | both[..., 3] << 6
    return out.reshape(*bits.shape[:-1], -1)


def _unpacked(xp: Any, codes: Array, bits: int) -> Array:
    """trellis_reference.unpack: levels (..., D) of packed codes."""
    plane = codes.shape[-1] // bits
    branch = _spread(xp, codes[..., :plane])
    padded = xp.concatenate([xp.zeros((*branch.shape[:-1], 3), branch.dtype), branch], axis=-1)
    own = xp.zeros_like(branch)
    if bits >= 3:
        rest = codes[..., plane : 3 * plane]
        own = xp.stack([rest & 3, rest >> 2 & 3, rest >> 4 & 3, rest >> 6], axis=-1).reshape(branch.shape)
    if bits != 3:
        own = own | _spread(xp, codes[..., -plane:]) << (bits - 2)
    high = branch ^ padded[..., 1:-2] ^ padded[..., :-3]
    return own << 2 | high << 1 | padded[..., 2:-1]


def _spread(xp: Any, packed: Array) -> Array:
    """The inverse of `_interleaved`."""
    bits = xp.stack([packed >> j & 1 for j in range(8)], axis=-1)
    halves = bits.reshape(*packed.shape[:-1], -1, BLOCK // 2, 2).swapaxes(-1, -2)
    return halves.reshape(*packed.shape[:-1], packed.shape[-1] * 8)
