"""Means that turn with position: block averages against sums over positions, and that nothing is lost by them."""

from __future__ import annotations

import numpy as np
import pytest
from tests.turboquant_kv.histories import random_rotary

from turboquant_kv.backends.base import Means
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.reference import turning_means
from turboquant_kv.codec.rotary import BLOCK_TOKENS, Rotary


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_block_means_are_averages_over_the_blocks_positions(dim: int, rng: np.random.Generator) -> None:
    rotary, mean = random_rotary(rng, dim), rng.standard_normal((2, dim)).astype(np.float32)
    for first in (0, 32, int(rng.integers(1000, 200_000))):
        got = rotary.block_means(mean, first, 5)
        assert got.dtype == np.float32
        for b in range(5):
            positions = first + BLOCK_TOKENS * b + np.arange(BLOCK_TOKENS)
            want = rotary.turned(mean[:, None], positions[None]).mean(axis=1)
            np.testing.assert_allclose(got[:, b], want, atol=2e-6 * rotary.amplitude * np.abs(mean).max() + 1e-6)


def test_rows_of_pages_are_the_references(rng: np.random.Generator) -> None:
    fmt = KVFormat(page_tokens=32, sink_tokens=5)
    means = Means(
        rng.standard_normal((2, 64)).astype(np.float32), np.zeros((2, 64), np.float32), random_rotary(rng, 64)
    )
    assert means.rotary is not None
    want = turning_means(means.k, means.rotary, fmt, fmt.page_start(7))
    np.testing.assert_allclose(means.k_rows(fmt, np.arange(2, 7)), want[:, fmt.page_start(2) :], atol=1e-5)


def test_turning_back_undoes_turning_and_scores_see_distances_alone(rng: np.random.Generator) -> None:
    rotary = random_rotary(rng, 64)
    q, k = rng.standard_normal((2, 64))
    p, far = 17, 5000
    np.testing.assert_allclose(rotary.turned_back(rotary.turned(k, np.array(p)), np.array(p)), k, atol=1e-9)
    near_score = rotary.turned(q, np.array(p + 3)) @ rotary.turned(k, np.array(p))
    far_score = rotary.turned(q, np.array(far + 3)) @ rotary.turned(k, np.array(far))
    assert near_score == pytest.approx(far_score, rel=1e-9, abs=1e-9)


def test_a_saved_rotation_is_the_same(rng: np.random.Generator) -> None:
    rotary = random_rotary(rng, 80)
    again = Rotary.from_dict(rotary.to_dict())
    assert again.fingerprint() == rotary.fingerprint()
    np.testing.assert_array_equal(again.frequencies, rotary.frequencies)
    for spoilt in ({}, {**rotary.to_dict(), "frequencies": [float("nan")]}, {**rotary.to_dict(), "amplitude": 0.0}):
        with pytest.raises(ValueError, match="no rotation of keys"):
            Rotary.from_dict(spoilt)
