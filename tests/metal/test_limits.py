"""Every kernel text of every supported geometry keeps Metal's limits; nothing is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.metal.emulator import last_report, metal_kernel
from tests.metal.emulator.report import MAX_REGISTERS, MAX_THREADGROUP_BYTES, MAX_THREADS
from tests.metal.sizing import sizes

from turboquant_kv.backends.gpu.decode_text import combine_text, combine_threads, decode_text
from turboquant_kv.backends.gpu.device import HOPPER
from turboquant_kv.backends.gpu.figures import SequenceFigures, StepFigures, array_of
from turboquant_kv.backends.gpu.launch import FENCE, FENCE_SHAPE
from turboquant_kv.backends.gpu.page_kernels import THREADS, PageKernels, Places, SideShape, encode_text, history_text
from turboquant_kv.backends.gpu.plan import NO_WINDOW
from turboquant_kv.backends.gpu.prefill_plan import prefill_groups
from turboquant_kv.backends.gpu.shape import DecodeShape, Variant
from turboquant_kv.backends.gpu.source import KernelText
from turboquant_kv.backends.gpu.variants import tuning_for
from turboquant_kv.codec.format import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS
from turboquant_kv.codec.trellis import TRELLIS_BITS

# Arrays that live at once and 24 for the rest: an estimate, which no Apple compiler has judged. The two that are beyond
# may spill a few: eight rows of 256 value dims are 64 alone, and pages of 112 dims hold three arrays of 32.
MAX_ESTIMATE = {("decode", 256): 144, ("history", 112): 136}
# A step of one sequence that holds nothing.
STEP = StepFigures(
    tiles_per_block=1, table_width=8, blocks_per_group=1, num_parts=1, scale=0.0, reach=NO_WINDOW, cap=0.0
)
EMPTY_PLAN = array_of(STEP, SequenceFigures(*[0] * 8))
VARIANTS: tuple[Variant, ...] = ("portable", "simd")
Checked = tuple[str, KernelText, int, int]
"""What it is, its text, its threads, the registers that it may need."""


def decode_shape(
    k_dim: int,
    v_dim: int,
    bits: tuple[int, int],
    num_rows: int,
    trellis: tuple[bool, bool] = (False, False),
    turns: bool = False,
) -> DecodeShape:
    """With the largest types, and with all dims of keys turning and scores with a cap, which need most."""
    pairs = k_dim // 2 if turns else 0
    return DecodeShape(
        num_rows, 1, k_dim, v_dim, *bits, 16, 0, 1, mx.float32, mx.float32, *trellis, pairs, capped=turns
    )


def decode_texts(variant: Variant, k_dim: int) -> Iterator[Checked]:
    kinds = [(bits, (False, False)) for bits in product(SUPPORTED_BITS, SUPPORTED_BITS)]
    kinds += [(bits, (True, True)) for bits in product(TRELLIS_BITS, TRELLIS_BITS)]
    kinds += [((8, 3), (False, True)), ((3, 8), (True, False))]
    for v_dim, (bits, trellis), num_rows, turns in product(SUPPORTED_HEAD_DIMS, kinds, (1, 3, 8), (False, True)):
        shape = decode_shape(k_dim, v_dim, bits, num_rows, trellis, turns)
        if variant == "simd" and not shape.has_simd:
            continue
        tuning = tuning_for(shape, variant, HOPPER)
        text = decode_text("metal", shape, variant, tuning, False, num_rows == 1, None, num_rows == 1)
        yield str(shape), text, tuning.threads, MAX_ESTIMATE.get(("decode", v_dim), MAX_REGISTERS)


def other_texts() -> Iterator[Checked]:
    for dim, bits in product(SUPPORTED_HEAD_DIMS, SUPPORTED_BITS):
        shape = decode_shape(dim, dim, (bits, bits), 8)
        for variant in VARIANTS:
            text = combine_text("metal", shape, variant, mx.float32)
            yield str(shape), text, combine_threads(dim), MAX_REGISTERS
        for trellis, turns in product((False, True) if bits in TRELLIS_BITS else (False,), (False, True)):
            side = SideShape(1, dim, bits, 16, "unbiased", mx.float32, trellis, dim // 2 if turns else 0)
            yield str(side), encode_text("metal", side), THREADS, MAX_REGISTERS
            yield str(side), history_text("metal", side), THREADS, MAX_ESTIMATE.get(("history", dim), MAX_REGISTERS)


def check(texts: Iterator[Checked]) -> None:
    beyond, num_texts = [], 0
    for what, text, threads, max_registers in texts:
        num_texts += 1
        found = sizes(text)
        if found.threadgroup_bytes > MAX_THREADGROUP_BYTES or found.registers > max_registers or threads > MAX_THREADS:
            beyond.append(f"{text.role} {threads} threads, {found} (registers: {max_registers} at most): {what}")
    assert num_texts > 0
    assert not beyond, f"{len(beyond)} of {num_texts}:\n" + "\n".join(beyond[:10])


@pytest.mark.parametrize("k_dim", SUPPORTED_HEAD_DIMS)
def test_portable_decode_fits(k_dim: int) -> None:
    check(decode_texts("portable", k_dim))


@pytest.mark.parametrize("k_dim", [d for d in SUPPORTED_HEAD_DIMS if d <= 256])
def test_decode_on_matrices_fits(k_dim: int) -> None:
    check(decode_texts("simd", k_dim))


def test_merging_encoding_and_decoding_pages_fit() -> None:
    check(other_texts())


def test_the_reader_agrees_with_the_emulator() -> None:
    """On threadgroup memory, which the emulator counts where it is declared; a kernel of which all blocks return."""
    for variant, trellis, turns in product(VARIANTS, (False, True), (False, True)):
        shape = decode_shape(192, 128, (3, 4), 3, (trellis, False), turns)
        text = decode_text("metal", shape, variant, tuning_for(shape, variant, HOPPER), False, False, None)
        kernel: Any = text.build(metal_kernel)
        pages = [np.zeros((8, 1, 16, 72), np.uint8), np.zeros((8, 1, 16), np.float16)]
        values = [np.zeros((8, 1, 16, 64), np.uint8), np.zeros((8, 1, 16), np.float16)]
        exact = [np.zeros((1, 8, dim), np.float32) for dim in (192, 128, 192, 128)]
        constants = np.zeros(192 * 192 + 192, np.float32)
        angles = [np.zeros((8, 192), np.float32)] if turns else []
        queries, table = np.zeros((1, 3, 1, 192), np.float32), np.zeros((1, 8), np.int32)
        fence = np.zeros(FENCE_SHAPE, np.float32)
        kernel(
            inputs=[queries, EMPTY_PLAN, table, *pages, *values, constants, fence, *angles, *exact],
            grid=(128, 1, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[(3 * 130,), FENCE_SHAPE],
            output_dtypes=[mx.float32, mx.float32],
        )
        assert sizes(text).threadgroup_bytes == last_report().threadgroup_bytes, (variant, trellis, turns)


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("dim", [112, 128])
def test_the_reader_agrees_on_page_kernels(dim: int, trellis: bool) -> None:
    """A dimension of each kind: columns meet in threadgroup memory, powers of two only keep tables there."""
    side = SideShape(1, dim, 3, 16, "unbiased", mx.float32, trellis)
    kernels = PageKernels("metal", metal_kernel)
    constants = mx.zeros((2 * dim,))
    num_bytes = dim * 3 // 8
    arrays = mx.zeros((1, 1, 16, num_bytes), mx.uint8), mx.zeros((1, 1, 16), mx.float16)
    mx.eval(*arrays)
    pages = Places.of(np.zeros((3, 1), np.int64))
    mx.eval(kernels.encode(side, mx.zeros((1, 16, dim)), pages, arrays, constants, FENCE))
    assert sizes(encode_text("metal", side)).threadgroup_bytes == last_report().threadgroup_bytes
    words = np.array([SequenceFigures(0, 1, 1, 0, 0, 0, 0, 0)])
    (group,) = prefill_groups(words, page_tokens=16, num_kv_heads=1, table_width=8)
    none = mx.zeros((1, 8, dim))
    mx.eval(kernels.history(side, arrays, mx.zeros((1, 8), mx.int32), group, none, none, constants, FENCE))
    assert sizes(history_text("metal", side)).threadgroup_bytes == last_report().threadgroup_bytes


@pytest.mark.parametrize("v_dim", [112, 128])
def test_the_reader_agrees_on_merging(v_dim: int) -> None:
    """Of no queries, once for each way to merge."""
    shape = decode_shape(v_dim, v_dim, (3, 4), 3)
    text, threads = combine_text("metal", shape, "portable", None), combine_threads(v_dim)
    kernel: Any = text.build(metal_kernel)
    constants = np.zeros(v_dim * v_dim + v_dim, np.float32)
    kernel(
        inputs=[np.zeros(3 * (v_dim + 2), np.float32), EMPTY_PLAN, constants, constants],
        grid=(3 * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(1, 1, 3, v_dim)],
        output_dtypes=[mx.float32],
    )
    assert sizes(text).threadgroup_bytes == last_report().threadgroup_bytes
