"""How a decode step is split over a GPU, and the plan arrays that tell the kernels."""

from __future__ import annotations

from operator import add
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import turboquant_kv
from turboquant_kv.backends.gpu import figures as gpu_figures
from turboquant_kv.backends.gpu.arena import MAX_PARTS, decode_arena
from turboquant_kv.backends.gpu.device import AMPERE, HOPPER, SMALL, Device
from turboquant_kv.backends.gpu.figures import MIN_ELEMENTS, SequenceFigures, StepFigures, array_of
from turboquant_kv.backends.gpu.plan import NO_WINDOW, ONE_ROW_MORE, TILE_TOKENS, PlanKey, StepPlans, split
from turboquant_kv.backends.gpu.shape import DecodeShape
from turboquant_kv.backends.gpu.variants import STATIC_BYTES, tuning_for
from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS

SHAPE = DecodeShape(40, 8, 128, 128, 4, 3, 64, 32, 1, mx.bfloat16, mx.bfloat16)


def figures(num_tokens: int, num_rows: int = 20) -> SequenceFigures:
    """A sequence with so many compressed tokens and window rows."""
    start = SHAPE.sink_tokens + num_tokens
    return SequenceFigures(
        q_start=start + num_rows - 1,
        num_queries=1,
        num_pages=num_tokens // SHAPE.page_tokens,
        sink_offset=0,
        num_sink=SHAPE.sink_tokens,
        window_offset=0,
        window_start=start,
        num_window=num_rows,
    )


def new_plans() -> StepPlans:
    return StepPlans(SHAPE, "mma", tuning_for(SHAPE, "mma", HOPPER))


def test_the_kernels_structs_are_the_written_ones() -> None:
    """src/figures.h is made by figures.py; a field that is added to one only would shift all behind it."""
    written = Path(turboquant_kv.__file__).parent / "src" / "figures.h"
    assert written.read_text() == gpu_figures.header_text()


def test_structs_travel_as_words() -> None:
    step = StepFigures(tiles_per_block=3, table_width=8, blocks_per_group=2, num_parts=9, scale=0.25, reach=NO_WINDOW)
    words = np.array(array_of(step, figures(640)))
    assert words[:4].tolist() == [3, 8, 2, 9] and words[4:5].view(np.float32)[0] == 0.25 and words[5] == NO_WINDOW
    assert tuple(words[6:]) == figures(640)
    assert array_of(gpu_figures.EncodeFigures(5)).tolist() == [5] + [0] * (MIN_ELEMENTS - 1)


def test_a_step_that_closes_no_page_is_planned_by_an_addition() -> None:
    """Two conversations in turn: each finds its own plan of the step before."""
    plans = new_plans()
    steps: list[tuple[SequenceFigures, ...]] = [(figures(640),), (figures(64, 3), figures(1280, 5))]
    for _ in range(4):
        for i, step in enumerate(steps):
            key = PlanKey(step, 32, 0.1, NO_WINDOW)
            assert np.array_equal(np.array(plans.plan_for(key).array), np.array(new_plans().plan_for(key).array))
            steps[i] = tuple(SequenceFigures._make(map(add, row, ONE_ROW_MORE)) for row in step)
    made = len(plans._kept)
    assert plans._advanced(PlanKey(steps[0], 32, 0.1, NO_WINDOW)) is not None
    assert plans._advanced(PlanKey(steps[0], 32, 0.1, 4096)) is None, "a window moves the first tile"
    assert plans._advanced(PlanKey((figures(704, 1),), 32, 0.1, NO_WINDOW)) is None, "a page has closed"
    assert len(plans._kept) == made


def test_the_split_covers_all_tokens_with_at_most_so_many_parts(rng: np.random.Generator) -> None:
    for _ in range(300):
        batch = [figures(64 * int(n)) for n in rng.integers(0, 4096, size=rng.integers(1, 40))]
        tuning = tuning_for(SHAPE, "mma", HOPPER)
        tiles, num_blocks = split(SHAPE, "mma", tuning, batch, NO_WINDOW)
        longest = max(one.num_pages for one in batch) * SHAPE.page_tokens
        assert tiles >= 1 and 1 <= num_blocks <= MAX_PARTS
        assert (num_blocks - 1) * tiles * TILE_TOKENS >= longest
        assert num_blocks == 1 or (num_blocks - 2) * tiles * TILE_TOKENS < longest, "a block has nothing to do"


def test_one_long_conversation_fills_the_gpu_once() -> None:
    tuning = tuning_for(SHAPE, "mma", HOPPER)
    for num_tokens in (65536, 131072):
        _, num_blocks = split(SHAPE, "mma", tuning, [figures(num_tokens)], NO_WINDOW)
        assert 0.9 * HOPPER.processors <= num_blocks * SHAPE.num_kv_heads <= HOPPER.processors


@pytest.mark.parametrize("device", [HOPPER, AMPERE, SMALL])
def test_every_geometry_fits_a_block(device: Device) -> None:
    """Shared memory on every kind of device, for all dims, bits and page sizes that tensor cores serve."""
    for dim in (d for d in SUPPORTED_HEAD_DIMS if d <= 256):
        for k_bits in (2, 3, 4):
            for v_bits in (2, 3, 4):
                for page in (16, 48, 64):
                    shape = DecodeShape(8, 2, dim, dim, k_bits, v_bits, page, 32, 1, mx.float16, mx.float16)
                    if shape.has_mma:
                        tuning = tuning_for(shape, "mma", device)
                        num_bytes = decode_arena(shape, tuning).num_bytes + STATIC_BYTES
                        assert num_bytes <= device.shared_bytes, (shape, tuning)
                            shape,
                            tuning,
                        )
