"""Tokens drawn from logits by one launch for all rows: src/draw.h, its text and how it is called.

As operations of MLX a draw with top-p is some sixty launches, each of which the host pays for in every step. What is
drawn, and why in whole numbers, is turboserve's sampling.py; its weighted_draw.py is the readable twin of the kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.gpu.figures import MIN_ELEMENTS
from turboquant_kv.backends.gpu.source import (
    PLACE,
    Constants,
    Dialect,
    Kernel,
    KernelFactory,
    KernelText,
    header_text,
    lookup_text,
    mlx_factory,
)

DRAW_INPUTS = ("logits", "params", "numbers")
# A block reads a row of 50,000 logits several times: as many threads as there may be. Metal's are fewer, because what a
# kernel needs of registers can bound them there.
THREADS: dict[Dialect, int] = {"cuda": 1024, "metal": 512}
TIE_OCTAVES = 1 / 256
STEP_OCTAVES = (1, -1, *(-(2**i) for i in range(12, -1, -1)))  # of top-p's search, in ties: up, down, then each step
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
MOST_ROWS = 65535  # of a grid's second axis
MOST_TOKENS = 1 << 24  # ids that a float32 holds


class DrawShape(NamedTuple):
    """What a kernel is compiled for."""

    vocab_len: int
    dtype: mx.Dtype  # of logits


class DrawKernels:
    """The drawing kernels of one kind of GPU, made at the first use of each shape."""

    def __init__(self, dialect: Dialect, factory: KernelFactory | None = None) -> None:
        """factory: by default MLX's own for the dialect."""
        self._dialect, self._factory = dialect, factory or mlx_factory(dialect)
        self._made: dict[DrawShape, Kernel] = {}

    @staticmethod
    def has_kernel(shape: DrawShape) -> bool:
        return MIN_ELEMENTS <= shape.vocab_len <= MOST_TOKENS and shape.dtype in DTYPES

    def draw(self, logits: mx.array, params: mx.array, numbers: mx.array) -> tuple[mx.array, mx.array]:
        """Tokens (R,) uint32 of logits (R, V), R <= MOST_ROWS, and which rows' (R,) bool mean nothing.

        params, of `draw_array`, (R, 3) float32: log2(e) / temperature, 0 for the likeliest token, of equals the first;
        log2 of min-p, minus infinity for none; top-p, 1 for none. numbers, of `draw_array`, (R,) uint32: random. A
        row's token depends on nothing but its own logits, parameters and number. Raises KeyError for other dtypes.
        """
        num_rows, vocab_len = logits.shape
        threads = THREADS[self._dialect]
        tokens, is_broken = self._kernel(DrawShape(vocab_len, logits.dtype))(
            inputs=[logits, params, numbers],
            grid=(threads, num_rows, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[(num_rows,), (num_rows,)],
            output_dtypes=[mx.uint32, mx.uint8],
        )
        return tokens, is_broken.view(mx.bool_)

    def _kernel(self, shape: DrawShape) -> Kernel:
        kernel = self._made.get(shape)
        if kernel is None:
            kernel = self._made[shape] = draw_text(self._dialect, shape).build(self._factory)
        return kernel


def draw_array(rows: npt.NDArray[Any]) -> mx.array:
    """Parameters or numbers of rows (R, ...), flat; of fewer than MIN_ELEMENTS Metal would make another kernel."""
    flat = rows.reshape(-1)
    return mx.array(np.concatenate([flat, np.zeros(max(0, MIN_ELEMENTS - len(flat)), flat.dtype)]))


def draw_text(dialect: Dialect, shape: DrawShape) -> KernelText:
    """Logits to tokens: src/draw.h."""
    constants: Constants = {"VOCAB": shape.vocab_len, "DRAW_THREADS": THREADS[dialect], "Logit": shape.dtype}
    steps = lookup_text("tq_draw_step", np.exp2(np.array(STEP_OCTAVES) * TIE_OCTAVES))
    source = (
        "TQ_SHARED_VARIABLE(TqDrawShared, shared);\n"
        f"tq_draw({PLACE[dialect]}, {{logits, params, numbers}}, tokens, is_broken, shared);\n"
    )
    head = header_text(dialect, constants, steps, "draw")
    return KernelText("draw", DRAW_INPUTS, ("tokens", "is_broken"), source, head, contiguous=True)
