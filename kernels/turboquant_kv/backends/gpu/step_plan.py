"""GpuStepPlan: what all layers of a step share on a GPU, each made when a layer first asks for it.

Owns page table, figures and row numbers as the kernels take them, which plan follows which, and how far the host may
be ahead of the GPU in a pass over prompts. How work is split is plan.py's, what is launched store.py's.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import NO_SPAN, SequenceView, StepPlan, StepRows
from turboquant_kv.backends.gpu.figures import SequenceFigures
from turboquant_kv.backends.gpu.launch import DecodeLaunch
from turboquant_kv.backends.gpu.page_kernels import Places
from turboquant_kv.backends.gpu.plan import NO_WINDOW, ONE_ROW_MORE, Plan, PlanKey
from turboquant_kv.backends.gpu.prefill_plan import PrefillGroup, prefill_groups

# New tokens of a pass from which its layers are handed over one by one: fewer cost the host more than they gain.
TOKENS_HANDED_OVER = 512
# Layers that may be under way then. One alone would leave the GPU waiting for the host between two; each more holds the
# activations of another layer, which MLX frees once the GPU is done with them.
LAYERS_UNDER_WAY = 3


class GpuStepPlan(StepPlan):
    """One page table and one set of figures for all layers of a step, and row numbers as the kernels take them.

    page_table (B, width) int32, rows padded.
    """

    def __init__(self, rows: StepRows, page_table: mx.array, before: GpuStepPlan | None) -> None:
        """before: the step before, if this one may be what follows it."""
        super().__init__(rows)
        self.page_table = page_table
        self._words = np.array([_figures(view) for view in rows.views], np.int64)
        follows = before is not None and np.array_equal(self._words, before._words + np.array(ONE_ROW_MORE))
        self._before = before if follows and before is not None and before.page_table is page_table else None
        if before is not None:
            before._before = None  # no chain of all steps
        self._plans: dict[tuple[int, float, int, float], Plan] = {}  # by launch, scale, reach and cap
        self.used: list[tuple[DecodeLaunch, float, int, float]] = []  # the same, of all plans that were asked for
        self._groups: dict[tuple[int, int, int], tuple[PrefillGroup, ...]] = {}  # by page tokens, KV heads and tile
        self._under_way: deque[mx.array] = deque()  # fences of layers, oldest first

    @cached_property
    def figures(self) -> tuple[SequenceFigures, ...]:
        """Where each sequence's rows and pages lie."""
        return tuple(SequenceFigures(*row) for row in self._words.tolist())

    def plan_for(self, launch: DecodeLaunch, scale: float, reach: int = NO_WINDOW, cap: float = 0.0) -> Plan:
        """The launch's plan; that of a step that only adds a row to each sequence is made on the GPU.

        reach: keys that a query sees, itself included; with one, each step's plan is made anew.

        An array that the host has written costs a CUDA device a page fault, about 180 us.
        """
        key = id(launch), scale, reach, cap
        plan = self._plans.get(key)
        if plan is None:
            before = None if self._before is None or reach != NO_WINDOW else self._before._plans.get(key)
            if before is not None:
                plan = launch.plans.following(before)
            else:
                plan = launch.plans.plan_for(PlanKey(self.figures, self.page_table.shape[1], scale, reach, cap))
            self._plans[key] = plan
            self.used.append((launch, scale, reach, cap))
        return plan

    def groups_for(self, page_tokens: int, num_kv_heads: int, tile: int = 1) -> tuple[PrefillGroup, ...]:
        """Sequences that share a prefill pass's launches; layers of one geometry share the groups.

        tile: as PrefillGroup's.
        """
        key = page_tokens, num_kv_heads, tile
        if key not in self._groups:
            self._groups[key] = prefill_groups(self._words, page_tokens, num_kv_heads, self.page_table.shape[1], tile)
        return self._groups[key]

    def hand_over(self, *arrays: mx.array) -> None:
        """Have the GPU begin with what a layer is given while the host builds the rest; wait for layers long before.

        Without it a pass over a long prompt begins when all its layers are built, and MLX then hands over as many of
        them as it likes, whose activations exist at once. Does nothing in a short pass. Raises what MLX raises.
        """
        if self.num_queries < TOKENS_HANDED_OVER:
            return
        mx.async_eval(*arrays)  # type: ignore[no-untyped-call]
        if len(self._under_way) >= LAYERS_UNDER_WAY:
            mx.eval(self._under_way.popleft())

    def stored(self, fence: mx.array) -> None:
        """A layer's part of the pass is built; fence: what its last launch leaves, which later layers depend on."""
        if self.num_queries >= TOKENS_HANDED_OVER:
            self._under_way.append(fence)

    @cached_property
    def num_queries(self) -> int:
        """New tokens of all sequences."""
        return sum(one.num_queries for one in self.figures)

    @cached_property
    def copies(self) -> Places:
        """From and to."""
        assert self.rows.copies is not None
        return Places.of(self.rows.copies)

    @cached_property
    def writes(self) -> Places:
        """New rows' numbers, and where they go."""
        return Places.of(self.rows.writes)

    @cached_property
    def closed(self) -> Places:
        """Of a PageWrites."""
        assert self.rows.closed is not None
        return Places.of(self.rows.closed)

    @cached_property
    def pages(self) -> Places:
        """Of a PageWrites."""
        assert self.rows.pages is not None
        return Places.of(self.rows.pages)

    @cached_property
    def num_pages(self) -> int:
        """Pages of the longest conversation of which this step writes one, up to that page."""
        written = [pages.numbers.max() for pages in (self.rows.closed, self.rows.pages) if pages is not None]
        return int(max(written, default=-1)) + 1

    @cached_property
    def window_places(self) -> tuple[Places | None, Places | None, int]:
        """Of the step's own window: held rows and new ones with their places in it, and its length."""
        (held, new), num_rows = self.rows.window_pairs()
        of_held, of_new = (Places.of(pairs) if pairs.shape[1] else None for pairs in (held, new))
        return of_held, of_new, num_rows


def _figures(view: SequenceView) -> SequenceFigures:
    sink, window = view.sink or NO_SPAN, view.window or NO_SPAN
    return SequenceFigures(
        view.q_start,
        view.num_queries,
        len(view.page_ids),
        sink.first,
        sink.num_rows,
        window.first,
        window.start,
        window.num_rows,
    )
