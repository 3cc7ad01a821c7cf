"""Means with 95% intervals over few independent samples, as texts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Two-sided 95% quantiles of Student's t at 1 .. 9 degrees of freedom; beyond, the series in `_quantile` suffices.
_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
_NORMAL = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95% t interval; low and high are None where there are fewer than two samples."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """One sample per text. Raises ValueError for none."""
        if not len(samples):
            raise ValueError("an estimate needs at least one sample")
        values = np.asarray(samples, np.float64)
        mean = float(values.mean())
        if len(values) < 2:
            return cls(mean)
        half = _quantile(len(values) - 1) * float(values.std(ddof=1)) / len(values) ** 0.5
        return cls(mean, mean - half, mean + half)

    @property
    def half_width(self) -> float | None:
        """Half of the interval; None without one."""
        return None if self.high is None else self.high - self.mean

    def exp(self) -> Estimate:
        """The same of exp(x): a geometric mean, from samples of logarithms."""
        low, high = (None if x is None else float(np.exp(x)) for x in (self.low, self.high))
        return Estimate(float(np.exp(self.mean)), low, high)

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def _quantile(degrees: int) -> float:
    """Of Student's t, 97.5%."""
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
