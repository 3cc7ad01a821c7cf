"""Whether two sets of answers to the same prompts differ by more than chance. Counts only; no model, no files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

SIGNIFICANCE = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """Prompts that only one side answered rightly: `lost` by the new side, `gained` by it."""

    lost: int
    gained: int

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: a fair coin's chance of a split at least as uneven."""
        n, low = self.lost + self.gained, min(self.lost, self.gained)
        tail = sum(math.comb(n, i) for i in range(low + 1)) / float(2**n)
        return min(1.0, 2 * tail)

    @property
    def within_noise(self) -> bool:
        return self.p_value > SIGNIFICANCE


def compare(reference: Mapping[str, bool], other: Mapping[str, bool]) -> Comparison:
    """Right or wrong by prompt; only prompts that both have answered count."""
    pairs = [(reference[prompt_id], right) for prompt_id, right in other.items() if prompt_id in reference]
    return Comparison(pairs.count((True, False)), pairs.count((False, True)))
