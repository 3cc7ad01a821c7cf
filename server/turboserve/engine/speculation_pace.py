"""How many drafted tokens a step is worth, from what steps took and how many drafts came true. Pure numbers.

A step that checks drafts is slower than a plain one, by something fixed and something for each further token of a row;
both are learnt, for each number of rows by itself, in units of a plain step. How likely a draft comes true is learnt
for each row and each kind of draft. What was learnt long ago fades while drafts are not worth it, towards a hopeful
guess: so they are tried again now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

HOPED_ACCEPTANCE = 0.6
ACCEPTANCE_STEP = 0.15  # what one more draft that came true or did not weighs in a row's acceptance
FADING = 0.005  # of what is known, with each step in which drafts were there and not worth it
TIME_MEMORY = 0.9  # what a step's time still weighs when the next one of its kind has been measured
MOST_SURPRISE = 2.0  # times what was expected, more of which is taken for a stall of the machine
LEAST_GAIN = 1.03  # tokens per second over those of plain steps, below which nothing is drafted
GUESS_WEIGHT = 0.3  # of the guess below, in measured steps
GUESSED_COSTS = ((1, 1.1), (8, 1.4))  # further tokens of each row, and a step's time by a plain one's


class Acceptance:
    """How often a row's drafts came true, by their kind."""

    def __init__(self, start: dict[int, float] | None = None) -> None:
        self._rates = dict(start or {})

    def rate(self, kind: int) -> float:
        return self._rates.get(kind, HOPED_ACCEPTANCE)

    def learn(self, kind: int, num_drafted: int, num_accepted: int, step: float = ACCEPTANCE_STEP) -> None:
        """The drafts behind the first wrong one tell nothing."""
        rate = self.rate(kind)
        for _ in range(num_accepted):
            rate += step * (1.0 - rate)
        if num_accepted < num_drafted:
            rate -= step * rate
        self._rates[kind] = rate

    def fade(self, kind: int) -> None:
        """A draft was there and was not tried."""
        self._rates[kind] = self.rate(kind) + FADING * (HOPED_ACCEPTANCE - self.rate(kind))

    def copy(self) -> Acceptance:
        """What a new row starts with."""
        return Acceptance(self._rates)


@dataclass(slots=True)
class _Fit:
    """A straight line through (further tokens, relative time), weighted sums of which are kept."""

    sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, x, x^2, y, x y

    def add(self, x: float, y: float, weight: float = 1.0) -> None:
        for i, value in enumerate((1.0, x, x * x, y, x * y)):
            self.sums[i] += weight * value

    def scale(self, by: float) -> None:
        self.sums = [by * value for value in self.sums]

    def at(self, x: float) -> float:
        w, sx, sxx, sy, sxy = self.sums
        spread = w * sxx - sx * sx
        slope = (w * sxy - sx * sy) / spread if spread > 1e-9 else 0.0
        return (sy - slope * sx) / w + slope * x


class StepTimes:
    """What steps took: plain ones, and ones with drafts, by the number of rows."""

    def __init__(self) -> None:
        self._plain_s: dict[int, float] = {}
        self._fits: dict[int, _Fit] = {}

    def learn(self, num_rows: int, most_drafts: int, seconds: float) -> None:
        """A step took so long; most_drafts: the most that any row had, 0 for a plain step."""
        plain_s = self._plain_s.get(num_rows)
        if most_drafts == 0:
            seconds = seconds if plain_s is None else min(seconds, MOST_SURPRISE * plain_s)
            self._plain_s[num_rows] = seconds if plain_s is None else plain_s + (1 - TIME_MEMORY) * (seconds - plain_s)
        elif plain_s:
            expected = self.cost(num_rows, most_drafts) or 1.0
            fit = self._fits.setdefault(num_rows, _Fit())
            fit.scale(TIME_MEMORY)
            fit.add(most_drafts, min(seconds / plain_s, MOST_SURPRISE * expected))

    def fade(self, num_rows: int) -> None:
        """Drafts were there and were not tried."""
        if num_rows in self._fits:
            self._fits[num_rows].scale(1 - FADING)

    def cost(self, num_rows: int, most_drafts: int) -> float | None:
        """A step's time by a plain one's; None: no plain one was seen."""
        if num_rows not in self._plain_s:
            return None
        fit = _Fit(list(self._fits[num_rows].sums) if num_rows in self._fits else [0.0] * 5)
        for x, y in GUESSED_COSTS:
            fit.add(x, y, GUESS_WEIGHT)
        return max(1.0, fit.at(most_drafts))


@dataclass(frozen=True, slots=True)
class Offer:
    """Drafts that a row could have: at most so many, of a kind, each of which comes true with this probability."""

    most: int = 0
    kind: int = 0
    rate: float = 0.0


def most_worth(offers: Sequence[Offer], times: StepTimes) -> int:
    """Drafts that a row should have at most in the next step, by which most tokens per second are expected; 0: none.

    One plain step is made first with each number of rows, to have something to compare with.
    """
    num_rows, best, best_speed = len(offers), 0, LEAST_GAIN
    expected, powers = 1.0, [offer.rate for offer in offers]
    for most in range(1, max((offer.most for offer in offers), default=0) + 1):
        expected += sum(p for p, offer in zip(powers, offers, strict=True) if offer.most >= most) / num_rows
        powers = [p * offer.rate for p, offer in zip(powers, offers, strict=True)]
        cost = times.cost(num_rows, most)
        if cost is not None and expected / cost > best_speed:
            best, best_speed = most, expected / cost
    return best
