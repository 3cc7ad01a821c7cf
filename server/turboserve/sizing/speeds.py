"""How long a decode step and a prompt take on one machine, fitted to what was measured there.

    step(n, L)  =  fixed  +  n * row  +  n * bytes(L) / bandwidth

fixed is what a step costs whoever is in it: weights that are read, launches. row is one stream's share beside its
cache: linear layers on a CPU, next to nothing on a GPU. The last term reads the caches; bytes(L) are the library's own
count, so that a format that was not measured is known by its bytes. A prompt takes its tokens over a rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Point:
    """What one run measured: streams that ran together, tokens that each held on average, seconds between tokens."""

    streams: float
    context: float
    step_s: float
    kv_bytes: float  # of one stream's cache at that length, in the format that was served
    prefill_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Speeds:
    """One machine's. Seconds; `kv_s_per_byte` is one over the bandwidth at which caches are read."""

    fixed_s: float
    row_s: float
    kv_s_per_byte: float
    prefill_tokens_per_s: float

    def step_s(self, streams: float, kv_bytes: float) -> float:
        """Seconds of a decode step with so many streams, each with a cache of so many bytes."""
        return self.fixed_s + streams * (self.row_s + kv_bytes * self.kv_s_per_byte)


def fit(points: Sequence[Point]) -> Speeds:
    """Least squares of relative errors with no cost below zero; costs that the points cannot tell apart stay out.

    Raises ValueError for fewer than two points, or when none says how fast prompts are read.
    """
    if len(points) < 2:
        raise ValueError("at least two runs are needed, of different streams or lengths")
    if len({(p.streams, round(p.context)) for p in points}) < 2:
        raise ValueError("all runs have the same streams and lengths: measure another load as well")
    fewest = min(p.streams for p in points)  # where prompts waited least for each other
    rates = [p.prefill_tokens_per_s for p in points if p.prefill_tokens_per_s and p.streams == fewest]
    rates = rates or [p.prefill_tokens_per_s for p in points if p.prefill_tokens_per_s]
    if not rates:
        raise ValueError("no run says how fast prompts are read")
    columns = np.array([[1.0, p.streams, float(p.streams) * p.kv_bytes] for p in points])
    seconds = np.array([p.step_s for p in points])
    fixed_s, row_s, kv_s_per_byte = _not_negative(columns / seconds[:, None], most=min(3, len(points)))
    return Speeds(fixed_s, row_s, kv_s_per_byte, float(np.median(rates)))


def _not_negative(columns: NDArray[np.float64], most: int) -> list[float]:
    """The best costs >= 0, at most so many of them above 0, of `columns @ costs = 1`. All choices are tried."""
    best: tuple[float, list[float]] | None = None
    for number in range(1, most + 1):
        for chosen in itertools.combinations(range(columns.shape[1]), number):
            part, *_ = np.linalg.lstsq(columns[:, chosen], np.ones(len(columns)), rcond=None)
            if (part < 0).any():
                continue
            costs = [0.0] * columns.shape[1]
            for place, cost in zip(chosen, part.tolist(), strict=True):
                costs[place] = cost
            error = float(np.square(columns @ np.array(costs) - 1).sum())
            if best is None or error < best[0] - 1e-12:
                best = error, costs
    assert best is not None, "one cost alone always has a fit"
    return best[1]


def relative_error(speeds: Speeds, point: Point) -> float:
    """Predicted over measured, less one."""
    return speeds.step_s(point.streams, point.kv_bytes) / point.step_s - 1
