"""FreePages: a pool's free page ids as maximal runs of neighbours.

Pages written in one go should lie side by side: a GPU writes a run as one slice where scattered ids cost a scatter, and
the native CPU layout streams neighbours. Owns which free ids are taken first; counts no references.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np

from turboquant_kv.backends.page_runs import runs_of


class FreePages:
    """Maximal runs [start, stop) of free ids, found by their ends and by their length."""

    def __init__(self) -> None:
        self._stop_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []  # (length, start), sorted
        self._num_pages = 0

    def __len__(self) -> int:
        return self._num_pages

    def __iter__(self) -> Iterator[int]:
        """Every free id, ascending."""
        for start in sorted(self._stop_of):
            yield from range(start, self._stop_of[start])

    def put(self, page_ids: Iterable[int]) -> None:
        """Add ids that are not free yet, in any order."""
        for start, stop in runs_of(np.sort(np.fromiter(page_ids, np.int64))):
            self._num_pages += stop - start
            if start in self._start_of:
                start = self._remove(self._start_of[start])[0]
            if stop in self._stop_of:
                stop = self._remove(stop)[1]
            self._insert(start, stop)

    def take(self, num_pages: int) -> list[int]:
        """Up to num_pages ids, ascending, in few runs: the shortest run that is long enough, else the longest ones.

        Among equals the first one, so that what is taken depends on the calls before alone.
        """
        taken: list[int] = []
        while len(taken) < num_pages and self._by_length:
            wanted = num_pages - len(taken)
            at = bisect_left(self._by_length, (wanted, 0))
            if at == len(self._by_length):
                at = bisect_left(self._by_length, (self._by_length[-1][0], 0))
            start, stop = self._remove(self._by_length[at][1])
            if stop - start > wanted:
                self._insert(start + wanted, stop)
                stop = start + wanted
            taken += range(start, stop)
        self._num_pages -= len(taken)
        return sorted(taken)

    def _insert(self, start: int, stop: int) -> None:
        self._stop_of[start], self._start_of[stop] = stop, start
        insort(self._by_length, (stop - start, start))

    def _remove(self, start: int) -> tuple[int, int]:
        stop = self._stop_of.pop(start)
        del self._start_of[stop]
        del self._by_length[bisect_left(self._by_length, (stop - start, start))]
        return start, stop
