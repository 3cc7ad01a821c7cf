"""The plain meaning of TrellisCodec in float64: convolutional code, Viterbi search, packing, and its codebook.

Trellis-coded quantisation (Marcellin and Fischer, IEEE Trans. Commun. 38, 1990) with Ungerboeck's 8-state code: a
codebook of twice as many levels as the bits allow is split by level modulo 4 into subsets; which subset coordinate i
may use is told by its branch bit b[i] and the three before it,

    level[i] = 4 * own[i] + 2 * (b[i] ^ b[i-2] ^ b[i-3]) + b[i-1]        b[-1] = b[-2] = b[-3] = 0

so a vector stores one branch bit and bits - 1 own bits a coordinate, and every coordinate is decoded from its own bits
and three neighbours. More states gain little: 64 take 2 to 3% off the distortion of 8.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .codec import Encoded, ScaleKind
from .limits import UnsupportedFormatError
from .scales import Float64, fitted_scale, stored, unit_variance

NUM_STATES = 8
"""A state is the last three branch bits, the newest in bit 0."""
BLOCK = 16
"""Coordinates whose bits lie together in the packed form."""

Levels = NDArray[np.uint8]


def subset(state: int, branch: int) -> int:
    """Which levels modulo 4 a coordinate may use: 0 to 3."""
    return 2 * (branch ^ (state >> 1 & 1) ^ (state >> 2 & 1)) + (state & 1)


@cache
def levels(bits: int) -> NDArray[np.float32]:
    """The 2**(bits + 1) levels of a unit Gaussian coordinate, ascending and antisymmetric, float32, read-only.

    Tuned by `tune` on Gaussian vectors: each is the mean of what the search sends to it. Written down, because what
    the codes of a stored cache mean may not depend on a search. Raises UnsupportedFormatError.
    """
    if bits not in _UPPER_LEVELS:
        raise UnsupportedFormatError(f"no trellis of {bits} bits; there are {', '.join(map(str, _UPPER_LEVELS))}")
    upper = np.array(_UPPER_LEVELS[bits], np.float32)
    both = np.concatenate([-upper[::-1], upper])
    both.setflags(write=False)
    return both


_UPPER_LEVELS = {
    2: (0.1906, 0.6034, 1.0669, 1.8530),
    3: (0.1063, 0.3031, 0.5286, 0.7569, 1.0218, 1.3340, 1.7704, 2.4455),
    4: (
        *(0.0655, 0.1931, 0.3257, 0.4536, 0.5907, 0.7220, 0.8646, 1.0055),
        *(1.1577, 1.3146, 1.4883, 1.6834, 1.9106, 2.1890, 2.5531, 3.1072),
    ),
}


def search(z: Float64, book: NDArray[np.floating]) -> Levels:
    """Levels (..., D) uint8 of the path of least squared error for z (..., D); Viterbi's algorithm.

    Of two paths into a state that cost the same the one from the lower state is taken, of last states the lowest.
    """
    columns = np.ascontiguousarray(z.reshape(-1, z.shape[-1]).T)
    dim, num_vectors = columns.shape
    nearest, errors = _by_subset(columns, np.asarray(book, np.float64))
    cost = np.full((NUM_STATES, num_vectors), np.inf)
    cost[0] = 0.0
    came_from = np.zeros((dim, NUM_STATES, num_vectors), np.uint8)
    for i in range(dim):
        following = np.empty_like(cost)
        for target in range(NUM_STATES):
            branch, lower = target & 1, target >> 1  # the oldest bit falls out: two states lead to each
            higher = lower + NUM_STATES // 2
            by_lower = cost[lower] + errors[i, subset(lower, branch)]
            by_higher = cost[higher] + errors[i, subset(higher, branch)]
            came_from[i, target] = np.where(by_higher < by_lower, higher, lower)
            following[target] = np.minimum(by_lower, by_higher)
        cost = following
    found = np.zeros((dim, num_vectors), np.uint8)
    vectors, state = np.arange(num_vectors), cost.argmin(axis=0)
    for i in reversed(range(dim)):
        before = came_from[i, state, vectors].astype(np.int64)
        which = 2 * ((state & 1) ^ (before >> 1 & 1) ^ (before >> 2 & 1)) + (before & 1)
        found[i] = nearest[i, which, vectors]
        state = before
    return np.ascontiguousarray(found.T).reshape(z.shape)


def _by_subset(columns: Float64, book: Float64) -> tuple[Levels, Float64]:
    """(D, 4, N) of (D, N): each subset's nearest level, the lower one half-way between two, and its squared error."""
    dim, num_vectors = columns.shape
    nearest, errors = np.empty((dim, 4, num_vectors), np.uint8), np.empty((dim, 4, num_vectors))
    for s in range(4):
        values = book[s::4]
        index = np.searchsorted((values[1:] + values[:-1]) / 2, columns, side="left")
        nearest[:, s] = 4 * index + s
        errors[:, s] = (columns - values[index]) ** 2
    return nearest, errors


def branch_bits(found: Levels) -> Levels:
    """The branch bits (..., D) of levels that `search` found: level bit 1 is b[i] ^ b[i-2] ^ b[i-3]."""
    bits = np.zeros((*found.shape[:-1], found.shape[-1] + 3), np.uint8)  # three zeros first
    for i in range(found.shape[-1]):
        bits[..., i + 3] = (found[..., i] >> 1 & 1) ^ bits[..., i + 1] ^ bits[..., i]
    return bits[..., 3:]


def pack(found: Levels, bits: int) -> NDArray[np.uint8]:
    """Levels (..., D), D a multiple of 16, to bytes (..., D*bits/8): a plane of branch bits, then one of own bits.

    Both in blocks of 16 coordinates. One bit a coordinate: a little-endian uint16 with coordinate k of the block in
    bit 2k, coordinate k + 8 in bit 2k + 1 (k < 8), so that a mask spreads eight of them to every other bit. Two own
    bits: a little-endian uint32 with coordinate k in bits 2k and 2k + 1. Three: a plane of the lower two, then one of
    the highest.
    """
    planes = [_interleaved(branch_bits(found))]
    own = (found >> 2).astype(np.uint8)
    if bits >= 3:
        pairs = np.stack([own & 1, own >> 1 & 1], axis=-1).reshape(*own.shape[:-1], -1)
        planes.append(np.packbits(pairs, axis=-1, bitorder="little"))
    if bits != 3:
        planes.append(_interleaved((own >> (bits - 2)).astype(np.uint8)))
    return np.concatenate(planes, axis=-1)


def unpack(packed: NDArray[np.uint8], bits: int, head_dim: int) -> Levels:
    """The inverse of `pack`: levels (..., head_dim). Raises ValueError when the last axis has another length."""
    if packed.dtype != np.uint8 or packed.shape[-1] * 8 != head_dim * bits or head_dim % BLOCK:
        raise ValueError(f"{packed.shape[-1]} bytes do not hold exactly {head_dim} trellis codes of {bits} bits")
    plane = head_dim // 8
    branch = np.zeros((*packed.shape[:-1], head_dim + 3), np.uint8)
    branch[..., 3:] = _spread(packed[..., :plane])
    own = np.zeros_like(branch[..., 3:])
    if bits >= 3:
        stream = np.unpackbits(packed[..., plane : 3 * plane], axis=-1, bitorder="little")
        own |= stream[..., 0::2] | stream[..., 1::2] << 1
    if bits != 3:
        own |= _spread(packed[..., -plane:]) << (bits - 2)
    high = branch[..., 3:] ^ branch[..., 1:-2] ^ branch[..., :-3]
    return (own << 2 | high << 1 | branch[..., 2:-1]).astype(np.uint8)


def _interleaved(bits: Levels) -> NDArray[np.uint8]:
    """(..., D) zeros and ones to (..., D/8)."""
    blocks = bits.reshape(*bits.shape[:-1], -1, 2, BLOCK // 2).swapaxes(-1, -2)
    return np.packbits(blocks.reshape(bits.shape), axis=-1, bitorder="little")


def _spread(packed: NDArray[np.uint8]) -> Levels:
    bits = np.unpackbits(np.ascontiguousarray(packed), axis=-1, bitorder="little")
    return bits.reshape(*bits.shape[:-1], -1, BLOCK // 2, 2).swapaxes(-1, -2).reshape(bits.shape)


def encode(y: Float64, bits: int, scale: ScaleKind) -> Encoded:
    """Packed codes and scales of rotated vectors y (..., D); see Codec.encode.

    As the scalar codec: divided by the root mean square, searched, and one fitted scale multiplies the levels back.
    """
    z, rms = unit_variance(y)
    found = search(np.where(np.isfinite(z), z, 0.0), levels(bits))
    chosen = levels(bits).astype(np.float64)[found]
    return Encoded(pack(found, bits), stored(rms * fitted_scale(z, chosen, scale)))


def decode(packed: NDArray[np.uint8], bits: int, head_dim: int) -> Float64:
    """Unscaled levels (..., head_dim) of packed codes. Raises ValueError when the last axis has another length."""
    return levels(bits).astype(np.float64)[unpack(packed, bits, head_dim)]


def tune(bits: int, z: Float64, rounds: int = 30) -> Float64:
    """Levels (2**(bits + 1),) that make the search's squared error on z (N, D) small: Lloyd's iteration.

    Begins with equal steps; each round moves every level to the mean of what the search sent to it, symmetrically.
    """
    count = 2 ** (bits + 1)
    book: Float64 = (np.arange(count) - (count - 1) / 2) * (6.0 / count)
    for _ in range(rounds):
        found = search(z, book)
        sums, hits = np.bincount(found.ravel(), z.ravel(), count), np.bincount(found.ravel(), minlength=count)
        means = np.where(hits > 0, sums / np.maximum(hits, 1), book)
        book = (means - means[::-1]) / 2
    return book
