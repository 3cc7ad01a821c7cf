"""FreeRows: which of a pool's exact rows nobody uses, as runs that regions are cut from.

A region's rows lie side by side, so that a kernel finds them by one number. Regions grow as their conversation does;
new ones are therefore put where rows behind them are free as well, as long as there are such places.
"""

from __future__ import annotations

from bisect import bisect_left


class FreeRows:
    """Maximal runs [start, stop) of free rows, sorted."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self._runs)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """All of them, ascending."""
        return list(self._runs)

    def put(self, start: int, stop: int) -> None:
        """Rows [start, stop) are free from now on; none of them was."""
        if start == stop:
            return
        at = bisect_left(self._runs, (start, stop))
        assert at == len(self._runs) or stop <= self._runs[at][0], "rows were freed twice"
        assert at == 0 or self._runs[at - 1][1] <= start, "rows were freed twice"
        if at < len(self._runs) and self._runs[at][0] == stop:
            stop = self._runs.pop(at)[1]
        if at > 0 and self._runs[at - 1][1] == start:
            start = self._runs.pop(at - 1)[0]
            at -= 1
        self._runs.insert(at, (start, stop))

    def take(self, num_rows: int, room: int) -> int | None:
        """The first of `num_rows` free rows side by side, None if there are none.

        room: rows that it may grow to. They are laid out at multiples of that, each where all of its room is free; only
        without such a place the shortest run that is long enough is taken.
        """
        for start, stop in self._runs:
            aligned = -(-start // room) * room
            if aligned + room <= stop:
                self._cut(start, stop, aligned, num_rows)
                return aligned
        fitting = [(stop - start, start) for start, stop in self._runs if stop - start >= num_rows]
        if not fitting:
            return None
        length, start = min(fitting)
        self._cut(start, start + length, start, num_rows)
        return start

    def take_at(self, first: int, num_rows: int) -> bool:
        """Take rows [first, first + num_rows) if they are all free."""
        at = bisect_left(self._runs, (first + 1,)) - 1
        if at < 0:
            return False
        start, stop = self._runs[at]
        if not start <= first <= first + num_rows <= stop:
            return False
        self._cut(start, stop, first, num_rows)
        return True

    def _cut(self, start: int, stop: int, first: int, num_rows: int) -> None:
        """Take rows [first, first + num_rows) out of the run [start, stop)."""
        at = bisect_left(self._runs, (start, stop))
        left = [(start, first), (first + num_rows, stop)]
        self._runs[at : at + 1] = [run for run in left if run[0] < run[1]]
