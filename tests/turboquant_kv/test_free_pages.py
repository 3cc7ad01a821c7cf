"""Which pages a pool hands out."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv.histories import encode_pages

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.backends.page_runs import runs_of
from turboquant_kv.cache.free_pages import FreePages
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.codec.format import KVFormat

FMT = KVFormat(page_tokens=16, sink_tokens=8)


def test_the_shortest_run_that_is_long_enough_comes_first() -> None:
    free = FreePages()
    free.put([9, 8, 1, 2, 3, 20, 21, 22, 5])
    assert free.take(2) == [8, 9]
    assert free.take(2) == [1, 2], "the first among equals"
    assert free.take(1) == [3]
    free.put([9, 1, 8, 2, 3])
    assert free.take(5) == [1, 2, 3, 8, 9], "the longest one, then one that fits the rest"
    assert list(free) == [5, 20, 21, 22]
    assert free.take(9) == [5, 20, 21, 22]
    assert (free.take(1), len(free)) == ([], 0)


def test_books_agree_after_any_calls(rng: np.random.Generator) -> None:
    """Against a plain set: nothing is given twice, runs are maximal, the same calls give the same ids."""
    free, twin, want, held = FreePages(), FreePages(), set(range(200)), list[int]()
    for pages in (free, twin):
        pages.put(range(200))
    for _ in range(300):
        if rng.random() < 0.5:
            taken = free.take(int(rng.integers(1, 12)))
            assert taken == twin.take(len(taken)) == sorted(taken)
            assert want.issuperset(taken)
            want.difference_update(taken)
            held += taken
        else:
            rng.shuffle(held)
            num_back = int(rng.integers(0, 15))
            back, held = held[:num_back], held[num_back:]
            for pages in (free, twin):
                pages.put(back)
            want.update(back)
        assert list(free) == sorted(want)
        assert len(free) == len(want)
        lengths = sorted(stop - start for start, stop in runs_of(np.array(sorted(want))))
        assert [length for length, _ in free._by_length] == lengths


@pytest.mark.parametrize("backend", ["cpu-numpy", "mlx-ops"])
def test_a_prompt_takes_one_run_of_what_others_left(backend: str, rng: np.random.Generator) -> None:
    """Pages given back in any order are one run again; a pool grows only when all free ids are taken."""
    chosen = choose_backend(backend)
    pool = PagePool(chosen, [LayerShape(1, 64, 64, mx.float32)], FMT)

    def encode(num_pages: int) -> list[int]:
        rows = chosen.from_mlx(mx.array(rng.standard_normal((1, num_pages * 16, 64)).astype(np.float32)))
        ids = pool.allocate(num_pages)
        encode_pages(pool.stores[0], ids, 0, rows, rows)
        pool.check_integrity()
        return [int(page) for page in ids]

    first, second, third = encode(4), encode(1), encode(6)
    assert (first, second, third) == ([0, 1, 2, 3], [4], [5, 6, 7, 8, 9, 10])
    pool.free(rng.permutation(third))
    pool.free(rng.permutation(first))
    pool.check_integrity()
    assert encode(5) == [5, 6, 7, 8, 9]
    assert encode(1) == [10], "single pages fill the gaps"
    assert encode(6) == [0, 1, 2, 3, 11, 12]
    pool.share([11])
    pool.free([11, 11, 12, 10])
    assert encode(3) == [10, 11, 12]


class NoMemory(Exception):
    pass


def test_what_could_not_be_had_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PagePool(choose_backend("cpu-numpy"), [LayerShape(1, 64, 64, mx.float32)] * 2, FMT)
    pool.free(pool.allocate(3)[1:])

    def refuse(num_pages: int) -> None:
        raise NoMemory

    monkeypatch.setattr(pool.stores[1], "grow", refuse)
    with pytest.raises(NoMemory):
        pool.allocate(3)
    pool.check_integrity()
    assert list(pool._free) == [1, 2]
