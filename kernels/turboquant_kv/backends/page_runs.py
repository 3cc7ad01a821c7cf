"""Page ids as runs of neighbours, which are one slice of a page array."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def runs_of(page_ids: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """The ascending runs [start, stop) that the ids consist of, in their order."""
    if not len(page_ids):
        return []
    breaks = np.flatnonzero(np.diff(page_ids) != 1) + 1
    firsts = page_ids[np.concatenate([[0], breaks])].tolist()
    lasts = page_ids[np.concatenate([breaks - 1, [-1]])].tolist()
    return [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]
