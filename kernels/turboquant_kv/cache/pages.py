"""PagePool: the compressed pages of all layers that share one numbering, counted and shared.

A page is the same tokens in every layer of the pool, under one id: it is allocated, shared and freed once, whatever
the number of layers. Owns reference counts and byte counts. A page is written once, when it is full, and never changes
afterwards, so sharing needs no copy: a fork only counts. Its number may change, in `trim` alone, which
tells every holder. Who holds which page, in what order, is the sequence's business (sequence.py); which
free ids are taken first, free_pages.py's; how a page is stored, the backend's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol
from weakref import WeakSet

import numpy as np

from turboquant_kv.backends.base import Backend, LayerShape, LayerStore, Means, PageIds
from turboquant_kv.cache.exact_rows import ExactRowPool
from turboquant_kv.cache.free_pages import FreePages
from turboquant_kv.cache.growth import grow_stores
from turboquant_kv.cache.key_balance import KeyBalance
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
    """Allocate, share and free pages. Not thread-safe: one thread owns all caches."""

    def __init__(
        self,
        backend: Backend,
        shapes: Sequence[LayerShape],
        fmt: KVFormat,
        means: Sequence[Means | None] | None = None,
        layer_formats: Sequence[KVFormat] | None = None,
        window: int = 0,
    ) -> None:
        """One store for each layer's shape. means: calibrated ones, per layer; None: none anywhere.

        window: keys that queries of these layers see, their own included; 0: all before them (windows.py).

        layer_formats: of each layer, where some need other codecs than `fmt`; they differ from it in nothing else.
        Raises UnsupportedFormatError for a geometry that the backend has no kernel for.
        """
        self.backend, self.shapes, self.fmt, self.window = backend, tuple(shapes), fmt, window
        self.layer_formats = tuple(layer_formats) if layer_formats is not None else (fmt,) * len(self.shapes)
        for shape, layer_fmt in zip(self.shapes, self.layer_formats, strict=True):
            layer_fmt.check_dims(shape.k_dim, shape.v_dim)
        assert all(f.with_codecs(fmt.name) == fmt for f in self.layer_formats), "layers may differ in codecs alone"
        self.means = tuple(means) if means is not None else (None,) * len(self.shapes)
        factors = [None if m is None else m.key_factors for m in self.means]
        self.balances = tuple(None if f is None else KeyBalance(f) for f in factors)
        self.stores = self._new_stores()
        self.page_bytes = sum(self.layer_page_bytes(layer) for layer in range(len(self.shapes)))
        self.exact = ExactRowPool(self.stores)
        self._references: list[int] = []
        self._free = FreePages()
        self._holders: WeakSet[PageHolder] = WeakSet()
        self.epoch = 0  # changes when a conversation's length does other than by a step

    def _new_stores(self) -> list[LayerStore]:
        return [self._new_store(layer) for layer in range(len(self.shapes))]

    def _new_store(self, layer: int) -> LayerStore:
        store = self.backend.new_store(self.shapes[layer], self.layer_formats[layer], self.means[layer])
        store.window = self.window
        return store

    def layer_page_bytes(self, layer: int) -> int:
        """Bytes of one page in one layer."""
        shape = self.shapes[layer]
        return self.layer_formats[layer].page_bytes(shape.num_kv_heads, shape.k_dim, shape.v_dim)

    @property
    def num_used(self) -> int:
        return len(self._references) - len(self._free)

    @property
    def used_bytes(self) -> int:
        return self.num_used * self.page_bytes

    @property
    def exact_bytes(self) -> int:
        """Of all exact rows that sequences hold, shared ones once."""
        return self.exact.nbytes

    @property
    def num_exact_rows(self) -> int:
        """Of those, rows that hold a token."""
        return self.exact.num_filled

    @property
    def stored_bytes(self) -> int:
        """Held for pages, used or not, in all layers."""
        return sum(store.allocated_bytes for store in self.stores)

    @property
    def slack_bytes(self) -> int:
        """Held for pages and exact rows that nobody uses now, also in layers that their conversation lacks."""
        return self.stored_bytes - self.used_bytes + self.exact.num_rows * self.raw_token_bytes - self.exact_bytes

    @property
    def books(self) -> tuple[int, int, int, int]:
        """Pages in use, pages numbered, exact rows numbered, and filled."""
        return self.num_used, len(self._references), self.exact.num_rows, self.exact.num_filled

    @property
    def num_tokens(self) -> int:
        """Tokens held, shared ones once."""
        return self.num_used * self.fmt.page_tokens + self.num_exact_rows

    @property
    def raw_token_bytes(self) -> int:
        """Bytes of one uncompressed token in all layers."""
        return sum(shape.raw_token_bytes for shape in self.shapes)

    @property
    def allocated_bytes(self) -> int:
        """Pages and exact rows, used or not."""
        return self.used_bytes + self.exact_bytes + self.slack_bytes

    def allocate(self, num_pages: int) -> PageIds:
        """New page ids, held once; nothing is written yet. Raises what a store raises that cannot grow."""
        reused = self._free.take(num_pages)
        first_new = len(self._references)
        num_new = num_pages - len(reused)
        try:
            self._grow(first_new + num_new)
        except BaseException:
            self._free.put(reused)
            raise
        self._references.extend([0] * num_new)
        page_ids = np.array([*reused, *range(first_new, first_new + num_new)], dtype=np.int64)
        for page in page_ids:
            self._references[page] = 1
        return page_ids

    def reserve(self, num_pages: int) -> None:
        """Hold memory for so many new pages, so that allocating them one after the other grows no store."""
        self._grow(len(self._references) + num_pages - len(self._free))

    def hold_first(self) -> None:
        """Hold memory for page 0, which forgotten pages of a conversation are called, also while nobody has a page."""
        if not self._references:
            self._grow(1)

    def _grow(self, num_pages: int) -> None:
        short = [store for store in self.stores if num_pages > store.num_pages]
        if short:
            grow_stores(short, lambda store: store.grow(num_pages), lambda store: store.allocated_bytes)

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
        """How many sequences hold a page."""
        return self._references[page]

    def register(self, holder: PageHolder) -> None:
        """Announce a holder of pages; one that is not announced keeps pages from being moved."""
        self._holders.add(holder)

    def trim(self) -> int:
        """Move used pages and exact rows together and let go of the free ones; returns the bytes given back.

        For when another pool needs the memory; not within a step. Stores are rebuilt one after the other, so one
        layer's used bytes are needed once more meanwhile. Pages stay where somebody holds them by their present
        numbers. A failure loses nothing: exact rows move in all layers or in none, until all layers have the moved
        pages in both places the old numbers hold, and a store that cannot be rebuilt stays as large as it is.
        """
        before = self.slack_bytes
        if not before:
            return 0
        self.exact.pack()
        holders = list(self._holders)  # alive until this is done, so that no page is freed in between
        references = np.array(self._references, np.int64)
        held = np.concatenate([np.empty(0, np.int64), *(h.page_ids for h in holders)])
        if not np.array_equal(np.bincount(held, minlength=len(references)), references):
            return before - self.slack_bytes  # somebody else holds pages by their present numbers
        new_ids = _moved_together(references)
        self._move(new_ids)
        for holder in holders:
            holder.renumber(new_ids)
        used = np.flatnonzero(references)
        packed = np.zeros(len(used), np.int64)
        packed[new_ids[used]] = references[used]
        self._references, self._free = packed.tolist(), FreePages()
        for layer in range(len(self.stores)):
            self.stores[layer] = self._rebuilt(layer, len(used))
        return before - self.slack_bytes

    def _move(self, new_ids: PageIds) -> None:
        """Copy pages to their new places, which are free, in every layer."""
        old = np.flatnonzero((new_ids >= 0) & (new_ids != np.arange(len(new_ids))))
        for store in self.stores:
            for piece in _pieces(old):
                store.write(new_ids[piece], store.read(piece))

    def _rebuilt(self, layer: int, num_pages: int) -> LayerStore:
        """A layer's store that holds its first pages and no more."""
        store = self._new_store(layer)
        if num_pages:
            store.grow(num_pages)
        for piece in _pieces(np.arange(num_pages)):
            store.write(piece, self.stores[layer].read(piece))
        if self.exact.num_rows:
            store.grow_rows(self.exact.num_rows)
            store.put_rows(0, self.stores[layer].get_rows(0, self.exact.num_rows))
        return store

    def check_integrity(self) -> None:
        """Raises PageAccountingError when free list, reference counts and stores disagree."""
        zero = [page for page, count in enumerate(self._references) if count == 0]
        if zero != list(self._free) or len(zero) != len(self._free):
            raise PageAccountingError(f"{len(zero)} unreferenced pages, {len(self._free)} in the free list")
        smallest = min((store.num_pages for store in self.stores), default=len(self._references))
        if len(self._references) > smallest:
            raise PageAccountingError(f"{len(self._references)} pages given out, a store holds {smallest}")
        try:
            self.exact.check_integrity()
        except AssertionError as exc:
            raise PageAccountingError(str(exc)) from exc


def _pieces(page_ids: PageIds) -> Iterator[PageIds]:
    return (page_ids[i : i + PAGES_AT_ONCE] for i in range(0, len(page_ids), PAGES_AT_ONCE))


def _moved_together(references: PageIds) -> PageIds:
    """The new id of each page, -1 of free ones: those beyond the number of used pages fill the gaps before it."""
    used = np.flatnonzero(references)
    new_ids = np.full(len(references), -1, np.int64)
    new_ids[used] = used
    gaps = np.flatnonzero(references[: len(used)] == 0)
    new_ids[used[used >= len(used)]] = gaps
    return new_ids
