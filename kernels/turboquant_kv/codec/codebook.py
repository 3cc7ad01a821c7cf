"""Lloyd-Max codebooks for a unit Gaussian coordinate, derived here rather than quoted.

A randomly rotated unit vector times sqrt(d) has coordinates that are almost N(0, 1) (paper,
section 3.1), so one Gaussian table per bit width serves every head dimension; it costs at most
0.43% distortion against the exact table of the sphere for d >= 64 at 2, 3 and 4 bits.

Owns the tables and their thresholds. Which vectors are quantised, and by what scale, is scalar_reference.py's.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .limits import CODEBOOK_BITS, UnsupportedFormatError

# Lloyd steps before Newton: from the starting guess alone Newton diverges at 8 bits, after ten steps it does not.
_SETTLING_STEPS = 20
# The last steps are rounding noise of up to 1e-12 at 8 bits; float32 resolves 3e-8.
_CONVERGED = 1e-11
_MAX_NEWTON_STEPS = 30

Vector = NDArray[np.float64]


@cache
def centroids(bits: int) -> NDArray[np.float32]:
    """The `2**bits` reconstruction values for a unit Gaussian, ascending and antisymmetric.

    Returns float32 (2**bits,), read-only and shared. Raises UnsupportedFormatError for other widths.
    """
    if bits not in CODEBOOK_BITS:
        raise UnsupportedFormatError(f"no codebook of {bits} bits; there are {', '.join(map(str, CODEBOOK_BITS))}")
    upper = _lloyd_max_upper_half(2**bits // 2).astype(np.float32)
    return _frozen(np.concatenate([-upper[::-1], upper]))


@cache
def thresholds(bits: int) -> NDArray[np.float32]:
    """Midpoints of neighbouring centroids; the code of y is the number of thresholds below y.

    Returns float32 (2**bits - 1,), read-only and shared; the middle one is exactly 0.
    Raises UnsupportedFormatError.
    """
    levels = centroids(bits).astype(np.float64)
    return _frozen(((levels[1:] + levels[:-1]) / 2).astype(np.float32))


def expected_distortion(bits: int, head_dim: int | None = None) -> float:
    """E ||x - x_hat||^2 / ||x||^2 of these tables under the plain scale and a uniformly random rotation.

    One coordinate of a rotated vector has density proportional to (1 - t^2/d)^((d-3)/2) on |t| < sqrt(d)
    (paper, lemma 1); `head_dim` None takes the Gaussian limit. Midpoint quadrature, relative error below 1e-6.
    """
    edge = 12.0 if head_dim is None else math.sqrt(head_dim)
    num_points = 400_000
    t = (np.arange(num_points) + 0.5) * (2 * edge / num_points) - edge
    log_density = -t * t / 2 if head_dim is None else (head_dim - 3) / 2 * np.log1p(-t * t / head_dim)
    weight = np.exp(log_density)
    error = t - centroids(bits).astype(np.float64)[np.searchsorted(thresholds(bits), t)]
    return float(weight @ error**2 / weight.sum())


def _lloyd_max_upper_half(num_levels: int) -> Vector:
    """Positive centroids (num_levels,) of the best symmetric quantiser with 2 * num_levels values.

    Optimality (Lloyd, Max): thresholds are midpoints, and each centroid is the mean of its cell,
    g_i = c_i P_i - F_i = 0, where P_i is the cell's probability and F_i its partial mean. Newton's method on g
    needs about ten steps where Lloyd's own iteration needs thousands at 8 bits.
    """
    c = _panter_dite_start(num_levels)
    for _ in range(_SETTLING_STEPS):
        probability, partial_mean, _ = _cells(c)
        c = partial_mean / probability
    for _ in range(_MAX_NEWTON_STEPS):
        step = _newton_step(c)
        c = c + step
        if np.max(np.abs(step)) < _CONVERGED:
            return c
    raise AssertionError(f"the codebook of {2 * num_levels} levels did not converge")


def _panter_dite_start(num_levels: int) -> Vector:
    """Many-level optimum: centroids with density pdf^(1/3), for a Gaussian one of standard deviation sqrt(3)."""
    quantile = NormalDist(sigma=math.sqrt(3)).inv_cdf
    return np.array([quantile(0.5 + (i + 0.5) / (2 * num_levels)) for i in range(num_levels)])


def _cells(c: Vector) -> tuple[Vector, Vector, Vector]:
    """(P, F, density at lower edges) of the cells [0, t_1), [t_1, t_2), ..., [t_{n-1}, inf), each (n,)."""
    lower = np.concatenate([[0.0], (c[1:] + c[:-1]) / 2])
    # erfc keeps relative precision in the tail, where 1 - erf would cancel.
    tail = np.array([math.erfc(t / math.sqrt(2)) / 2 for t in lower] + [0.0])
    density = np.append(np.exp(-lower * lower / 2) / math.sqrt(2 * math.pi), 0.0)
    return tail[:-1] - tail[1:], density[:-1] - density[1:], density[:-1]


def _newton_step(c: Vector) -> Vector:
    """-J^-1 g (n,); J is tridiagonal because a threshold moves half as far as each of its two neighbours."""
    probability, partial_mean, density = _cells(c)
    half_gap = (c[1:] - c[:-1]) / 2
    coupling = density[1:] * half_gap / 2  # -dg_i/dc_{i+1} = -dg_{i+1}/dc_i, from the shared threshold
    diagonal = probability - np.append(coupling, 0.0) - np.append(0.0, coupling)
    return _solve_tridiagonal(diagonal, -coupling, right=partial_mean - c * probability)


def _solve_tridiagonal(diagonal: Vector, off_diagonal: Vector, right: Vector) -> Vector:
    """x (n,) with A x = right for the symmetric tridiagonal A; off_diagonal is (n - 1,).

    Without pivoting: A is half the Hessian of the distortion, positive definite near its minimum.
    """
    pivots, solution = diagonal.copy(), right.copy()
    for i in range(1, len(right)):
        factor = off_diagonal[i - 1] / pivots[i - 1]
        pivots[i] -= factor * off_diagonal[i - 1]
        solution[i] -= factor * solution[i - 1]
    solution[-1] /= pivots[-1]
    for i in reversed(range(len(right) - 1)):
        solution[i] = (solution[i] - off_diagonal[i] * solution[i + 1]) / pivots[i]
    return solution


def _frozen(table: NDArray[np.float32]) -> NDArray[np.float32]:
    table.setflags(write=False)
    return table
