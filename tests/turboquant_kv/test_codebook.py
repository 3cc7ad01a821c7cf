"""The Lloyd-Max tables: derivation, published values, and their distortion in closed form."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from turboquant_kv.codec.codebook import centroids, expected_distortion, thresholds
from turboquant_kv.codec.limits import CODEBOOK_BITS, SUPPORTED_BITS, UnsupportedFormatError

# Positive halves for the unit Gaussian (Max 1960, table I, to the five digits of a converged derivation).
# The d = 128 tables of the sphere marginal are another thing and checked below.
GAUSSIAN_CENTROIDS = {
    1: [0.79788],
    2: [0.45278, 1.51042],
    3: [0.24509, 0.75601, 1.34391, 2.15195],
    4: [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259],
}
SPHERE_128_CENTROIDS = {
    2: [0.45245, 1.50519],
    3: [0.24442, 0.75333, 1.33660, 2.13147],
    4: [0.12787, 0.38638, 0.65362, 0.93710, 1.24777, 1.60434, 2.04593, 2.68886],
}
# Least distortion of any scalar table on the sphere marginal; None is the Gaussian limit.
OPTIMAL_DISTORTION = {
    64: (0.11453, 0.033391, 0.0091315),
    80: (0.11511, 0.033620, 0.0092045),
    96: (0.11551, 0.033773, 0.0092534),
    128: (0.11600, 0.033966, 0.0093148),
    256: (0.11674, 0.034256, 0.0094075),
    None: (0.11748, 0.034548, 0.0095010),
}


@pytest.mark.parametrize("bits", GAUSSIAN_CENTROIDS)
def test_centroids_are_the_published_gaussian_ones(bits: int) -> None:
    assert np.allclose(centroids(bits)[2 ** (bits - 1) :], GAUSSIAN_CENTROIDS[bits], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", SPHERE_128_CENTROIDS)
def test_gaussian_table_is_close_to_the_sphere_table(bits: int) -> None:
    sphere = lloyd_on_sphere(bits, head_dim=128)
    assert np.allclose(sphere[2 ** (bits - 1) :], SPHERE_128_CENTROIDS[bits], rtol=0, atol=1e-4)
    assert np.max(np.abs(centroids(bits) - sphere)) < 0.05


def lloyd_on_sphere(bits: int, head_dim: int) -> np.ndarray:
    """Lloyd's plain iteration on a fine grid of the sphere marginal: another derivation, for another density."""
    step = 2 * math.sqrt(head_dim) / 200_000
    grid = (np.arange(200_000) + 0.5) * step - math.sqrt(head_dim)
    weight = (1 - grid * grid / head_dim) ** ((head_dim - 3) / 2)
    mass, moment = (np.concatenate([[0.0], np.cumsum(a)]) for a in (weight, weight * grid))
    levels = centroids(bits).astype(np.float64)
    edges = np.append(grid - step / 2, grid[-1] + step / 2)
    for _ in range(400):
        inner = (levels[1:] + levels[:-1]) / 2
        ends = np.concatenate([[edges[0]], inner, [edges[-1]]])
        levels = np.diff(np.interp(ends, edges, moment)) / np.diff(np.interp(ends, edges, mass))
    return levels


@pytest.mark.parametrize("bits", CODEBOOK_BITS)
def test_table_meets_the_optimality_conditions(bits: int) -> None:
    levels, edges = centroids(bits).astype(np.float64), thresholds(bits).astype(np.float64)
    ends = [-math.inf, *edges, math.inf]
    for level, low, high in zip(levels, ends, ends[1:], strict=False):
        # Tail probabilities by erfc on the far side, so that 8-bit end cells keep their digits.
        low, high, sign = (low, high, 1) if high > 0 else (-high, -low, -1)
        mass = (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2
        moment = (math.exp(-low * low / 2) - math.exp(-high * high / 2)) / math.sqrt(2 * math.pi)
        # float32 edges (6e-8 of up to 4.6) limit the agreement of cells 0.017 wide and more
        assert sign * moment / mass == pytest.approx(level, abs=2e-6)


@pytest.mark.parametrize("bits", CODEBOOK_BITS)
def test_table_is_ascending_antisymmetric_and_read_only(bits: int) -> None:
    levels, edges = centroids(bits), thresholds(bits)
    assert levels.dtype == edges.dtype == np.float32
    assert levels.shape == (2**bits,)
    assert edges.shape == (2**bits - 1,)
    assert np.all(np.diff(levels) > 0)
    assert np.array_equal(levels, -levels[::-1])
    assert np.array_equal(edges, -edges[::-1])
    assert np.all((levels[:-1] < edges) & (edges < levels[1:]))
    assert not levels.flags.writeable
    assert not edges.flags.writeable


@pytest.mark.parametrize("head_dim", OPTIMAL_DISTORTION)
def test_one_gaussian_table_serves_every_head_dim(head_dim: int | None) -> None:
    for bits, optimum in zip((2, 3, 4), OPTIMAL_DISTORTION[head_dim], strict=True):
        # the optimum is rounded to four or five digits, hence 1e-4 below
        assert 1 - 1e-4 <= expected_distortion(bits, head_dim) / optimum <= 1.0045


def test_eight_bit_distortion() -> None:
    assert expected_distortion(8) == pytest.approx(4.119e-5, rel=2e-4)
    assert expected_distortion(8, 128) == pytest.approx(4.024e-5, rel=0.01)


def test_tables_are_frozen() -> None:
    """Stored pages mean what these bytes say; a change of theirs is a change of format."""
    tables = b"".join(centroids(bits).astype("<f4").tobytes() for bits in SUPPORTED_BITS)
    assert hashlib.sha256(tables).hexdigest()[:16] == "e7dc52f225361938"


@pytest.mark.parametrize("bits", [0, 5, 16, -2])
def test_unknown_width_is_refused(bits: int) -> None:
    with pytest.raises(UnsupportedFormatError):
        centroids(bits)
    with pytest.raises(UnsupportedFormatError):
        thresholds(bits)
