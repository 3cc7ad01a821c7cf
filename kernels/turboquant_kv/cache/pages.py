"""PagePool: the compressed pages of one layer, counted and shared.

Owns reference counts and byte counts. A page is written once, when it is full, and never changes
afterwards, so sharing needs no copy: a fork only counts. Its number may change, in `trim` alone, which
tells every holder. Who holds which page, in what order, is the sequence's business (sequence.py); which
free ids are taken first, free_pages.py's; how a page is stored, the backend's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet

import numpy as np

from turboquant_kv.backends.base import Array, Backend, CanonicalPages, LayerShape, Means, PageIds, PageStorage
from turboquant_kv.cache.free_pages import FreePages
from turboquant_kv.codec.format import KVFormat


class PageAccountingError(AssertionError):
    """The pool's books do not agree: a bug in this project."""


# Copied at once when a pool is rebuilt: 64 pages of 64 tokens x 8 heads x 128 dims are 2 MiB as 4-bit codes.
PAGES_AT_ONCE = 64


class PageHolder(Protocol):
    """Whoever keeps page ids, and learns their new numbers when pages move."""

    @property
    def page_ids(self) -> PageIds: ...

    def renumber(self, new_ids: PageIds) -> None:
        """new_ids[old] is the new id of each page."""
        ...


class PagePool:
    """Allocate, share and free pages of one layer. Not thread-safe: one thread owns all caches."""

    def __init__(self, backend: Backend, shape: LayerShape, fmt: KVFormat, means: Means | None) -> None:
        self.backend, self.shape, self.fmt, self.means = backend, shape, fmt, means
        self.storage = backend.new_storage(shape, fmt, means)
        self.page_bytes = fmt.page_bytes(shape.num_kv_heads, shape.k_dim, shape.v_dim)
        self.exact_bytes = 0  # of all live ExactBlocks of this layer; kept by them
        self.num_exact_rows = 0  # of those, rows that hold a token
        self._references: list[int] = []
        self._free = FreePages()
        self._holders: WeakSet[PageHolder] = WeakSet()

    @property
    def num_used(self) -> int:
        return len(self._references) - len(self._free)

    @property
    def used_bytes(self) -> int:
        return self.num_used * self.page_bytes

    @property
    def slack_bytes(self) -> int:
        """Held for pages that nobody uses now."""
        return self.storage.allocated_bytes - self.used_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens held, shared ones once."""
        return self.num_used * self.fmt.page_tokens + self.num_exact_rows

    @property
    def allocated_bytes(self) -> int:
        """Pages (used or not) and exact rows of this layer."""
        return self.storage.allocated_bytes + self.exact_bytes

    def encode(self, k: Array, v: Array) -> PageIds:
        """Compress whole pages: k (H, P*page, D), v (H, P*page, Dv). Returns P new page ids, held once."""
        num_rows = k.shape[1]
        assert num_rows % self.fmt.page_tokens == 0, "only whole pages are encoded"
        page_ids = self._allocate(num_rows // self.fmt.page_tokens)
        try:
            self.storage.encode(page_ids, k, v)
        except BaseException:
            self.free(page_ids)
            raise
        return page_ids

    def restore(self, pages: CanonicalPages) -> PageIds:
        """Write saved pages into new ones. Raises ValueError when they are of another format."""
        pages.check(self.shape, self.fmt)
        page_ids = self._allocate(pages.num_pages)
        if len(page_ids):
            self.storage.write(page_ids, pages)
        return page_ids

    def share(self, page_ids: Iterable[int]) -> None:
        """Hold pages once more."""
        for page in page_ids:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._references[page] += 1

    def free(self, page_ids: Iterable[int]) -> None:
        """Give one hold of each page back; pages that nobody holds can be allocated again."""
        unused: list[int] = []
        for page in page_ids:
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} was freed twice"
            if self._references[page] == 0:
                unused.append(int(page))
        self._free.put(unused)

    def references(self, page: int) -> int:
        return self._references[page]

    def register(self, holder: PageHolder) -> None:
        """Announce a holder of pages; one that is not announced keeps pages from being moved."""
        self._holders.add(holder)

    def trim(self) -> int:
        """Rebuild the storage without its free pages; returns the bytes given back.

        For when another pool needs the memory. Pages are copied into new storage, so this layer's used
        bytes are needed once more meanwhile; when that fails, everything is as before.
        """
        before = self.storage.allocated_bytes
        if not self.slack_bytes:
            return 0
        holders = list(self._holders)  # alive until this is done, so that no page is freed in between
        references = np.array(self._references, np.int64)
        held = np.concatenate([np.empty(0, np.int64), *(h.page_ids for h in holders)])
        if not np.array_equal(np.bincount(held, minlength=len(references)), references):
            return 0  # somebody else holds pages by their present numbers
        used = np.flatnonzero(references)
        self.storage = self._copied(used)
        new_ids = np.full(len(references), -1, np.int64)
        new_ids[used] = np.arange(len(used))
        for holder in holders:
            holder.renumber(new_ids)
        self._references, self._free = references[used].tolist(), FreePages()
        return before - self.storage.allocated_bytes

    def _copied(self, page_ids: PageIds) -> PageStorage:
        """New storage that holds just these pages, in this order."""
        storage = self.backend.new_storage(self.shape, self.fmt, self.means)
        if len(page_ids):
            storage.grow(len(page_ids))
        for start in range(0, len(page_ids), PAGES_AT_ONCE):
            piece = page_ids[start : start + PAGES_AT_ONCE]
            storage.write(np.arange(start, start + len(piece)), self.storage.read(piece))
        return storage

    def check_integrity(self) -> None:
        """Raises PageAccountingError when free list, reference counts and storage disagree."""
        zero = [page for page, count in enumerate(self._references) if count == 0]
        if zero != list(self._free) or len(zero) != len(self._free):
            raise PageAccountingError(f"{len(zero)} unreferenced pages, {len(self._free)} in the free list")
        if len(self._references) > self.storage.num_pages:
            raise PageAccountingError(
                f"{len(self._references)} pages given out, storage holds {self.storage.num_pages}"
            )

    def _allocate(self, num_pages: int) -> PageIds:
        reused = self._free.take(num_pages)
        first_new = len(self._references)
        num_new = num_pages - len(reused)
        try:
            self.storage.grow(first_new + num_new)
        except BaseException:
            self._free.put(reused)
            raise
        self._references.extend([0] * num_new)
        page_ids = np.array([*reused, *range(first_new, first_new + num_new)], dtype=np.int64)
        for page in page_ids:
            self._references[page] = 1
        return page_ids
