"""The randomised Hadamard rotation: signs, Hadamard matrices of every supported size, fast transforms.

Convention. A vector x (D,) becomes y = R x with R = H diag(signs) / sqrt(D); for rows, y = x @ R.T and back
x = y @ R. H = kron(H_m, H_{2^k}) is a true Hadamard matrix of order D = m * 2^k, m in {1, 12, 20, 28}, so no head
dimension is padded. R is orthonormal: inner products and norms are those of x.

Nothing here depends on NumPy's random streams: stored pages stay readable across versions.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .limits import check_head_dim

Which = Literal["k", "v"]

Signs = NDArray[np.int8]


@cache
def signs(head_dim: int, seed: int, which: Which) -> Signs:
    """The +-1 (head_dim,) int8 that multiplies a key or value before the Hadamard matrix; read-only.

    Bit i, LSB first, of SHAKE-256("turboquant_kv rotation SEED WHICH HEAD_DIM"): 1 means -1.
    Raises UnsupportedFormatError for a head_dim without a rotation.
    """
    check_head_dim(head_dim)
    if which not in ("k", "v"):
        raise ValueError(f"which={which!r}: expected 'k' or 'v'")
    text = f"turboquant_kv rotation {seed} {which} {head_dim}"
    digest = np.frombuffer(hashlib.shake_256(text.encode()).digest(head_dim // 8), dtype=np.uint8)
    flips = np.unpackbits(digest, bitorder="little").astype(np.int8)
    return _frozen(1 - 2 * flips)


@cache
def hadamard(order: int) -> Signs:
    """H (order, order) int8 of +-1 with H H^T = order * I, for every supported head_dim; read-only.

    Raises UnsupportedFormatError.
    """
    check_head_dim(order)
    base, power = _factor(order)
    return _frozen(np.kron(_base_matrix(base), _sylvester(power)).astype(np.int8))


@cache
def hadamard_base(head_dim: int) -> Signs:
    """A (m, m) of H = kron(A, Sylvester), m in {1, 12, 20, 28}; read-only. Raises UnsupportedFormatError."""
    check_head_dim(head_dim)
    return _frozen(_base_matrix(_factor(head_dim)[0]))


@cache
def rotation_matrix(head_dim: int, seed: int, which: Which) -> NDArray[np.float32]:
    """R (head_dim, head_dim) float32, orthonormal: y = x @ R.T rotates rows, x = y @ R undoes it; read-only.

    Raises UnsupportedFormatError.
    """
    signed = hadamard(head_dim) * signs(head_dim, seed, which)
    matrix: NDArray[np.float32] = (signed / np.sqrt(head_dim)).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def rotate(x: NDArray[np.floating], seed: int, which: Which) -> NDArray[np.floating]:
    """x (..., D) -> x @ R.T in O(D log D), in x's dtype (float32 or float64). Raises UnsupportedFormatError."""
    head_dim = x.shape[-1]
    return _transform(x * signs(head_dim, seed, which).astype(x.dtype), transpose=False)


def unrotate(y: NDArray[np.floating], seed: int, which: Which) -> NDArray[np.floating]:
    """y (..., D) -> y @ R, the inverse of `rotate`, in y's dtype. Raises UnsupportedFormatError."""
    head_dim = y.shape[-1]
    signs_ = signs(head_dim, seed, which).astype(y.dtype)
    return _transform(y, transpose=True) * signs_


def _transform(x: NDArray[np.floating], transpose: bool) -> NDArray[np.floating]:
    """H x / sqrt(D), or H^T x / sqrt(D), over the last axis.

    kron(A, B) x = A X B^T for X = x as (m, 2^k) rows: a butterfly over the columns, then A over the rows.
    """
    head_dim = x.shape[-1]
    base, power = _factor(head_dim)
    folded = x.reshape(*x.shape[:-1], base, power)
    width = 1
    while width < power:
        pairs = folded.reshape(*folded.shape[:-1], -1, 2, width)  # (..., m, blocks, 2, width) of this round
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        folded = np.stack([low + high, low - high], axis=-2).reshape(*x.shape[:-1], base, power)
        width *= 2
    if base > 1:
        matrix = _base_matrix(base).astype(x.dtype)
        folded = (matrix.T if transpose else matrix) @ folded
    result: NDArray[np.floating] = folded.reshape(x.shape) * x.dtype.type(head_dim**-0.5)
    return result


def _factor(order: int) -> tuple[int, int]:
    """(m, 2^k) with m * 2^k = order and m in {1, 12, 20, 28}; `order` is a supported head_dim."""
    odd = order
    while odd % 2 == 0:
        odd //= 2
    base = 1 if odd == 1 else 4 * odd  # 3, 5, 7 -> 12, 20, 28: Hadamard orders above 2 are multiples of 4
    return base, order // base


def _base_matrix(order: int) -> Signs:
    """A Hadamard matrix of order 1, 12 = 11 + 1, 20 = 19 + 1 or 28 = 2 * (13 + 1)."""
    if order == 1:
        return _sylvester(1)
    return _paley_two(13) if order == 28 else _paley_one(order - 1)


def _sylvester(order: int) -> Signs:
    """H_{2n} = kron([[1, 1], [1, -1]], H_n)."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _paley_one(prime: int) -> Signs:
    """Order prime + 1 for prime = 3 mod 4: I + S, with S the skew conference matrix of quadratic residues."""
    conference = _bordered(prime)
    conference[1:, 0] = -1
    return conference + np.eye(prime + 1, dtype=np.int8)


def _paley_two(prime: int) -> Signs:
    """Order 2 (prime + 1) for prime = 1 mod 4: every entry of the symmetric conference matrix becomes a 2x2 block."""
    conference = _bordered(prime)
    off_diagonal = np.array([[1, 1], [1, -1]], np.int8)
    diagonal = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(conference, off_diagonal) + np.kron(np.eye(prime + 1, dtype=np.int8), diagonal)


def _bordered(prime: int) -> Signs:
    """(prime+1, prime+1): zero corner, ones along the border, and chi(i - j) inside (0 on the diagonal)."""
    chi = np.full(prime, -1, np.int8)
    chi[[i * i % prime for i in range(1, prime)]] = 1
    chi[0] = 0
    index = np.arange(prime)
    matrix = np.ones((prime + 1, prime + 1), np.int8)
    matrix[0, 0] = 0
    matrix[1:, 1:] = chi[(index[:, None] - index[None, :]) % prime]
    return matrix


def _frozen(matrix: Signs) -> Signs:
    matrix.setflags(write=False)
    return matrix
