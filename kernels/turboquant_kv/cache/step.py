"""BatchStep: one step of the conversations of a batch, decided by the first layer and followed by all.

Owns what is the same in every layer: which new row goes where, which pages are encoded, what queries attend over, and
which layers have written. What a step does to one conversation is decided by that (sequence.py); rows and pages are
written by the layers' stores. A layer's share of the work does not grow with the number of conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import PageIds, PageWrites, RowSpan, Run, SequenceView, StepPlan, StepRows
from turboquant_kv.cache.exact_rows import ExactRegion
from turboquant_kv.cache.pages import PagePool

NO_PAGES: PageIds = np.empty(0, np.int64)


def _no_pages() -> PageIds:
    return NO_PAGES


class Contents(NamedTuple):
    """Where a conversation's tokens are; regions are None while empty.

    page_ids: by page number. Tokens before position `forgotten` are gone with their pages and, from its end on, the
    sink (windows.py); pages before it have the id 0, which nobody holds for them.
    """

    sink: ExactRegion | None = None
    num_sink: int = 0
    page_ids: PageIds = NO_PAGES
    tail: ExactRegion | None = None
    num_tail: int = 0
    forgotten: int = 0


@dataclass(slots=True)
class Append:
    """What a step does with one conversation's new rows.

    The first to_sink go to the sink. The others go to the tail behind its num_kept rows, unless they and these fill
    pages: then both are joined, the first rows are encoded as `pages`, the rest is the new tail.
    """

    before: Contents
    after: Contents
    q_start: int
    num_new: int
    to_sink: int = 0
    closed: PageIds = field(default_factory=_no_pages)  # the full tail before this step, left behind as a page
    pages: PageIds = field(default_factory=_no_pages)
    num_kept: int = 0  # rows of the tail before, which the new ones follow
    sizes: list[tuple[ExactRegion, int, int]] = field(default_factory=list)  # rows and capacity of regions, before


class Member(Protocol):
    """A conversation as a step sees it."""

    @property
    def layers(self) -> frozenset[int]: ...

    @property
    def open_step(self) -> BatchStep | None: ...

    def begin(self, step: BatchStep, layer: int, num_new: int) -> Append:
        """Decide what becomes of `num_new` rows and take what they need, or join with what other layers have decided.

        What raises leaves everything as it was.
        """
        ...

    def pages_for(self, num_new: int) -> int:
        """Pages that so many rows will take."""
        ...

    def commit(self) -> None:
        """All layers have written."""
        ...

    def undo(self) -> None:
        """The step never happened."""
        ...


class Positions:
    """Lengths of a batch's conversations, as numbers and as an array that stays on the device from step to step."""

    def __init__(self, lengths: Sequence[int], before: tuple[mx.array, int] | None = None) -> None:
        """before: the array of an earlier step, and what was added to each of its rows since."""
        self.lengths = list(lengths)
        self._before = before

    @cached_property
    def array(self) -> mx.array:
        """(B,) int32."""
        if self._before is None:
            return mx.array(self.lengths, dtype=mx.int32)
        (array, added), self._before = self._before, None
        return array + added

    def advanced(self, num_new: int, valid: Sequence[int] | None) -> Positions:
        """After a step of `num_new` rows each, or of so many as `valid` says."""
        if valid is not None:
            return Positions([n + new for n, new in zip(self.lengths, valid, strict=True)])
        known: mx.array | None = self.__dict__.get("array")  # only if somebody asked: else nobody computes it
        return Positions([n + num_new for n in self.lengths], None if known is None else (known, num_new))


class BatchStep:
    """One step, from the first layer's keys to the last one's."""

    def __init__(
        self,
        pool: PagePool,
        layer: int,
        members: Sequence[Member],
        num_new: int,
        valid: Sequence[int] | None = None,
        before: Positions | None = None,
    ) -> None:
        """layer: the first to write. num_new: rows of each, padding included; valid: those that are not padding,
        None: all.

        before: the conversations' lengths, if somebody knows them. Raises UnsupportedModelError when one of them is in
        a step with another number of rows; what raises leaves everything as it was.
        """
        self.members, self.num_new, self.valid = list(members), num_new, valid
        self._written: set[int] = set()
        self._earlier: dict[int, frozenset[int]] = {}  # layers that wrote beside other conversations, by id(member)
        self._layers = self.members[0].layers
        self.is_uniform = all(member.layers == self._layers for member in self.members)
        self.appends: list[Append] = []
        counts = [num_new] * len(self.members) if valid is None else valid
        try:
            pages = [member.pages_for(count) for member, count in zip(self.members, counts, strict=True)]
            if any(pages):
                pool.reserve(sum(pages))
            for member, count in zip(self.members, counts, strict=True):
                self.appends.append(member.begin(self, layer, count))
            if pool.window and any(append.after.forgotten for append in self.appends):
                pool.hold_first()
            self.rows = _rows_of(self.appends, num_new, pool.fmt.page_tokens)
            self.plan: StepPlan = pool.backend.prepare_step(self.rows)
        except BaseException:
            self.undo()
            raise
        self.before = Positions([append.q_start for append in self.appends]) if before is None else before
        self.after = self.before.advanced(num_new, valid)

    def has_written(self, member: Member, layer: int) -> bool:
        """Whether a layer of a conversation has its new rows."""
        return layer in self._written or (bool(self._earlier) and layer in self._earlier.get(id(member), ()))

    def take_over(self, member: Member) -> None:
        """A conversation whose other layers stepped beside others, which do not have this layer."""
        other = member.open_step
        assert other is not None
        self._earlier[id(member)] = other._earlier.get(id(member), frozenset()) | other._written

    def expects(self, layer: int, members: Sequence[Member], num_new: int, valid: Sequence[int] | None) -> bool:
        """Whether these are this step's rows in a layer that has not written yet."""
        is_same = self.num_new == num_new and self.valid == valid and self.members == members
        return is_same and layer not in self._written

    def done(self, *layers: int) -> None:
        """Layers have written; after the last one, what the step replaced is let go."""
        self._written.update(layers)
        if self.is_uniform and not self._earlier:
            if len(self._written) == len(self._layers):
                for member in self.members:
                    member.commit()
            return
        for member in self.members:
            if member.open_step is self and all(self.has_written(member, of_member) for of_member in member.layers):
                member.commit()

    def undo(self) -> None:
        """The step never happened, for those conversations that are still in it."""
        for member in self.members:
            if member.open_step is self:
                member.undo()


def step_for(
    pool: PagePool,
    layer: int,
    members: Sequence[Member],
    num_new: int,
    valid: Sequence[int] | None,
    before: Callable[[], Positions] | None = None,
) -> BatchStep:
    """The step that other layers have begun for these conversations, else a new one.

    Conversations that do not all have the same layers stand beside others in each layer, so in another step each time.

    Raises UnsupportedModelError when the layers of a conversation do not all get the same tokens.
    """
    step = members[0].open_step
    if step is None or not step.expects(layer, members, num_new, valid):
        step = BatchStep(pool, layer, members, num_new, valid, None if before is None else before())
    return step


class _Moves:
    """Pairs of row numbers, run by run."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int, int]] = []

    def add(self, source: int, target: int, num_rows: int) -> None:
        if num_rows:
            self._runs.append((source, target, num_rows))

    def __bool__(self) -> bool:
        return bool(self._runs)

    def pairs(self) -> PageIds:
        """(2, n) int64: from, to."""
        runs = np.array(self._runs, np.int64).reshape(-1, 3)
        if not len(runs) or int(runs[:, 2].max()) == 1:
            return np.ascontiguousarray(runs[:, :2].T)
        return np.concatenate([run[:2, None] + np.arange(run[2]) for run in runs], axis=1)


def _rows_of(appends: Sequence[Append], num_new: int, page_tokens: int) -> StepRows:
    """The step's work on rows."""
    copies, writes = _Moves(), _Moves()
    has_window = any(len(append.pages) for append in appends)
    views, closed, pages, runs = [], _Pages(), _Pages(), list[Run]()
    at = 0  # in the step's own window
    for b, append in enumerate(appends):
        before, after, first_new = append.before, append.after, b * num_new
        _copy(copies, before.sink, after.sink, before.num_sink)
        if after.sink is not None:
            writes.add(first_new, after.sink.first + before.num_sink, append.to_sink)
        sink = RowSpan(0, after.sink.first, after.num_sink) if after.sink is not None and after.num_sink else None
        window, num_behind = None, append.num_new - append.to_sink
        if len(append.closed):
            assert before.tail is not None
            closed.add(append.closed, len(before.page_ids), before.tail.first)
        if num_behind:
            assert after.tail is not None
            num_full = len(append.pages) * page_tokens
            kept_in = before.tail if num_full else after.tail
            if not num_full:
                _copy(copies, before.tail, after.tail, append.num_kept)
            start = append.q_start + append.to_sink - append.num_kept
            num_left = after.num_tail if num_full else num_behind
            writes.add(first_new + append.num_new - num_left, after.tail.first + after.num_tail - num_left, num_left)
            if has_window:
                if append.num_kept:
                    assert kept_in is not None
                    runs.append(Run(False, kept_in.first, append.num_kept))
                runs.append(Run(True, first_new + append.to_sink, num_behind))
                pages.add(append.pages, len(after.page_ids) - len(append.pages), at, page_tokens)
                window = RowSpan(start, at, append.num_kept + num_behind)
                at += window.num_rows
            else:
                window = RowSpan(start, after.tail.first, after.num_tail)
        views.append(SequenceView(append.q_start, append.num_new, after.page_ids, sink, window))
    return StepRows(
        views,
        num_new,
        copies.pairs() if copies else None,
        closed.writes(),
        tuple(runs) if has_window else None,
        pages.writes(),
        writes.pairs(),
    )


def _copy(copies: _Moves, old: ExactRegion | None, new: ExactRegion | None, num_rows: int) -> None:
    """Rows that a larger or own region takes over."""
    if old is not None and new is not None and new is not old:
        copies.add(old.first, new.first, num_rows)


class _Pages:
    """Pages of several conversations."""

    def __init__(self) -> None:
        self._parts: list[PageWrites] = []

    def add(self, page_ids: PageIds, first_page: int, first_row: int, page_tokens: int = 0) -> None:
        if len(page_ids):
            part = PageWrites.following(page_ids, first_page, page_tokens)
            self._parts.append(part._replace(starts=part.starts + first_row))

    def writes(self) -> PageWrites | None:
        if not self._parts:
            return None
        return PageWrites(*(np.concatenate(column) for column in zip(*self._parts, strict=True)))
