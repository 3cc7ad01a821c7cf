"""How many guesses are worth it, by what steps took and how many guesses were right: pure numbers."""

from __future__ import annotations

import numpy as np
import pytest

from turboserve.engine.speculation_pace import HOPED_ACCEPTANCE, Acceptance, Offer, StepTimes, most_worth


def times_of(costs: dict[int, float], num_rows: int = 1, rounds: int = 40) -> StepTimes:
    """After many steps that took these times, by further tokens; a plain one takes 1."""
    times = StepTimes()
    for _ in range(rounds):
        times.learn(num_rows, 0, 1.0)
        for most, seconds in costs.items():
            times.learn(num_rows, most, seconds)
    return times


def test_a_plain_step_comes_first() -> None:
    times = StepTimes()
    assert most_worth([Offer(7, 0, 0.9)], times) == 0
    times.learn(1, 0, 0.02)
    assert most_worth([Offer(7, 0, 0.9)], times) > 0


@pytest.mark.parametrize(
    ("rate", "costs", "least", "most"),
    [
        (1.0, {1: 1.0, 7: 1.2}, 7, 7),  # right guesses, nearly for nothing
        (0.8, {1: 1.05, 7: 1.35}, 3, 7),
        (0.5, {1: 1.2, 7: 3.0}, 1, 1),  # each further one costs 0.3, and the second one brings 0.25
        (0.02, {1: 1.05, 7: 1.35}, 0, 0),  # nothing ever comes true
        (0.9, {1: 2.0, 7: 8.0}, 0, 0),  # as dear as plain steps
    ],
)
def test_as_many_as_bring_most_tokens_a_second(rate: float, costs: dict[int, float], least: int, most: int) -> None:
    assert least <= most_worth([Offer(7, 0, rate)], times_of(costs)) <= most


def test_the_choice_is_the_best_of_all_for_whole_batches(rng: np.random.Generator) -> None:
    for _ in range(50):
        num_rows = int(rng.integers(1, 9))
        offers = [Offer(int(rng.integers(0, 8)), 0, float(rng.random())) for _ in range(num_rows)]
        base, slope = 1.0 + rng.random() / 2, rng.random() / 4
        times = times_of({m: base + slope * m for m in range(1, 8)}, num_rows)
        chosen = most_worth(offers, times)

        def speed(most: int, offers: list[Offer] = offers, times: StepTimes = times) -> float:
            gains = [sum(o.rate**j for j in range(1, min(o.most, most) + 1)) for o in offers]
            cost = times.cost(len(offers), most) if most else 1.0
            assert cost is not None
            return (1 + sum(gains) / len(gains)) / cost

        best = max(speed(most) for most in range(8))
        assert speed(chosen) == pytest.approx(best) or (chosen == 0 and best <= 1.03)


def test_times_are_learnt_by_numbers_of_rows() -> None:
    times = times_of({1: 1.1, 7: 1.7})
    assert times.cost(1, 4) == pytest.approx(1.4, abs=0.05)
    assert times.cost(4, 1) is None
    for _ in range(40):
        times.learn(4, 0, 2.0)
        times.learn(4, 7, 8.0)
    assert times.cost(4, 7) == pytest.approx(4.0, abs=0.2) and times.cost(1, 4) == pytest.approx(1.4, abs=0.05)


def test_acceptance_follows_what_happened() -> None:
    acceptance = Acceptance()
    assert acceptance.rate(0) == HOPED_ACCEPTANCE
    for _ in range(30):
        acceptance.learn(0, 5, 0)
        acceptance.learn(1, 5, 5)
    assert acceptance.rate(0) < 0.05 and acceptance.rate(1) > 0.95 and acceptance.rate(2) == HOPED_ACCEPTANCE
    fresh = acceptance.copy()
    fresh.learn(1, 3, 0)
    assert fresh.rate(1) < acceptance.rate(1) and fresh.rate(0) == acceptance.rate(0)


def test_what_was_not_worth_it_is_tried_again_now_and_then() -> None:
    """Wrong guesses cost at most a few percent of steps, and a text that begins to repeat is met."""
    times, acceptance, tried = times_of({1: 1.1, 7: 1.5}), Acceptance(), []
    for _ in range(1000):
        most = most_worth([Offer(7, 0, acceptance.rate(0))], times)
        tried.append(most > 0)
        if most:
            acceptance.learn(0, most, 0)
            times.learn(1, most, 1.05 + most * 0.06)
        else:
            acceptance.fade(0)
            times.fade(1)
            times.learn(1, 0, 1.0)
    assert 5 < sum(tried[200:]) < 0.15 * 800
