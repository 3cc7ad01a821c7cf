"""How a decode step is split over a GPU, and the plan arrays that tell the kernels."""

from __future__ import annotations

from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.gpu.arena import MAX_PARTS, decode_arena
from turboquant_kv.backends.gpu.device import AMPERE, HOPPER, SMALL, Device
from turboquant_kv.backends.gpu.figures import SequenceFigures
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.plan import NO_WINDOW, ONE_ROW_MORE, TILE_TOKENS, PlanKey, split
from turboquant_kv.backends.gpu.shape import DecodeShape
from turboquant_kv.backends.gpu.store import decode_shape
from turboquant_kv.backends.gpu.variants import STATIC_BYTES, tuning_for, variant_for
from turboquant_kv.codec.format import SUPPORTED_HEAD_DIMS, KVFormat

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


def new_launch() -> Any:
    def refuse(**options: Any) -> Any:
        raise AssertionError("a kernel was made")

    return DecodeKernels("cuda", refuse, device=HOPPER).launch_for(SHAPE)


def test_a_step_that_closes_no_page_is_planned_by_an_addition() -> None:
    """Two conversations in turn: each finds its own plan of the step before."""
    plans = new_launch().plans
    steps = [(figures(640),), (figures(64, 3), figures(1280, 5))]
    for _ in range(4):
        for i, step in enumerate(steps):
            key = PlanKey(step, 32, 0.1, NO_WINDOW)
            planned = plans.plan_for(key)
            assert np.array_equal(np.array(planned.array), np.array(new_launch().plans.plan_for(key).array))
            steps[i] = tuple(SequenceFigures(*map(sum, zip(row, ONE_ROW_MORE, strict=True))) for row in step)
    made = len(plans._kept)
    key = PlanKey(steps[0], 32, 0.1, NO_WINDOW)
    assert plans._advanced(key) is not None
    assert plans._advanced(key._replace(reach=4096)) is None, "a window moves the first tile"
    assert plans._advanced(key._replace(sequences=(figures(704, 1),))) is None, "a page has closed"
    assert len(plans._kept) == made


def test_the_split_covers_all_tokens_with_at_most_so_many_parts(rng: np.random.Generator) -> None:
    for _ in range(300):
        batch = [figures(64 * int(n)) for n in rng.integers(0, 4096, size=rng.integers(1, 40))]
        tuning = tuning_for(SHAPE, "mma", HOPPER)
        tiles, num_blocks = split(SHAPE, "mma", tuning, batch, NO_WINDOW)
        longest = max(row.num_pages for row in batch) * SHAPE.page_tokens
        assert tiles >= 1 and 1 <= num_blocks <= MAX_PARTS
        assert (num_blocks - 1) * tiles * TILE_TOKENS >= longest
        assert num_blocks == 1 or (num_blocks - 2) * tiles * TILE_TOKENS < longest, "a block has nothing to do"


def test_one_long_conversation_fills_the_gpu_once() -> None:
    tuning = tuning_for(SHAPE, "mma", HOPPER)
    for num_tokens in (65536, 131072):
        _, num_blocks = split(SHAPE, "mma", tuning, [figures(num_tokens)], NO_WINDOW)
        assert 0.9 * HOPPER.processors <= num_blocks * SHAPE.num_kv_heads <= HOPPER.processors


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("device", [HOPPER, AMPERE, SMALL])
def test_every_geometry_fits_a_block(device: Device, turns: bool) -> None:
    """Shared memory on every kind of device, for all dims, bits and page sizes that tensor cores serve."""
    left_out = set()
    names: list[int | str] = [2, 3, 4, "2t", "3t", "4t"]
    for dim, page in product((d for d in SUPPORTED_HEAD_DIMS if d <= 256), (16, 48, 64)):
        layer = LayerShape(2, dim, dim, mx.float16)
        for keys, values in product(names, repeat=2):
            turning = (dim // 2, True, 2) if turns else (0, False, 1)
            shape = decode_shape(8, 1, mx.float16, layer, KVFormat(keys, values, page_tokens=page), turning)
            if variant_for("cuda", shape, device) == "mma":
                tuning = tuning_for(shape, "mma", device)
                used = decode_arena(shape, tuning).num_bytes + STATIC_BYTES
                assert used <= device.shared_bytes, (shape, tuning)
            elif shape.has_mma:
                left_out.add((keys, values, dim))
    # tables of two sides of trellis codes, or of one beside 4 bits, and wide rows: too much for consumers' cards
    assert all(device is SMALL and dim > 128 and {"3t", "4t"} & {*codecs} for *codecs, dim in left_out), left_out
