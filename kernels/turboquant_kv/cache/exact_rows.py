"""Exact rows of conversations: regions of the rows that all layers of a pool have, counted and shared by forks.

Owns which rows a region has and when they are copied: forks share a region until one of them writes, and a region
without room goes on behind its last row if that is free, else is replaced by a larger one. The rows themselves are
the stores'; a region has the same row numbers in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np

from turboquant_kv.backends.base import PageIds
from turboquant_kv.cache.free_rows import FreeRows
from turboquant_kv.cache.growth import grow_stores
from turboquant_kv.codec.format import EXACT_ROWS_STEP, exact_capacity

# The layers' arrays grow by an eighth, and by no less than this: each time they are copied.
GROWTH_SHARE = 8
MIN_GROWTH = 128
NO_ROWS: PageIds = np.empty(0, np.int64)


class RowStore(Protocol):
    """What a layer's store does with exact rows."""

    @property
    def num_rows(self) -> int: ...

    @property
    def exact_bytes(self) -> int: ...

    def grow_rows(self, num_rows: int) -> None: ...

    def pending_arrays(self) -> list[Any]: ...

    def move_rows(self, order: PageIds) -> None: ...


class ExactRegion:
    """Rows [first, first + capacity) of every layer; bytes are of the layers that a conversation has.

    In the books from the start to the last holder's `release`.
    """

    __slots__ = ("__weakref__", "_num_holders", "_num_rows", "_rows", "capacity", "first", "room", "row_bytes")

    def __init__(self, rows: ExactRowPool, row_bytes: int, capacity: int, room: int) -> None:
        """Held once. row_bytes: of one row in all layers that count; room: rows that it will ever hold at most."""
        self._rows, self.row_bytes, self.capacity, self.room = rows, row_bytes, capacity, room
        self._num_holders, self._num_rows = 1, 0
        self.first = rows.take(self)

    @property
    def is_shared(self) -> bool:
        return self._num_holders > 1

    @property
    def num_rows(self) -> int:
        """Rows that hold a token."""
        return self._num_rows

    @num_rows.setter
    def num_rows(self, num_rows: int) -> None:
        self._rows.num_filled += num_rows - self._num_rows
        self._num_rows = num_rows

    def hold(self) -> None:
        """One more conversation has these rows."""
        self._num_holders += 1

    def release(self) -> None:
        """One conversation less; the last one gives the rows back."""
        self._num_holders -= 1
        assert self._num_holders >= 0, "exact rows were released twice"
        if self._num_holders == 0:
            self.num_rows = 0
            self._rows.give_back(self)

    def resize(self, capacity: int) -> bool:
        """Have more or fewer rows where it is; False if there is no room behind it."""
        return self._rows.resize(self, capacity)


class ExactRowPool:
    """The rows of all layers of a pool under one numbering."""

    def __init__(self, stores: Sequence[RowStore]) -> None:
        """stores: of the layers; the list is the page pool's own, which puts other stores in."""
        self._stores, self._free = stores, FreeRows()
        self._regions: WeakSet[ExactRegion] = WeakSet()
        self.num_rows = 0  # that the stores hold memory for
        self.num_filled = 0  # of regions' rows, those that hold a token
        self.nbytes = 0  # of all regions

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, region: ExactRegion) -> int:
        """Rows for a new region: the first one's number. Raises what a store raises that cannot grow."""
        first = self._free.take(region.capacity, region.room)
        if first is None:
            self._grow(self.num_rows + region.room)
            first = self._free.take(region.capacity, region.room)
            assert first is not None
        self._regions.add(region)
        self.nbytes += region.capacity * region.row_bytes
        return first

    def _grow(self, num_rows: int) -> None:
        wanted = max(num_rows, self.num_rows + max(MIN_GROWTH, self.num_rows // GROWTH_SHARE))
        wanted = -(-wanted // EXACT_ROWS_STEP) * EXACT_ROWS_STEP
        grow_stores(self._stores, lambda store: store.grow_rows(wanted), lambda store: store.exact_bytes)
        self._free.put(self.num_rows, wanted)
        self.num_rows = wanted

    def give_back(self, region: ExactRegion) -> None:
        """A region's rows are free."""
        self._free.put(region.first, region.first + region.capacity)
        self._regions.discard(region)
        self.nbytes -= region.capacity * region.row_bytes

    def resize(self, region: ExactRegion, capacity: int) -> bool:
        """Give a region rows behind its last, or take its last ones."""
        end, new_end = region.first + region.capacity, region.first + capacity
        if new_end > end and not self._free.take_at(end, new_end - end):
            return False
        if new_end < end:
            self._free.put(new_end, end)
        self.nbytes += (capacity - region.capacity) * region.row_bytes
        region.capacity = capacity
        return True

    def pack(self) -> None:
        """Move all regions together and let go of the other rows; not within a step.

        Raises what a store raises that cannot; all rows are then where they were.
        """
        regions = sorted(self._regions, key=lambda region: region.first)
        num_used = sum(region.capacity for region in regions)
        if num_used == self.num_rows:
            return
        order = np.concatenate([np.arange(r.first, r.first + r.capacity) for r in regions] or [NO_ROWS])
        self._move_in_all(order)
        at = 0
        for region in regions:
            region.first = at
            at += region.capacity
        self._free, self.num_rows = FreeRows(), num_used

    def _move_in_all(self, order: PageIds) -> None:
        """Keep these rows in every layer, or in none."""
        moved = 0
        try:
            for store in self._stores:
                store.move_rows(order)
                moved += 1
        except BaseException:
            back = np.zeros(self.num_rows, np.int64)  # what free rows hold is nobody's
            back[order] = np.arange(len(order))
            for store in self._stores[:moved] if len(order) else []:
                store.move_rows(back)
            for store in self._stores[:moved]:
                store.grow_rows(self.num_rows)
            raise

    def check_integrity(self) -> None:
        """Raises AssertionError when regions and free rows do not make up all rows, each once."""
        spans = [(r.first, r.first + r.capacity) for r in self._regions] + self._free.runs
        at = 0
        for start, stop in sorted(spans):
            assert start == at, f"exact rows {at} to {start} belong to nobody, or to two"
            at = stop
        assert at == self.num_rows, f"exact rows end at {at}, the stores hold {self.num_rows}"
        assert sum(r.num_rows for r in self._regions) == self.num_filled, "filled rows were counted wrongly"


def grown(region: ExactRegion | None, rows: ExactRowPool, row_bytes: int, num_rows: int, most: int) -> ExactRegion:
    """A region for `num_rows` rows of at most `most`: the same one if nobody shares it and it has room or gets it.

    A new one is held once, and its rows are yet to be copied; the old one stays held.
    """
    wanted = exact_capacity(num_rows, most)
    if region is None:
        return ExactRegion(rows, row_bytes, wanted, most)
    if not region.is_shared and (region.capacity >= num_rows or region.resize(wanted)):
        return region
    return ExactRegion(rows, row_bytes, max(wanted, region.capacity), most)
