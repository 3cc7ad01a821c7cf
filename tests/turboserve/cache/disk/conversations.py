"""Small made-up conversations for the store: deterministic by number, and with beginnings in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from turboserve.cache.disk import DiskStore

MiB = 1 << 20
PAGE_ITEMS = 4  # items of a piece along the cut axis


def conversation(number: int, num_pages: int = 10, branch: int = 0) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    """Meta, header and arrays. Numbers differ everywhere, branches of one number only after their eighth page."""
    trunk, own = np.random.default_rng(number), np.random.default_rng((number, branch + 1))

    def pages(shape: tuple[int, ...], dtype: Any) -> Any:
        common = trunk.integers(0, 255, (8, *shape)).astype(dtype)
        return np.concatenate([common, own.integers(0, 255, (40, *shape)).astype(dtype)])[:num_pages]

    arrays = [
        pages((2, 64, 32), np.uint8),
        pages((2, 64), np.float16),
        np.moveaxis(pages((2, 16), np.float32), 0, 1)[None],  # (1, 2, pages, 16), cut along its third axis
        own.integers(0, 2**16, (2, 5, 8)).astype(np.uint16),
        np.zeros((2, 0, 8), np.float32),
    ]
    cuts = [[0, PAGE_ITEMS], [0, PAGE_ITEMS], [2, PAGE_ITEMS], None, None]
    described = [{"dtype": str(a.dtype), "shape": list(a.shape), "cut": c} for a, c in zip(arrays, cuts, strict=True)]
    meta = {"salt": "caller", "number": number, "tokens": list(range(num_pages))}
    return meta, {"version": 1, "arrays": described}, arrays


def open_store(path: Path, **changes: Any) -> DiskStore:
    options: dict[str, Any] = {"limit_bytes": 64 * MiB, "write_rate": 1e12, "fingerprint": "model"}
    return DiskStore(path, **(options | changes))


def assert_holds(store: DiskStore, key: str, wanted: tuple[Any, Any, list[Any]]) -> None:
    got = store.get(key)
    assert got is not None
    assert got[:2] == wanted[:2]
    for mine, its in zip(got[2], wanted[2], strict=True):
        assert mine.dtype == its.dtype
        assert np.array_equal(mine, its)


def file_bytes(store: Path, keep: Callable[[Path], bool] = lambda _: True) -> int:
    """Of the store's data files."""
    return sum(p.stat().st_size for p in store.rglob("*.safetensors*") if keep(p))


def close_clean(store: DiskStore) -> None:
    """Write everything, check the books against the folder, close."""
    assert store.flush(20)
    store.check_integrity()
    assert store.status().num_bytes == file_bytes(store.path)
    store.close()
