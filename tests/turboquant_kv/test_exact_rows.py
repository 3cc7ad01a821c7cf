"""Exact rows of all conversations in one numbering: which are free, who has which, and that no row is lost."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from turboquant_kv.backends.base import PageIds
from turboquant_kv.cache.exact_rows import MIN_GROWTH, ExactRegion, ExactRowPool, grown
from turboquant_kv.cache.free_rows import FreeRows


def runs_in(rows: set[int]) -> list[tuple[int, int]]:
    """Maximal runs [start, stop) of a set of numbers."""
    starts = sorted(row for row in rows if row - 1 not in rows)
    stops = sorted(row + 1 for row in rows if row + 1 not in rows)
    return list(zip(starts, stops, strict=True))


def test_free_rows_agree_with_a_plain_set(rng: np.random.Generator) -> None:
    """Whatever is taken and given back: nothing is given twice, runs are maximal, and every place is found."""
    free, want, held = FreeRows(), set(range(300)), list[tuple[int, int]]()
    free.put(0, 300)
    for _ in range(600):
        kind = rng.choice(["take", "take_at", "put"])
        if kind == "put" and held:
            start, stop = held.pop(int(rng.integers(len(held))))
            cut = int(rng.integers(start, stop + 1))
            free.put(cut, stop)
            free.put(start, cut)
            want.update(range(start, stop))
        elif kind == "take":
            num_rows = int(rng.integers(1, 25))
            room = num_rows + int(rng.integers(0, 20))
            roomy = [at for at in range(0, 300, room) if want.issuperset(range(at, at + room))]
            first = free.take(num_rows, room)
            if roomy:
                assert first == roomy[0]
            elif first is None:
                assert all(stop - start < num_rows for start, stop in runs_in(want))
            if first is not None:
                taken = range(first, first + num_rows)
                assert want.issuperset(taken)
                want.difference_update(taken)
                held.append((first, first + num_rows))
        elif kind == "take_at":
            first, num_rows = int(rng.integers(-2, 300)), int(rng.integers(1, 12))
            rows = range(first, first + num_rows)
            assert free.take_at(first, num_rows) == want.issuperset(rows)
            if want.issuperset(rows):
                want.difference_update(rows)
                held.append((first, first + num_rows))
        assert free.runs == runs_in(want)
        assert len(free) == len(want)


def test_without_room_to_grow_the_shortest_run_is_taken() -> None:
    free = FreeRows()
    for start, stop in ((0, 10), (20, 26), (40, 47)):
        free.put(start, stop)
    assert free.take(5, 16) == 20
    assert free.take(5, 16) == 40
    assert free.take(8, 16) == 0
    assert free.runs == [(8, 10), (25, 26), (45, 47)]
    assert free.take(3, 3) is None


def test_rows_are_freed_once() -> None:
    free = FreeRows()
    free.put(4, 8)
    for start, stop in ((4, 8), (5, 6), (0, 5), (7, 9), (0, 20)):
        with pytest.raises(AssertionError, match="freed twice"):
            free.put(start, stop)
    assert free.runs == [(4, 8)]


class Refused(Exception):
    pass


class Store:
    """A layer whose rows are numbers; -1 marks rows that nobody has written."""

    def __init__(self) -> None:
        self.rows = np.empty(0, np.int64)
        self.refuses = False

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def exact_bytes(self) -> int:
        return len(self.rows) * ROW_BYTES

    def pending_arrays(self) -> list[Any]:
        return []

    def grow_rows(self, num_rows: int) -> None:
        if self.refuses:
            raise Refused
        self.rows = np.concatenate([self.rows, np.full(max(0, num_rows - len(self.rows)), -1)])

    def move_rows(self, order: PageIds) -> None:
        if self.refuses:
            raise Refused
        self.rows = self.rows[order]


ROW_BYTES, ROOM = 12, 32


class Holder:
    """A conversation: a region and the rows that it must hold."""

    numbers = itertools.count()

    def __init__(self, pool: ExactRowPool, stores: list[Store]) -> None:
        self.pool, self.stores = pool, stores
        self.region: ExactRegion | None = None
        self.rows: list[int] = []

    def append(self, num_new: int) -> None:
        """As a sequence does it: in place where that is possible, else with a copy of what was there."""
        old = self.region
        region = grown(old, self.pool, ROW_BYTES, len(self.rows) + num_new, ROOM)
        region.num_rows = len(self.rows) + num_new
        new = [next(self.numbers) for _ in range(num_new)]
        for store in self.stores:
            if old is not None and region is not old:
                store.rows[region.first : region.first + len(self.rows)] = self.held(store)
            at = region.first + len(self.rows)
            store.rows[at : at + num_new] = new
        if old is not None and region is not old:
            old.release()
        self.region = region
        self.rows = self.rows + new

    def held(self, store: Store) -> list[int]:
        if self.region is None:
            return []
        return [int(row) for row in store.rows[self.region.first : self.region.first + len(self.rows)]]

    def fork(self) -> Holder:
        other = Holder(self.pool, self.stores)
        other.region, other.rows = self.region, self.rows
        if self.region is not None:
            self.region.hold()
        return other

    def release(self) -> None:
        if self.region is not None:
            self.region.release()
            self.region, self.rows = None, []


def check(pool: ExactRowPool, stores: list[Store], holders: list[Holder]) -> None:
    pool.check_integrity()
    regions = {id(holder.region): holder.region for holder in holders if holder.region is not None}
    assert pool.nbytes == sum(region.capacity for region in regions.values()) * ROW_BYTES
    assert pool.num_free == pool.num_rows - sum(region.capacity for region in regions.values())
    assert {store.num_rows for store in stores} == {pool.num_rows}
    for holder in holders:
        for store in stores:
            assert holder.held(store) == holder.rows


def test_any_calls_keep_every_holders_rows(rng: np.random.Generator) -> None:
    """Many conversations appending, forking, leaving, and being packed together, some of it while a layer refuses."""
    stores = [Store(), Store(), Store()]
    pool = ExactRowPool(stores)
    holders = [Holder(pool, stores) for _ in range(12)]
    in_place = moved = packed = 0
    for _ in range(800):
        holder = holders[int(rng.integers(len(holders)))]
        kind = rng.choice(["append", "append", "append", "fork", "release", "pack", "refused pack"])
        if kind == "append" and len(holder.rows) < ROOM:
            before = holder.region
            was_shared = before is not None and before.is_shared
            holder.append(int(rng.integers(1, min(6, ROOM - len(holder.rows) + 1))))
            assert not (was_shared and holder.region is before), "who shares rows copies them before writing"
            in_place += holder.region is before
            moved += before is not None and holder.region is not before
        elif kind == "fork" and len(holders) < 24:
            rows, size = pool.num_rows, pool.nbytes
            holders.append(holder.fork())
            assert (pool.num_rows, pool.nbytes) == (rows, size), "a fork costs nothing"
        elif kind == "release":
            holder.release()
            if len(holders) > 12:
                holders.remove(holder)
        elif kind == "pack":
            packed += pool.num_free > 0
            pool.pack()
            assert pool.num_free == 0
        elif kind == "refused pack" and pool.num_free:
            refusing = stores[int(rng.integers(3))]
            refusing.refuses = True
            with pytest.raises(Refused):
                pool.pack()
            refusing.refuses = False
            assert pool.num_free, "nothing was moved"
        check(pool, stores, holders)
    assert min(in_place, moved, packed) > 20
    for holder in holders:
        holder.release()
    assert (pool.nbytes, pool.num_filled) == (0, 0)
    pool.pack()
    assert {store.num_rows for store in stores} == {0}


def test_regions_grow_where_they_are_as_long_as_there_is_room(rng: np.random.Generator) -> None:
    """They begin where all of their room is free; more of them share what is left, and memory grows last."""
    stores = [Store()]
    pool = ExactRowPool(stores)
    holders = [Holder(pool, stores) for _ in range(MIN_GROWTH // ROOM)]
    for holder in holders:
        holder.append(1)
    regions = [holder.region for holder in holders]
    while len(holders[0].rows) < ROOM:
        for holder in holders:
            holder.append(1)
    assert [holder.region for holder in holders] == regions, "a batch that decodes copies no rows"
    assert (pool.num_rows, pool.num_free) == (MIN_GROWTH, 0)
    holders[1].release()
    late = [Holder(pool, stores) for _ in range(4)]
    for holder in late:
        holder.append(8)
    assert (pool.num_rows, pool.num_free) == (MIN_GROWTH, 0)
    late[0].append(1)
    assert pool.num_rows > MIN_GROWTH
    check(pool, stores, [*holders, *late])


def test_a_layer_that_cannot_grow_leaves_the_books_right() -> None:
    stores = [Store(), Store()]
    pool = ExactRowPool(stores)
    holder = Holder(pool, stores)
    holder.append(3)
    stores[1].refuses = True
    others: list[Any] = []
    with pytest.raises(Refused):
        while True:
            others.append(Holder(pool, stores))
            others[-1].append(20)
    stores[1].refuses = False
    pool.check_integrity()
    others[-1].append(20)
    check(pool, stores, [holder, *others])


def test_regions_are_released_once() -> None:
    pool = ExactRowPool([Store()])
    region = ExactRegion(pool, ROW_BYTES, 8, ROOM)
    region.hold()
    region.release()
    region.release()
    with pytest.raises(AssertionError, match="released twice"):
        region.release()
