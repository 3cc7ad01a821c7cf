"""Layers' arrays grow with few waits, and with few of the old ones alive at once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from turboquant_kv.cache.growth import grow_stores


class Store:
    """A layer whose copy is pending until somebody asks for it."""

    def __init__(self, held: int, *, refuses: bool = False) -> None:
        self.held, self.refuses, self.pending = held, refuses, mx.zeros(1)

    def grow(self) -> None:
        if self.refuses:
            raise MemoryError
        self.pending = self.pending + 1

    def pending_arrays(self) -> list[mx.array]:
        return [self.pending]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many arrays each wait was for."""
    found: list[int] = []
    wait = mx.eval

    def seen(arrays: list[Any]) -> None:
        found.append(len(arrays))
        wait(arrays)

    monkeypatch.setattr(mx, "eval", seen)
    return found


@pytest.mark.parametrize(("most", "expected"), [(1000, []), (250, [3, 3]), (99, [1] * 8)])
def test_waits_are_as_few_as_the_bound_allows(waits: list[int], most: int, expected: list[int]) -> None:
    stores = [Store(100) for _ in range(8)]
    grow_stores(stores, Store.grow, lambda store: store.held, most)
    assert waits == expected
    assert [store.pending.item() for store in stores] == [1] * 8


def test_old_arrays_go_back_to_the_system() -> None:
    """A large pool that has grown many times holds its own bytes, and not those of all that it was before."""

    class Arrays(Store):
        array = mx.zeros(1 << 20, mx.uint8)

        def grow(self) -> None:
            self.array = mx.concatenate([self.array, mx.zeros(1 << 18, mx.uint8)])

        def pending_arrays(self) -> list[mx.array]:
            return [self.array]

    stores = [Arrays(0) for _ in range(4)]
    mx.clear_cache()
    for _ in range(24):
        grow_stores(stores, Arrays.grow, lambda store: store.array.nbytes, 1 << 20)
    mx.eval([store.array for store in stores])
    assert mx.get_cache_memory() < 2 * stores[0].array.nbytes


def test_a_store_that_cannot_grow_is_told(waits: list[int]) -> None:
    stores = [Store(100), Store(100, refuses=True), Store(100)]
    with pytest.raises(MemoryError):
        grow_stores(stores, Store.grow, lambda store: store.held)
    assert [store.pending.item() for store in stores] == [1, 0, 0]
