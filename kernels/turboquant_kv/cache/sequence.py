"""PagedSequence: one conversation's tokens in all layers of a pool, and LayerSequence, one layer's hold on it.

Owns the order of things: sink rows, pages, tail rows (format.py draws them). What is the same in every layer (length,
page ids, which row goes where) is decided once per step, for all conversations of a batch (step.py); each layer then
writes its own keys and values by that decision. Forking shares everything; cutting back keeps what it can exactly.

    positions   0 .. sink | sink + 0*page .. | ... | sink + P*page .. length
    held in     sink      |    page_ids[0]   | ... |   tail (exact, at most one page)

The layers of a conversation do the same things in the same order, one after the other: the first layer to append, cut
or fork does it for all, the others follow. A step that some layer never wrote (a forward pass that failed) is undone
by whatever comes next: a cut or a fork finds the state before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from weakref import ReferenceType, ref

import numpy as np

from turboquant_kv.backends.base import CanonicalPages, ExactRows, PageIds
from turboquant_kv.cache import windows
from turboquant_kv.cache.exact_rows import ExactRegion, grown
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.protocol import UnsupportedModelError
from turboquant_kv.cache.step import Append, BatchStep, Contents
from turboquant_kv.codec.format import exact_capacity

Ends = tuple[ExactRows | None, ExactRows | None]
"""Sink rows and tail rows of one layer."""


class PagedSequence:
    """One conversation; used through its layers' LayerSequence objects, which `of_layer` gives."""

    def __init__(self, pool: PagePool, layers: Iterable[int]) -> None:
        """Empty. `layers`: those of the pool that will hold this conversation."""
        self.pool = pool
        self._layers = frozenset(layers)
        self._state = Contents()
        self._num_tokens = 0
        self._uncut: dict[int, int] = {}  # lengths of layers that have not been cut yet, as others have
        self._step: BatchStep | None = None
        self._append: Append | None = None
        self._forks: list[ReferenceType[PagedSequence]] = []  # of the present state, not joined by every layer yet
        self._is_joinable = False
        pool.register(self)

    def of_layer(self, layer: int) -> LayerSequence:
        """One layer's hold on it."""
        return LayerSequence(self, layer)

    @property
    def layers(self) -> frozenset[int]:
        """Those that hold it."""
        return self._layers

    @property
    def open_step(self) -> BatchStep | None:
        """The step that some of its layers have written and others have not."""
        return self._step

    def length_of(self, layer: int) -> int:
        """Tokens that a layer has."""
        if layer not in self._layers:
            return 0
        if self._step is not None and not self._step.has_written(self, layer):
            assert self._append is not None
            return self._append.q_start
        return self._uncut.get(layer, self._num_tokens) if self._uncut else self._num_tokens

    @property
    def page_ids(self) -> PageIds:
        """Of the pages that it holds, from number `first_page` on."""
        return self._state.page_ids[self.first_page :]

    @property
    def forgotten(self) -> int:
        """Position of the first token that it still has; 0 without a sliding window."""
        return self._state.forgotten

    @property
    def first_page(self) -> int:
        """Number of the first page that it holds."""
        return windows.first_page(self.pool.fmt, self._state.forgotten)

    def renumber(self, new_ids: PageIds) -> None:
        """The pool moved its pages: new_ids[old] is each one's new id."""
        first = self.first_page

        def moved(page_ids: PageIds) -> PageIds:
            return np.concatenate([page_ids[:first], new_ids[page_ids[first:]]])

        self._state = self._state._replace(page_ids=moved(self._state.page_ids))
        if self._append is not None:  # it failed, and nobody has undone it yet
            before = self._append.before
            self._append.before = before._replace(page_ids=moved(before.page_ids))

    @property
    def tail_start(self) -> int:
        """Position of the first tail row."""
        return self._num_tokens - self._state.num_tail

    def exact_bytes_of(self, layer: int) -> int:
        """One layer's exact rows as allocated, unused ones included."""
        regions = (self._state.sink, self._state.tail)
        rows = sum(region.capacity for region in regions if region is not None)
        return rows * self.pool.shapes[layer].raw_token_bytes

    @property
    def _row_bytes(self) -> int:
        """Of one exact row in all its layers."""
        return sum(self.pool.shapes[layer].raw_token_bytes for layer in self._layers)

    # --- appending: what a step does with one conversation (step.py)

    def pages_for(self, num_new: int) -> int:
        """Pages that a step of `num_new` rows will take; none where it has been decided."""
        if self._step is not None:
            return 0
        fmt = self.pool.fmt
        before_last = self._num_tokens + num_new - 1 - fmt.sink_tokens
        return max(0, before_last // fmt.page_tokens - len(self._state.page_ids))

    def begin(self, step: BatchStep, layer: int, num_new: int) -> Append:
        """Decide where `num_new` rows go and take what they need. What raises leaves everything as it was.

        All pages that end before the new last token are to be encoded. Raises UnsupportedModelError when the layers
        hold different numbers of tokens, or get different ones in a step.
        """
        if self._uncut:
            raise UnsupportedModelError("the layers of a conversation hold different numbers of tokens")
        if self._step is not None:
            return self._join(step, layer, num_new)
        self._forget_forks()
        fmt, state = self.pool.fmt, self._state
        append = Append(state, state, self._num_tokens, num_new)
        append.to_sink = min(max(0, fmt.sink_tokens - state.num_sink), num_new)
        try:
            if append.to_sink:
                num_sink = state.num_sink + append.to_sink
                sink = self._grown(append, state.sink, num_sink, fmt.sink_tokens)
                append.after = append.after._replace(sink=sink, num_sink=num_sink)
            if num_new > append.to_sink:
                self._extend_tail(append, num_new - append.to_sink)
        except BaseException:
            self._take_back(append)
            raise
        self._state, self._step, self._append = append.after, step, append
        self._num_tokens += num_new
        return append

    def _join(self, step: BatchStep, layer: int, num_new: int) -> Append:
        """What other layers have decided, for a step beside other conversations."""
        assert self._step is not None and self._append is not None
        if num_new != self._append.num_new or self._step.has_written(self, layer):
            raise UnsupportedModelError("the layers of a conversation got different tokens in one step")
        step.take_over(self)
        self._step = step
        return self._append

    def _grown(self, append: Append, region: ExactRegion | None, num_rows: int, most: int) -> ExactRegion:
        """A region that holds `num_rows` rows now; notes what it was before."""
        if region is not None:
            append.sizes.append((region, region.num_rows, region.capacity))
        if region is not None and not region.is_shared and region.capacity >= num_rows:
            new = region
        else:
            new = grown(region, self.pool.exact, self._row_bytes, num_rows, most)
        new.num_rows = num_rows
        return new

    def _extend_tail(self, append: Append, num_new: int) -> None:
        """Where rows behind the sink go; allocates the pages that they fill."""
        state, pool, page = append.after, self.pool, self.pool.fmt.page_tokens
        tail, num_tail = state.tail, state.num_tail
        closes = num_tail == page
        if closes:
            tail, num_tail = None, 0
        append.num_kept = num_tail
        num_rows = num_tail + num_new
        num_full = 0 if num_rows <= page else (num_rows - 1) // page  # the last page stays exact
        if closes or num_full:
            new_pages = pool.allocate(closes + num_full)
            append.closed, append.pages = new_pages[:closes], new_pages[closes:]
            append.after = state = state._replace(page_ids=np.concatenate([state.page_ids, new_pages]))
        num_left = num_rows - num_full * page
        tail = self._grown(append, None if num_full else tail, num_left, page)
        append.after = state._replace(tail=tail, num_tail=num_left)

    def commit(self) -> None:
        """All layers have written: what the step replaced is let go."""
        append = self._append
        assert append is not None
        before, state = append.before, self._state
        if before.sink is not None and before.sink is not state.sink:
            before.sink.release()
        if before.tail is not None and before.tail is not state.tail:
            before.tail.release()
        self._step = self._append = None
        if self.pool.window:
            self._forget(windows.forgotten_after(self.pool.fmt, self.pool.window, self._num_tokens))

    def _forget(self, forgotten: int) -> None:
        """Give back what stands before a page's start: no query will see it again."""
        state, first = self._state, self.first_page
        if forgotten <= state.forgotten:
            return
        last = windows.first_page(self.pool.fmt, forgotten)
        if last > first:
            self.pool.free(state.page_ids[first:last])
            kept = state.page_ids.copy()
            kept[:last] = 0
            state = state._replace(page_ids=kept)
        if state.sink is not None:
            state.sink.release()
        self._state = state._replace(sink=None, forgotten=forgotten)

    def undo(self) -> None:
        """A step that not all layers wrote never happened; without one, nothing happens."""
        append = self._append
        if append is None:
            return
        append.after = self._state  # pages may have been numbered anew
        self._take_back(append)
        self._state, self._num_tokens, self._step, self._append = append.before, append.q_start, None, None
        self.pool.epoch += 1

    def _take_back(self, append: Append) -> None:
        """Give back what a step took."""
        before, after = append.before, append.after
        for old, new in ((before.sink, after.sink), (before.tail, after.tail)):
            if new is not None and new is not old:
                new.release()
        for region, num_rows, capacity in append.sizes:
            region.num_rows = num_rows
            if region.capacity != capacity:
                region.resize(capacity)
        self.pool.free(after.page_ids[len(before.page_ids) :])

    # --- forking, cutting, releasing

    def fork(self, layer: int) -> PagedSequence:
        """The same tokens again, sharing pages and exact rows; costs no copy.

        Every layer asks once: the first makes the fork, the others join it.
        """
        self.undo()
        for candidate in self._forks:
            fork = candidate()
            if fork is not None and fork._is_joinable and layer not in fork._layers:
                break
        else:
            fork = self._new_fork()
            self._forks.append(ref(fork))
        fork._layers |= {layer}
        if len(fork._layers) == len(self._layers):
            self._forks = [r for r in self._forks if r() is not None and r() is not fork]
        return fork

    def _new_fork(self) -> PagedSequence:
        other = PagedSequence(self.pool, ())
        self.pool.share(self.page_ids)
        for region in (self._state.sink, self._state.tail):
            if region is not None:
                region.hold()
        other._state, other._num_tokens, other._is_joinable = self._state, self._num_tokens, True
        return other

    def _forget_forks(self) -> None:
        """This sequence changes: whoever forks from now on gets another fork, and nobody joins this one."""
        self._forks, self._is_joinable = [], False

    def exact_cut(self, length: int) -> int:
        """The longest n <= length to which `cut` loses nothing: any row of sink and tail, else a page's start.

        0 where a sliding window would have to see what it has forgotten.
        """
        length = min(length, self._num_tokens)
        fmt = self.pool.fmt
        if length > self._state.num_sink and length < self.tail_start:
            length = fmt.page_start((length - fmt.sink_tokens) // fmt.page_tokens)
        return length if self._has_window_of(length) else 0

    def _has_window_of(self, length: int) -> bool:
        """Whether all keys are there that a query behind `length` tokens sees."""
        return max(0, length - self.pool.window + 1) >= self._state.forgotten or length == self._num_tokens

    def cut(self, layer: int, length: int) -> None:
        """Keep a layer's first `length` tokens. A page cut in its middle comes back decoded, not exact.

        Raises UnsupportedModelError where a sliding window has forgotten what it would see from there.
        """
        self.undo()
        assert 0 <= length <= self.length_of(layer), f"cannot cut {self.length_of(layer)} tokens to {length}"
        if length < self._num_tokens:
            if length and not self._has_window_of(length):
                raise UnsupportedModelError(
                    f"a sliding window cannot go back from {self._num_tokens} tokens to {length}"
                )
            self._forget_forks()
            self._uncut = {other: self.length_of(other) for other in self._layers}
            self._cut(length)
        if self._uncut.pop(layer, None) is not None:
            self.pool.epoch += 1  # for this layer, its length changes now

    def _cut(self, length: int) -> None:
        """The first layer that is cut cuts all that they share."""
        fmt, state = self.pool.fmt, self._state
        self.pool.epoch += 1
        if length >= self.tail_start and state.num_tail:
            self._state = state._replace(num_tail=length - self.tail_start)
            self._num_tokens = length
            return
        keep, num_partial = divmod(max(0, length - fmt.sink_tokens), fmt.page_tokens)
        tail = self._decoded(state.page_ids[keep : keep + 1], keep, num_partial) if num_partial else None
        if state.tail is not None:
            state.tail.release()
        self.pool.free(state.page_ids[max(keep, self.first_page) :])
        num_sink, forgotten = min(state.num_sink, length), state.forgotten if length else 0
        self._state = Contents(state.sink, num_sink, state.page_ids[:keep], tail, num_partial, forgotten)
        self._num_tokens = length

    def _decoded(self, page_ids: PageIds, number: int, num_rows: int) -> ExactRegion:
        """The first rows of one page, the conversation's page `number`, as a tail."""
        region = self._new_region(num_rows, self.pool.fmt.page_tokens)
        for layer in sorted(self._layers):
            k, v = self.pool.stores[layer].decode(page_ids, number)
            self.pool.stores[layer].put_rows(region.first, ExactRows(k[:, :num_rows], v[:, :num_rows]))
        return region

    def _new_region(self, num_rows: int, most: int) -> ExactRegion:
        region = ExactRegion(self.pool.exact, self._row_bytes, exact_capacity(num_rows, most), most)
        region.num_rows = num_rows
        return region

    def release(self, layer: int) -> None:
        """A layer lets go; with the last one, pages and exact rows go back. Idempotent."""
        if layer not in self._layers:
            return
        self._forget_forks()
        self.pool.epoch += 1
        self._layers -= {layer}
        self._uncut.pop(layer, None)
        if not self._layers:
            self._release_all()

    def _release_all(self) -> None:
        self.undo()
        held, state = self.page_ids, self._state
        self._state, self._num_tokens, self._uncut = Contents(), 0, {}
        self.pool.free(held)
        for region in (state.sink, state.tail):
            if region is not None:
                region.release()

    def __del__(self) -> None:
        """For programs that drop caches instead of releasing them; the server never relies on it."""
        if hasattr(self, "_is_joinable"):
            self._release_all()

    # --- whole contents

    def exact_ends(self, layer: int) -> Ends:
        """A layer's sink rows and tail rows, copied."""
        state, store = self._state, self.pool.stores[layer]
        sink = store.get_rows(state.sink.first, state.num_sink) if state.sink is not None and state.num_sink else None
        tail = store.get_rows(state.tail.first, state.num_tail) if state.tail is not None and state.num_tail else None
        return sink, tail

    def fill(self, page_ids: PageIds, ends: Mapping[int, Ends], forgotten: int = 0) -> None:
        """Take over pages of this pool and, per layer, copies of exact ends, into an empty sequence.

        All layers must bring the same numbers of rows. forgotten: position of the first token that is there; pages
        are those from the one on that holds it.
        """
        assert self._num_tokens == 0, "only an empty sequence can be filled"
        fmt, (sink, tail) = self.pool.fmt, next(iter(ends.values()))
        num_sink, num_tail = (0 if rows is None else rows.num_rows for rows in (sink, tail))
        page_ids = np.concatenate([np.zeros(windows.first_page(fmt, forgotten), np.int64), page_ids])
        self._state = self._state._replace(page_ids=page_ids, forgotten=forgotten)
        kept_sink = self._copied(num_sink, fmt.sink_tokens, {layer: end[0] for layer, end in ends.items()})
        kept_tail = self._copied(num_tail, fmt.page_tokens, {layer: end[1] for layer, end in ends.items()})
        if forgotten >= fmt.sink_tokens > 0:
            num_sink = fmt.sink_tokens
        self._num_tokens = num_sink + len(page_ids) * fmt.page_tokens + num_tail
        self._state = Contents(kept_sink, num_sink, page_ids, kept_tail, num_tail, forgotten)
        self.pool.epoch += 1

    def _copied(self, num_rows: int, most: int, rows: Mapping[int, ExactRows | None]) -> ExactRegion | None:
        if not num_rows:
            return None
        region = self._new_region(num_rows, most)
        for layer, of_layer in rows.items():
            assert of_layer is not None and of_layer.num_rows == num_rows, "layers bring different numbers of rows"
            self.pool.stores[layer].put_rows(region.first, of_layer)
        return region


class LayerSequence:
    """One layer's hold on a conversation: forked, cut, released. Steps append to it (step.py)."""

    __slots__ = ("layer", "shared")

    def __init__(self, shared: PagedSequence, layer: int) -> None:
        self.shared, self.layer = shared, layer

    def __len__(self) -> int:
        return self.shared.length_of(self.layer)

    @property
    def pool(self) -> PagePool:
        return self.shared.pool

    @property
    def page_ids(self) -> PageIds:
        return self.shared.page_ids

    @property
    def first_page(self) -> int:
        return self.shared.first_page

    @property
    def forgotten(self) -> int:
        return self.shared.forgotten

    @property
    def tail_start(self) -> int:
        return self.shared.tail_start

    @property
    def compressed_bytes(self) -> int:
        """Of its pages in this layer."""
        return len(self.shared.page_ids) * self.shared.pool.layer_page_bytes(self.layer)

    @property
    def exact_bytes(self) -> int:
        """Exact buffers of this layer as allocated, unused rows included."""
        return self.shared.exact_bytes_of(self.layer)

    def fork(self) -> LayerSequence:
        """The same tokens again, sharing pages and exact rows; costs no copy."""
        return LayerSequence(self.shared.fork(self.layer), self.layer)

    def exact_cut(self, length: int) -> int:
        """As PagedSequence.exact_cut."""
        return self.shared.exact_cut(length)

    def cut(self, length: int) -> None:
        """As PagedSequence.cut."""
        self.shared.cut(self.layer, length)

    def release(self) -> None:
        """Let go; idempotent."""
        self.shared.release(self.layer)

    def exact_ends(self) -> Ends:
        """Sink rows and tail rows, copied."""
        return self.shared.exact_ends(self.layer)

    def pages(self) -> CanonicalPages:
        """Copies of its pages in the canonical layout."""
        return self.shared.pool.stores[self.layer].read(self.shared.page_ids)
