"""The plan of a decode step: how its work is split over the GPU, as one array that all layers share.

Owns the split and the plans of the steps before. The array's structs are figures.py's; launching is launch.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import sub
from typing import NamedTuple

import mlx.core as mx

from turboquant_kv.backends.gpu.arena import MAX_PARTS
from turboquant_kv.backends.gpu.figures import LOG2_E, SequenceFigures, StepFigures, array_of
from turboquant_kv.backends.gpu.shape import DecodeShape, Variant
from turboquant_kv.backends.gpu.tuning import Tuning

TILE_TOKENS = 32  # the plan's unit
NO_WINDOW = 1 << 30
PLANS_KEPT = 64
# What a step that closes no page adds to a sequence: its first query's position and a window row.
ONE_ROW_MORE = SequenceFigures(
    q_start=1, num_queries=0, num_pages=0, sink_offset=0, num_sink=0, window_offset=0, window_start=0, num_window=1
)
_NO_CHANGE = StepFigures(tiles_per_block=0, table_width=0, blocks_per_group=0, num_parts=0, scale=0.0, reach=0, cap=0.0)


class Plan(NamedTuple):
    """What all layers of a step share: the array that kernels read, and the launch that it describes."""

    array: mx.array  # StepFigures, then each sequence's SequenceFigures, flat int32
    row_groups: int
    grid: tuple[int, int, int]
    num_floats: int  # of all parts
    out_shape: tuple[int, int, int, int]


class PlanKey(NamedTuple):
    """What a plan depends on."""

    sequences: tuple[SequenceFigures, ...]
    table_width: int
    scale: float
    reach: int
    cap: float = 0.0


class StepPlans:
    """The plans of one shape's decode steps, the latest PLANS_KEPT of them."""

    def __init__(self, shape: DecodeShape, variant: Variant, tuning: Tuning) -> None:
        self._shape, self._variant, self._tuning = shape, variant, tuning
        self._kept: dict[PlanKey, Plan] = {}

    def plan_for(self, key: PlanKey) -> Plan:
        """All layers of a step find the same one."""
        found = self._kept.get(key)
        if found is None:
            found = self._advanced(key) or self._new_plan(key)
            if len(self._kept) >= PLANS_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = found
        return found

    def _new_plan(self, key: PlanKey) -> Plan:
        shape, batch = self._shape, len(key.sequences)
        row_groups = batch * shape.num_chunks(self._variant) * shape.num_kv_heads
        tiles, num_blocks = split(shape, self._variant, self._tuning, key.sequences, key.reach)
        num_parts = num_blocks * row_groups
        step = StepFigures(
            tiles_per_block=tiles,
            table_width=key.table_width,
            blocks_per_group=num_blocks,
            num_parts=num_parts,
            scale=key.scale * LOG2_E,
            reach=key.reach,
            cap=key.cap * LOG2_E,
        )
        return Plan(
            array_of(step, *key.sequences),
            row_groups,
            (self._tuning.threads * num_blocks, shape.num_kv_heads, row_groups // shape.num_kv_heads),
            num_parts * shape.live_rows(self._variant) * (shape.v_dim + 2),
            (batch, shape.num_q_heads, shape.num_rows, shape.v_dim),
        )

    def following(self, plan: Plan) -> Plan:
        """The plan of the next step, in which each sequence has one exact row more."""
        return plan._replace(array=plan.array + _one_row_more(plan.out_shape[0]))

    def _advanced(self, key: PlanKey) -> Plan | None:
        """The plan of a step before, if each sequence has one exact row more since, advanced by an addition on the GPU.

        An array that the host has written costs a CUDA device a page fault, about 180 us.
        """
        if key.reach != NO_WINDOW:
            return None  # a window moves the walk's first tile
        before = tuple(SequenceFigures._make(map(sub, one, ONE_ROW_MORE)) for one in key.sequences)
        plan = self._kept.get(key._replace(sequences=before))
        return None if plan is None else self.following(plan)


@lru_cache(maxsize=64)
def _one_row_more(batch: int) -> mx.array:
    """What a step adds to a plan of so many sequences."""
    return array_of(_NO_CHANGE, *[ONE_ROW_MORE] * batch)


# Of a block beside its tokens, in tokens: start, table, merge. Measured on an H100: about 5 us, and 6 ns a token.
BLOCK_COST = 800


def split(
    shape: DecodeShape, variant: Variant, tuning: Tuning, sequences: Sequence[SequenceFigures], reach: int
) -> tuple[int, int]:
    """Tiles of 32 tokens per block and blocks per row group of the longest sequence, the exact rows' block included.

    Every block gets the same number of tokens, whatever the sequences' lengths, so that none waits for a long one: the
    number with which all are done soonest, `tuning.blocks` at a time.
    """
    unseen = [max(0, one.q_start - shape.sink_tokens + 1 - reach) // TILE_TOKENS for one in sequences]
    held = [-(-one.num_pages * shape.page_tokens // TILE_TOKENS) for one in sequences]
    num_tiles = [max(0, n - before) for n, before in zip(held, unseen, strict=True)]
    # tiles that give every warp one, or what a page has
    least = max(1, min(tuning.warps * tuning.tile, shape.page_tokens) // TILE_TOKENS)
    longest, total = max(num_tiles, default=0), sum(num_tiles)
    groups = shape.num_kv_heads * shape.num_chunks(variant)
    at_once = max(1, tuning.blocks // groups)
    best, best_time = max(1, longest), float("inf")
    for wanted in sorted({max(1, at_once * waves - k) for waves in (1, 2, 3) for k in range(len(sequences) + 2)}):
        tiles = max(least, -(-total // wanted), -(-longest // (MAX_PARTS - 1)))
        tiles = -(-tiles // least) * least
        blocks = sum(-(-n // tiles) for n in num_tiles)
        # the exact rows' blocks are short
        waves = -(-(blocks + len(sequences) // 2 + len(sequences) % 2) // at_once)
        time = waves * (tiles * TILE_TOKENS + BLOCK_COST)
        if time < best_time:
            best, best_time = tiles, time
    return best, 1 + -(-longest // best)
