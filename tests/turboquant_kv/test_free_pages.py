"""Which pages a pool hands out, and how whole runs of them are written."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.choice import choose_backend
from turboquant_kv.backends.gpu.backend import MAX_SLICES, OpenArrays
from turboquant_kv.backends.page_runs import runs_of
from turboquant_kv.cache.free_pages import FreePages
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.scalar import ScalarCodec

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
        pool.stores[0].encode(ids, 0, rows, rows)
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


def operations(x: mx.array, folder: Path) -> list[str]:
    """Names of the operations that will compute x."""
    mx.export_to_dot(str(folder / "graph.dot"), x)
    text = (folder / "graph.dot").read_text()
    return [name for name in ("SliceUpdate", "Scatter") for _ in range(text.count(f'label ="{name}"'))]


def written(arrays: OpenArrays, ids: list[int], rng: np.random.Generator) -> None:
    """Random pages by put_whole, compared with what is read."""
    codes = rng.integers(0, 256, (len(ids), 2, 16, 32)).astype(np.uint8)
    scales = rng.standard_normal((len(ids), 2, 16)).astype(np.float16)
    arrays.put_whole(np.array(ids), mx.array(codes), mx.array(scales))
    got = arrays.get(np.array(ids))
    assert np.array_equal(np.array(got[0]), codes)
    assert np.array_equal(np.array(got[1]), scales)


def test_few_runs_are_slices_and_many_a_scatter(rng: np.random.Generator, tmp_path: Path) -> None:
    arrays = OpenArrays(2, 64, ScalarCodec(4), 16)
    arrays.grow(40)
    rows = mx.zeros((6, 2, 16, 32), mx.uint8), mx.zeros((6, 2, 16), mx.float16)
    for ids, want in (
        ([3, 4, 5, 6, 7, 8], ["SliceUpdate"]),
        ([20, 21, 3, 4, 9, 8], ["SliceUpdate"] * 4),
        ([1, 3, 5, 7, 9, 11], ["Scatter"]),
    ):
        assert len(runs_of(np.array(ids))) <= MAX_SLICES or want == ["Scatter"]
        written(arrays, ids, rng)
        mx.eval(arrays.codes, arrays.scales)
        arrays.put_whole(np.array(ids), *rows)
        assert operations(arrays.codes, tmp_path) == operations(arrays.scales, tmp_path) == want
        mx.eval(arrays.codes, arrays.scales)


def test_pages_are_written_where_they_lie() -> None:
    """No copy of a pool for a few of its pages."""
    arrays = OpenArrays(8, 128, ScalarCodec(8), 64)
    arrays.grow(100)
    rows = mx.ones((4, 8, 64, 128), mx.uint8), mx.ones((4, 8, 64), mx.float16)
    mx.eval(arrays.codes, arrays.scales, *rows)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    arrays.put_whole(np.array([7, 8, 90, 91]), *rows)
    mx.eval(arrays.codes, arrays.scales)
    assert mx.get_peak_memory() - before < arrays.codes.nbytes // 4
    assert mx.sum(arrays.codes.astype(mx.int32)).item() == rows[0].size
