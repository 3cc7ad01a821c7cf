"""PagedSequence: one conversation's tokens in all layers of a pool, and LayerSequence, one layer's hold on it.

Owns the order of things: sink rows, pages, tail rows (format.py draws them). What is the same in every layer (length,
page ids, which row goes where) is decided once per step; each layer then writes its own keys and values by that
decision. Forking shares everything; cutting back keeps what it can exactly.

    positions   0 .. sink | sink + 0*page .. | ... | sink + P*page .. length
    held in     sink      |    page_ids[0]   | ... |   tail (exact, at most one page)

The layers of a conversation do the same things in the same order, one after the other: the first layer to append, cut
or fork does it for all, the others follow. A step that some layer never wrote (a forward pass that failed) is undone
by whatever comes next: a cut or a fork finds the state before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ReferenceType, ref

import numpy as np

from turboquant_kv.backends.base import Array, CanonicalPages, ExactRows, PageIds, SequenceView
from turboquant_kv.cache.exact_rows import ExactRegion, grown
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.protocol import UnsupportedModelError
from turboquant_kv.codec.format import exact_capacity

NO_PAGES: PageIds = np.empty(0, np.int64)


def _no_pages() -> PageIds:
    return NO_PAGES


class _State(NamedTuple):
    """Where a conversation's tokens are; regions are None while empty."""

    sink: ExactRegion | None = None
    num_sink: int = 0
    page_ids: PageIds = NO_PAGES
    tail: ExactRegion | None = None
    num_tail: int = 0


@dataclass(slots=True)
class Append:
    """One step's decision for one conversation: what every layer does with its new rows.

    to_sink rows go to the sink from row sink_at on. The others go to the tail from row tail_at on, unless they and the
    tail before them fill pages: then both are joined, the first rows are encoded as `pages`, the rest is the new tail.
    """

    before: _State | None  # until all layers have written
    num_layers: int  # that have not written yet
    q_start: int
    num_new: int
    sink_at: int = 0
    to_sink: int = 0
    closed: PageIds = field(default_factory=_no_pages)  # the full tail before this step, left behind as a page
    pages: PageIds = field(default_factory=_no_pages)
    num_joined: int = 0  # rows of the tail before, which the new ones follow
    tail_at: int = 0
    window_start: int = 0


class PagedSequence:
    """One conversation; used through its layers' LayerSequence objects, which `of_layer` gives."""

    def __init__(self, pool: PagePool, layers: Iterable[int]) -> None:
        """Empty. `layers`: those of the pool that will hold this conversation."""
        self.pool = pool
        self._layers = set(layers)
        self._state = _State()
        self._num_tokens = 0
        self._lengths = [0] * len(pool.shapes)  # of each layer: behind the others within a step or a cut
        self._step: Append | None = None
        self.last_append: Append | None = None
        self._forks: list[ReferenceType[PagedSequence]] = []  # of the present state, not joined by every layer yet
        self._is_joinable = False
        pool.register(self)

    def of_layer(self, layer: int) -> LayerSequence:
        """One layer's hold on it."""
        return LayerSequence(self, layer)

    def length_of(self, layer: int) -> int:
        """Tokens that a layer has."""
        return self._lengths[layer]

    @property
    def page_ids(self) -> PageIds:
        return self._state.page_ids

    def renumber(self, new_ids: PageIds) -> None:
        """The pool moved its pages: new_ids[old] is each one's new id."""
        self._state = self._state._replace(page_ids=new_ids[self._state.page_ids])
        if self._step is not None and self._step.before is not None:  # it failed, and nobody has undone it yet
            before = self._step.before
            self._step.before = before._replace(page_ids=new_ids[before.page_ids])

    @property
    def tail_start(self) -> int:
        """Position of the first tail row."""
        return self._num_tokens - self._state.num_tail

    def exact_bytes_of(self, layer: int) -> int:
        """One layer's exact buffers as allocated, unused rows included."""
        regions = (self._state.sink, self._state.tail)
        rows = sum(region.capacity for region in regions if region is not None)
        return rows * self.pool.shapes[layer].raw_token_bytes

    # --- appending

    def append(self, layer: int, k: Array, v: Array) -> SequenceView:
        """Add a layer's tokens k (H, T, D), v (H, T, Dv); returns the view their queries attend over.

        All pages that end before the new last token are encoded here. Raises UnsupportedModelError when the layers
        of a conversation do not all get the same tokens.
        """
        num_new, step = int(k.shape[1]), self._step
        if step is None:
            step = self._begin(layer, num_new)
        elif self._lengths[layer] != step.q_start or num_new != step.num_new:
            raise UnsupportedModelError("the layers of a conversation got different tokens in one step")
        try:
            view = self._write(layer, step, k, v)
        except BaseException:
            self._undo()
            raise
        self._lengths[layer] = self._num_tokens
        step.num_layers -= 1
        if step.num_layers == 0:
            self._commit(step)
        return view

    def _begin(self, layer: int, num_new: int) -> Append:
        """Decide a step for all layers. What raises here leaves everything as it was."""
        if any(self._lengths[other] != self._num_tokens for other in self._layers):
            raise UnsupportedModelError("the layers of a conversation hold different numbers of tokens")
        self._forget_forks()
        fmt, state = self.pool.fmt, self._state
        step = Append(state, len(self._layers), self._num_tokens, num_new, state.num_sink)
        step.to_sink = min(max(0, fmt.sink_tokens - state.num_sink), num_new)
        if step.to_sink:
            sink = grown(state.sink, self._layers, self.pool, state.num_sink, step.to_sink, fmt.sink_tokens)
            state = state._replace(sink=sink, num_sink=state.num_sink + step.to_sink)
        try:
            if num_new > step.to_sink:
                state = self._extend_tail(step, state, num_new - step.to_sink)
        except BaseException:
            if state.sink is not self._state.sink and state.sink is not None:
                state.sink.release()
            raise
        self._state, self._step, self.last_append = state, step, step
        self._num_tokens += num_new
        return step

    def _extend_tail(self, step: Append, state: _State, num_new: int) -> _State:
        """Where rows behind the sink go; allocates the pages that they fill."""
        fmt, pool, page = self.pool.fmt, self.pool, self.pool.fmt.page_tokens
        tail, num_tail = state.tail, state.num_tail
        closes = num_tail == page
        if closes:
            tail, num_tail = None, 0
        num_rows = num_tail + num_new
        num_full = 0 if num_rows <= page else (num_rows - 1) // page  # the last page stays exact
        new_pages = pool.allocate(closes + num_full)
        step.closed, step.pages = new_pages[:closes], new_pages[closes:]
        page_ids = np.concatenate([state.page_ids, new_pages]) if len(new_pages) else state.page_ids
        step.window_start = fmt.page_start(len(state.page_ids) + closes)
        if num_full:
            step.num_joined = num_tail
            num_left = num_rows - num_full * page
            tail = ExactRegion(pool, self._layers, exact_capacity(num_left, page))
        else:
            num_left, step.tail_at = num_rows, num_tail
            tail = grown(tail, self._layers, pool, num_tail, num_new, page)
        return state._replace(page_ids=page_ids, tail=tail, num_tail=num_left)

    def _write(self, layer: int, step: Append, k: Array, v: Array) -> SequenceView:
        """One layer's part of a step."""
        state, window = self._state, None
        if step.to_sink:
            assert state.sink is not None
            state.sink.write(layer, step.sink_at, k[:, : step.to_sink], v[:, : step.to_sink])
            k, v = k[:, step.to_sink :], v[:, step.to_sink :]
        if step.num_new > step.to_sink:
            window = self._write_tail(layer, step, k, v)
        sink = state.sink.rows(layer, 0, state.num_sink) if state.sink is not None and state.num_sink else None
        return SequenceView(step.q_start, step.num_new, state.page_ids, sink, window)

    def _write_tail(self, layer: int, step: Append, k: Array, v: Array) -> ExactRows:
        """Behind the sink; returns exact rows from the first new token's page on."""
        state, before, store = self._state, step.before, self.pool.stores[layer]
        assert state.tail is not None and before is not None
        if len(step.closed):
            assert before.tail is not None
            old = before.tail.rows(layer, 0, before.num_tail)
            store.encode(step.closed, len(before.page_ids), old.k, old.v)
        if not len(step.pages):
            state.tail.write(layer, step.tail_at, k, v)
            return state.tail.rows(layer, step.window_start, state.num_tail)
        if step.num_joined:
            assert before.tail is not None
            old = before.tail.rows(layer, 0, step.num_joined)
            k, v = self.pool.backend.concatenate([old.k, k]), self.pool.backend.concatenate([old.v, v])
        num_full = len(step.pages) * self.pool.fmt.page_tokens
        first_page = len(state.page_ids) - len(step.pages)
        store.encode(step.pages, first_page, k[:, :num_full], v[:, :num_full])
        state.tail.write(layer, 0, k[:, num_full:], v[:, num_full:])
        return ExactRows(step.window_start, k, v)

    def _commit(self, step: Append) -> None:
        """All layers have written: what the step replaced is let go."""
        assert step.before is not None
        for old, new in ((step.before.sink, self._state.sink), (step.before.tail, self._state.tail)):
            if new is not None and new is not old:
                new.settle()
            if old is not None and old is not new:
                old.release()
        step.before, self._step = None, None

    def _undo(self) -> None:
        """A step that not all layers wrote never happened."""
        step = self._step
        if step is None:
            return
        assert step.before is not None
        for old, new in ((step.before.sink, self._state.sink), (step.before.tail, self._state.tail)):
            if new is not None and new is not old:
                new.release()
        self.pool.free(self._state.page_ids[len(step.before.page_ids) :])
        self._state, self._num_tokens, self._step = step.before, step.q_start, None
        self._lengths = [min(n, step.q_start) for n in self._lengths]

    # --- forking, cutting, releasing

    def fork(self, layer: int) -> PagedSequence:
        """The same tokens again, sharing pages and exact rows; costs no copy.

        Every layer asks once: the first makes the fork, the others join it.
        """
        self._undo()
        for candidate in self._forks:
            fork = candidate()
            if fork is not None and fork._is_joinable and layer not in fork._layers:
                break
        else:
            fork = self._new_fork()
            self._forks.append(ref(fork))
        fork._layers.add(layer)
        if len(fork._layers) == len(self._layers):
            self._forks = [r for r in self._forks if r() is not None and r() is not fork]
        return fork

    def _new_fork(self) -> PagedSequence:
        other = PagedSequence(self.pool, ())
        self.pool.share(self._state.page_ids)
        for region in (self._state.sink, self._state.tail):
            if region is not None:
                region.hold()
        other._state, other._num_tokens, other._is_joinable = self._state, self._num_tokens, True
        other._lengths = [self._num_tokens] * len(self._lengths)
        return other

    def _forget_forks(self) -> None:
        """This sequence changes: whoever forks from now on gets another fork, and nobody joins this one."""
        self._forks, self._is_joinable = [], False

    def exact_cut(self, length: int) -> int:
        """The longest n <= length to which `cut` loses nothing: any row of sink and tail, else a page's start."""
        length = min(length, self._num_tokens)
        fmt = self.pool.fmt
        if length <= self._state.num_sink or length >= self.tail_start:
            return length
        return fmt.page_start((length - fmt.sink_tokens) // fmt.page_tokens)

    def cut(self, layer: int, length: int) -> None:
        """Keep a layer's first `length` tokens. A page cut in its middle comes back decoded, not exact."""
        assert 0 <= length <= self._lengths[layer], f"cannot cut {self._lengths[layer]} tokens to {length}"
        self._undo()
        if length < self._num_tokens:
            self._forget_forks()
            self._cut(length)
        self._lengths[layer] = min(length, self._lengths[layer])

    def _cut(self, length: int) -> None:
        """The first layer that is cut cuts all that they share."""
        fmt, state = self.pool.fmt, self._state
        if length >= self.tail_start and state.num_tail:
            self._state = state._replace(num_tail=length - self.tail_start)
            self._num_tokens = length
            return
        keep, num_partial = divmod(max(0, length - fmt.sink_tokens), fmt.page_tokens)
        tail = self._decoded(state.page_ids[keep : keep + 1], keep, num_partial) if num_partial else None
        if state.tail is not None:
            state.tail.release()
        self.pool.free(state.page_ids[keep:])
        num_sink = min(state.num_sink, length)
        self._state = state._replace(num_sink=num_sink, page_ids=state.page_ids[:keep], tail=tail, num_tail=num_partial)
        self._num_tokens = length

    def _decoded(self, page_ids: PageIds, number: int, num_rows: int) -> ExactRegion:
        """The first rows of one page, the conversation's page `number`, as a tail."""
        region = ExactRegion(self.pool, self._layers, exact_capacity(num_rows, self.pool.fmt.page_tokens))
        for layer in sorted(self._layers):
            k, v = self.pool.stores[layer].decode(page_ids, number)
            region.write(layer, 0, k[:, :num_rows], v[:, :num_rows])
        region.settle()
        return region

    def release(self, layer: int) -> None:
        """A layer lets go; with the last one, pages and exact rows go back. Idempotent."""
        if layer not in self._layers:
            return
        self._forget_forks()
        self._layers.discard(layer)
        self._lengths[layer] = 0
        if not self._layers:
            self._release_all()

    def _release_all(self) -> None:
        self._undo()
        state, self._state, self._num_tokens = self._state, _State(), 0
        self.pool.free(state.page_ids)
        for region in (state.sink, state.tail):
            if region is not None:
                region.release()

    def __del__(self) -> None:
        """For programs that drop caches instead of releasing them; the server never relies on it."""
        if hasattr(self, "_is_joinable"):
            self._release_all()

    # --- whole contents

    def exact_ends(self, layer: int) -> tuple[ExactRows | None, ExactRows | None]:
        """A layer's sink rows and tail rows."""
        state = self._state
        sink = state.sink.rows(layer, 0, state.num_sink) if state.sink is not None and state.num_sink else None
        tail = state.tail.rows(layer, self.tail_start, state.num_tail) if state.tail and state.num_tail else None
        return sink, tail

    def pending_arrays(self, layer: int) -> list[Array]:
        """A layer's exact buffers, for backends that compute lazily."""
        return [
            a for region in (self._state.sink, self._state.tail) if region is not None for a in region.arrays(layer)
        ]

    def fill(self, page_ids: PageIds, ends: Mapping[int, tuple[ExactRows | None, ExactRows | None]]) -> None:
        """Take over pages of this pool and, per layer, copies of exact ends, into an empty sequence.

        All layers must bring the same numbers of rows.
        """
        assert self._num_tokens == 0, "only an empty sequence can be filled"
        fmt, (sink, tail) = self.pool.fmt, next(iter(ends.values()))
        self._state = self._state._replace(page_ids=page_ids)
        num_sink, num_tail = (0 if rows is None else rows.num_rows for rows in (sink, tail))
        self._num_tokens = num_sink + len(page_ids) * fmt.page_tokens + num_tail
        self._state = _State(
            self._copied(num_sink, fmt.sink_tokens, {layer: end[0] for layer, end in ends.items()}),
            num_sink,
            page_ids,
            self._copied(num_tail, fmt.page_tokens, {layer: end[1] for layer, end in ends.items()}),
            num_tail,
        )
        self._lengths = [self._num_tokens] * len(self._lengths)

    def _copied(self, num_rows: int, most: int, rows: Mapping[int, ExactRows | None]) -> ExactRegion | None:
        if not num_rows:
            return None
        region = ExactRegion(self.pool, self._layers, exact_capacity(num_rows, most))
        for layer, of_layer in rows.items():
            assert of_layer is not None and of_layer.num_rows == num_rows, "layers bring different numbers of rows"
            region.write(layer, 0, of_layer.k, of_layer.v)
        region.settle()
        return region


class LayerSequence:
    """One layer's hold on a conversation: appended to, attended over, forked, cut, released."""

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

    def append(self, k: Array, v: Array) -> SequenceView:
        """As PagedSequence.append."""
        return self.shared.append(self.layer, k, v)

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

    def exact_ends(self) -> tuple[ExactRows | None, ExactRows | None]:
        """Sink rows and tail rows."""
        return self.shared.exact_ends(self.layer)

    def pages(self) -> CanonicalPages:
        """Copies of its pages in the canonical layout."""
        return self.shared.pool.stores[self.layer].read(self.shared.page_ids)

    def pending_arrays(self) -> list[Array]:
        """Exact buffers, for backends that compute lazily."""
        return self.shared.pending_arrays(self.layer)
