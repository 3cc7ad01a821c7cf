"""The rule by which a format's accuracy counts as unharmed."""

from __future__ import annotations

import random

import pytest

from turboserve.models.tiny.comparison import Comparison, compare


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 2**5),
        (6, 0, 2 / 2**6),
        (0, 6, 2 / 2**6),
        (7, 1, 2 * (1 + 8) / 2**8),
        (4, 4, 1.0),
    ],
)
def test_p_value_by_hand(lost: int, gained: int, p_value: float) -> None:
    assert Comparison(lost, gained).p_value == pytest.approx(p_value, rel=1e-12)


def test_six_losses_without_a_gain_are_more_than_noise() -> None:
    assert Comparison(5, 0).within_noise
    assert not Comparison(6, 0).within_noise


def test_only_shared_prompts_count(seed: int) -> None:
    rng = random.Random(seed)
    reference = {f"p{i}": rng.random() < 0.5 for i in range(60)}
    other = {f"p{i}": rng.random() < 0.5 for i in range(20, 90)}
    shared = reference.keys() & other.keys()
    result = compare(reference, other)
    assert result.lost == sum(reference[p] and not other[p] for p in shared)
    assert result.gained == sum(other[p] and not reference[p] for p in shared)
    assert compare(other, reference) == Comparison(result.gained, result.lost)
