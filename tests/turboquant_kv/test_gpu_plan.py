"""How a decode step is split over a GPU, and the plan arrays that tell the kernels."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.gpu.launch import ONE_ROW_MORE, DecodeKernels
from turboquant_kv.backends.gpu.plan import (
    AMPERE,
    HOPPER,
    MAX_PARTS,
    NO_WINDOW,
    SMALL,
    STATIC_BYTES,
    TILE_TOKENS,
    DecodeShape,
    Device,
    Figures,
    arena_bytes,
    split,
    tuning_for,
)
from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS

SHAPE = DecodeShape(40, 8, 128, 128, 4, 3, 64, 32, 1, mx.bfloat16, mx.bfloat16)


def figures(num_tokens: int, num_rows: int = 20) -> Figures:
    """A sequence with so many compressed tokens and window rows."""
    start = SHAPE.sink_tokens + num_tokens
    return (start + num_rows - 1, 1, num_tokens // SHAPE.page_tokens, 0, SHAPE.sink_tokens, 0, start, num_rows)


def new_launch() -> Any:
    def refuse(**options: Any) -> Any:
        raise AssertionError("a kernel was made")

    return DecodeKernels("cuda", refuse, device=HOPPER).launch_for(SHAPE)


def test_a_step_that_closes_no_page_is_planned_by_an_addition() -> None:
    """Two conversations in turn: each finds its own plan of the step before."""
    launch = new_launch()
    steps = [(figures(640),), (figures(64, 3), figures(1280, 5))]
    for _ in range(4):
        for i, step in enumerate(steps):
            plan = launch._plan(step, 32, 0.1, NO_WINDOW)
            assert np.array_equal(np.array(plan.array), np.array(new_launch()._plan(step, 32, 0.1, NO_WINDOW).array))
            steps[i] = tuple(tuple(map(sum, zip(row, ONE_ROW_MORE, strict=True))) for row in step)
    made = len(launch._plans)
    assert launch._advanced((steps[0], 32, 0.1, NO_WINDOW)) is not None
    assert launch._advanced((steps[0], 32, 0.1, 4096)) is None, "a window moves the first tile"
    assert launch._advanced(((figures(704, 1),), 32, 0.1, NO_WINDOW)) is None, "a page has closed"
    assert len(launch._plans) == made


def test_the_split_covers_all_tokens_with_at_most_so_many_parts(rng: np.random.Generator) -> None:
    for _ in range(300):
        batch = [figures(64 * int(n)) for n in rng.integers(0, 4096, size=rng.integers(1, 40))]
        tuning = tuning_for(SHAPE, "mma", HOPPER)
        tiles, num_blocks = split(SHAPE, "mma", tuning, batch, NO_WINDOW)
        longest = max(row[2] for row in batch) * SHAPE.page_tokens
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
                        assert arena_bytes(shape, tuning) + STATIC_BYTES <= device.shared_bytes, (shape, tuning)
