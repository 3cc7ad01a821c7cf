"""LayerSequence: one conversation's tokens in one layer.

Owns the order of things: sink rows, pages, tail rows (format.py draws them). Appending encodes
pages as they are left behind; forking shares everything; cutting back keeps what it can exactly.

    positions   0 .. sink | sink + 0*page .. | ... | sink + P*page .. length
    held in     sink block|    page ids[0]   | ... |   tail block (exact, at most one page)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from turboquant_kv.backends.base import Array, CanonicalPages, ExactRows, PageIds, SequenceView
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.codec.format import exact_capacity

NO_PAGES: PageIds = np.empty(0, np.int64)


class ExactBlock:
    """A buffer of exact rows, k (H, capacity, D) and v (H, capacity, Dv), counted in its pool's bytes.

    Shared between forks as long as nobody writes: `LayerSequence` copies before the first write.
    """

    def __init__(self, pool: PagePool, k: Array, v: Array) -> None:
        self._pool, self.k, self.v = pool, k, v
        self.nbytes = k.nbytes + v.nbytes
        self.capacity = int(k.shape[1])
        self._num_rows = 0
        pool.exact_bytes += self.nbytes

    @classmethod
    def empty(cls, pool: PagePool, capacity: int) -> ExactBlock:
        shape, backend = pool.shape, pool.backend
        return cls(
            pool,
            backend.empty_rows(shape.num_kv_heads, capacity, shape.k_dim, shape.dtype),
            backend.empty_rows(shape.num_kv_heads, capacity, shape.v_dim, shape.dtype),
        )

    def copy(self, num_rows: int, capacity: int) -> ExactBlock:
        """A new block with the first rows of this one."""
        block = ExactBlock.empty(self._pool, capacity)
        block.write(0, self.k[:, :num_rows], self.v[:, :num_rows])
        return block

    def write(self, start: int, k: Array, v: Array) -> None:
        self.k = self._pool.backend.write_rows(self.k, start, k)
        self.v = self._pool.backend.write_rows(self.v, start, v)
        self._pool.num_exact_rows += start + k.shape[1] - self._num_rows
        self._num_rows = start + k.shape[1]

    def rows(self, first_position: int, num_rows: int) -> ExactRows:
        return ExactRows(first_position, self.k, self.v, num_rows)

    def __del__(self) -> None:
        self._pool.exact_bytes -= self.nbytes
        self._pool.num_exact_rows -= self._num_rows


@dataclass(slots=True)
class _Exact:
    """A region's rows in use, its block (None while empty) and whether a fork may see that block."""

    block: ExactBlock | None = None
    num_rows: int = 0
    shared: bool = False

    def append(self, pool: PagePool, most: int, k: Array, v: Array) -> None:
        """Add rows to a region of at most `most`; a block that is too small or shared is replaced."""
        num_rows = self.num_rows + k.shape[1]
        block = self.block
        if block is None:
            block = ExactBlock.empty(pool, exact_capacity(num_rows, most))
        elif self.shared or block.capacity < num_rows:
            block = block.copy(self.num_rows, max(exact_capacity(num_rows, most), block.capacity))
        block.write(self.num_rows, k, v)
        self.block, self.num_rows, self.shared = block, num_rows, False

    def fork(self) -> _Exact:
        self.shared = self.block is not None
        return _Exact(self.block, self.num_rows, self.shared)

    def rows(self, start: int) -> ExactRows | None:
        return None if self.block is None or not self.num_rows else self.block.rows(start, self.num_rows)

    @property
    def nbytes(self) -> int:
        return self.block.nbytes if self.block is not None else 0


class LayerSequence:
    """Tokens of one conversation in one layer; appended to, attended over, forked, cut, released."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._sink, self._tail = _Exact(), _Exact()
        self._pages: PageIds = NO_PAGES
        self._released = False
        pool.register(self)

    def __len__(self) -> int:
        return self._sink.num_rows + len(self._pages) * self.pool.fmt.page_tokens + self._tail.num_rows

    @property
    def page_ids(self) -> PageIds:
        return self._pages

    def renumber(self, new_ids: PageIds) -> None:
        """The pool moved its pages: new_ids[old] is each one's new id."""
        self._pages = new_ids[self._pages]

    @property
    def tail_start(self) -> int:
        """Position of the first tail row."""
        return len(self) - self._tail.num_rows

    @property
    def compressed_bytes(self) -> int:
        return len(self._pages) * self.pool.page_bytes

    @property
    def exact_bytes(self) -> int:
        """Exact buffers as allocated, unused rows included."""
        return self._sink.nbytes + self._tail.nbytes

    def append(self, k: Array, v: Array) -> SequenceView:
        """Add tokens k (H, T, D), v (H, T, Dv); returns the view their queries attend over.

        All pages that end before the new last token are encoded here.
        """
        fmt = self.pool.fmt
        if k.shape[1] == 1 and self._sink.num_rows == fmt.sink_tokens:
            return self._append_one(k, v)
        q_start, num_queries = len(self), k.shape[1]
        to_sink = min(max(0, fmt.sink_tokens - self._sink.num_rows), num_queries)
        if to_sink:
            self._sink.append(self.pool, fmt.sink_tokens, k[:, :to_sink], v[:, :to_sink])
            k, v = k[:, to_sink:], v[:, to_sink:]
        window = self._extend_window(k, v)
        return SequenceView(q_start, num_queries, self._pages, self._sink.rows(0), window)

    def _append_one(self, k: Array, v: Array) -> SequenceView:
        """As `append` for one token behind a full sink: what each layer does in each decode step, and no more."""
        fmt, tail = self.pool.fmt, self._tail
        if tail.num_rows == fmt.page_tokens:
            self._encode_tail()
            tail = self._tail
        start = fmt.page_start(len(self._pages))
        position = start + tail.num_rows
        tail.append(self.pool, fmt.page_tokens, k, v)
        return SequenceView(position, 1, self._pages, self._sink.rows(0), tail.rows(start))

    def _extend_window(self, k: Array, v: Array) -> ExactRows | None:
        """Append behind the sink; returns exact rows from the first new token's page on."""
        fmt = self.pool.fmt
        num_new = k.shape[1]
        if num_new == 0:
            return None
        if self._tail.num_rows == fmt.page_tokens:
            self._encode_tail()
        start = self.tail_start
        if self._tail.num_rows + num_new <= fmt.page_tokens:
            self._tail.append(self.pool, fmt.page_tokens, k, v)
            return self._tail.rows(start)
        old = self._tail.rows(start)
        join = self.pool.backend.concatenate
        rows_k = k if old is None else join([old.k, k])
        rows_v = v if old is None else join([old.v, v])
        num_full = (rows_k.shape[1] - 1) // fmt.page_tokens * fmt.page_tokens  # the last page stays exact
        new_pages = self.pool.encode(rows_k[:, :num_full], rows_v[:, :num_full])
        self._pages = np.concatenate([self._pages, new_pages])
        self._tail = _Exact()
        self._tail.append(self.pool, fmt.page_tokens, rows_k[:, num_full:], rows_v[:, num_full:])
        return ExactRows(start, rows_k, rows_v)

    def _encode_tail(self) -> None:
        rows = self._tail.rows(0)
        assert rows is not None
        self._pages = np.concatenate([self._pages, self.pool.encode(rows.k, rows.v)])
        self._tail = _Exact()

    def fork(self) -> LayerSequence:
        """The same tokens again, sharing pages and exact rows; costs no copy."""
        other = LayerSequence(self.pool)
        self.pool.share(self._pages)
        other._pages = self._pages
        other._sink, other._tail = self._sink.fork(), self._tail.fork()
        return other

    def exact_cut(self, length: int) -> int:
        """The longest n <= length to which `cut` loses nothing: any row of sink and tail, else a page's start."""
        length = min(length, len(self))
        fmt = self.pool.fmt
        if length <= self._sink.num_rows or length >= self.tail_start:
            return length
        return fmt.page_start((length - fmt.sink_tokens) // fmt.page_tokens)

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens. A page cut in its middle comes back decoded, not exact."""
        assert 0 <= length <= len(self), f"cannot cut {len(self)} tokens to {length}"
        fmt = self.pool.fmt
        if length >= self.tail_start and self._tail.num_rows:
            self._tail.num_rows = length - self.tail_start
            return
        self._tail = _Exact()
        keep, partial = divmod(max(0, length - fmt.sink_tokens), fmt.page_tokens)
        if partial:
            k, v = self.pool.storage.decode(self._pages[keep : keep + 1])
            self._tail.append(self.pool, fmt.page_tokens, k[:, :partial], v[:, :partial])
        self.pool.free(self._pages[keep:])
        self._pages = self._pages[:keep]
        self._sink.num_rows = min(self._sink.num_rows, length)

    def release(self) -> None:
        """Give pages and exact rows back; idempotent. Also happens when the object dies."""
        if self._released:
            return
        self._released = True
        self.pool.free(self._pages)
        self._pages = NO_PAGES
        self._sink, self._tail = _Exact(), _Exact()

    def __del__(self) -> None:
        if hasattr(self, "_released"):
            self.release()

    def pending_arrays(self) -> list[Array]:
        """Exact rows' arrays, for backends that compute lazily."""
        return [a for e in (self._sink, self._tail) if e.block is not None for a in (e.block.k, e.block.v)]

    def save(self) -> tuple[ExactRows | None, CanonicalPages, ExactRows | None]:
        """Sink rows, pages in canonical layout, tail rows."""
        sink, tail = self.exact_ends()
        return sink, self.pool.storage.read(self._pages), tail

    def load(self, sink: ExactRows | None, pages: CanonicalPages, tail: ExactRows | None) -> None:
        """Inverse of save, into an empty sequence. Raises ValueError when the pages are of another format."""
        self.fill(sink, [self.pool.restore(pages)], tail)

    def fill(self, sink: ExactRows | None, pages: Iterable[PageIds], tail: ExactRows | None) -> None:
        """Take over pages of this pool and copies of exact rows, into an empty sequence."""
        assert len(self) == 0, "only an empty sequence can be filled"
        fmt = self.pool.fmt
        if sink is not None:
            self._sink.append(self.pool, fmt.sink_tokens, sink.k, sink.v)
        for page_ids in pages:  # one by one: when making the next ones fails, these are given back with the sequence
            self._pages = np.concatenate([self._pages, page_ids])
        if tail is not None:
            self._tail.append(self.pool, fmt.page_tokens, tail.k, tail.v)

    def exact_ends(self) -> tuple[ExactRows | None, ExactRows | None]:
        """Sink rows and tail rows."""
        return self._sink.rows(0), self._tail.rows(self.tail_start)
