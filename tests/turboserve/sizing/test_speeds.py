"""Costs of a step are found again from what they would have measured, and never come out negative."""

from __future__ import annotations

import numpy as np
import pytest

from turboserve.sizing.speeds import Point, Speeds, fit, relative_error

TRUE = Speeds(0.01, 0.002, 1e-9, 1000.0)
LOADS = ((1, 1e6), (8, 1e6), (1, 5e7), (8, 5e7), (4, 2e7))


def measured(speeds: Speeds, loads: tuple[tuple[float, float], ...] = LOADS, noise: float = 0.0) -> list[Point]:
    rng = np.random.default_rng(3)
    return [
        Point(n, kv / 1000, speeds.step_s(n, kv) * (1 + noise * rng.standard_normal()), kv, speeds.prefill_tokens_per_s)
        for n, kv in loads
    ]


@pytest.mark.parametrize(
    "true", [TRUE, Speeds(0.01, 0.0, 1e-9, 50.0), Speeds(0.0, 0.002, 0.0, 9.0), Speeds(0.02, 0.003, 0.0, 1.0)]
)
def test_what_was_measured_without_noise_is_found_again(true: Speeds) -> None:
    found = fit(measured(true))
    assert found.prefill_tokens_per_s == true.prefill_tokens_per_s
    for n, kv in ((2, 3e6), (16, 1e8), (32, 1e6)):
        assert found.step_s(n, kv) == pytest.approx(true.step_s(n, kv), rel=1e-6)


def test_noise_moves_predictions_by_about_as_much() -> None:
    found = fit(measured(TRUE, noise=0.05))
    assert all(abs(found.step_s(n, kv) / TRUE.step_s(n, kv) - 1) < 0.15 for n, kv in ((2, 3e6), (6, 4e7)))


def test_two_runs_are_met_exactly_and_leave_one_cost_out() -> None:
    points = measured(TRUE, LOADS[:2])
    found = fit(points)
    assert all(abs(relative_error(found, point)) < 1e-9 for point in points)
    assert min(found.fixed_s, found.row_s, found.kv_s_per_byte) == 0.0


def test_costs_are_never_negative(rng: np.random.Generator) -> None:
    for _ in range(200):
        count = int(rng.integers(2, 7))
        points = [
            Point(float(rng.integers(1, 33)), i, float(rng.uniform(1e-3, 1)), float(rng.uniform(1e3, 1e9)), 5.0)
            for i in range(count)
        ]
        found = fit(points)
        assert min(found.fixed_s, found.row_s, found.kv_s_per_byte) >= 0.0
        assert max(found.fixed_s, found.row_s, found.kv_s_per_byte) > 0.0


@pytest.mark.parametrize(
    ("points", "why"),
    [
        (measured(TRUE, LOADS[:1]), "two runs"),
        (measured(TRUE, (LOADS[0], LOADS[0])), "another load"),
        ([Point(1, 1, 1.0, 1.0), Point(2, 1, 1.5, 1.0)], "prompts"),
    ],
)
def test_too_little_is_told(points: list[Point], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fit(points)
