"""Two arrays added and their sum normalised by one launch: src/add_norm.h, its text and how it is called.

Where a step is bound by launches, an addition costs as much as a product. The readable twin is `mx.fast.rms_norm` of
the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu.source import (
    PLACE,
    Constants,
    Dialect,
    Kernel,
    KernelFactory,
    KernelText,
    header_text,
    mlx_factory,
)

NORM_INPUTS = ("rows", "added", "weight")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
MOST_ROWS = 65535  # of a grid's second axis
MOST_THREADS = 512  # of a block; each has eight neighbours of a row at a time


class NormShape(NamedTuple):
    """What a kernel is compiled for."""

    width: int
    dtype: mx.Dtype  # of rows and weight
    eps: float


class NormKernels:
    """The kernels of one kind of GPU, made at the first use of each shape."""

    def __init__(self, dialect: Dialect, factory: KernelFactory | None = None) -> None:
        """factory: by default MLX's own for the dialect."""
        self._dialect, self._factory = dialect, factory or mlx_factory(dialect)
        self._made: dict[NormShape, Kernel] = {}

    @staticmethod
    def has_kernel(shape: NormShape) -> bool:
        return shape.width >= 8 and shape.width % 8 == 0 and shape.dtype in DTYPES

    def add(self, x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
        """x + y and its RMSNorm, both (..., W), of x, y (..., W) and weight (W,), all of one dtype.

        At most MOST_ROWS rows, of a shape that `has_kernel`. A row's result depends on no other row.
        """
        shape = NormShape(x.shape[-1], x.dtype, eps)
        threads = norm_threads(shape.width)
        total, normed = self._kernel(shape)(
            inputs=[x, y, weight],
            grid=(threads, x.size // shape.width, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[x.shape, x.shape],
            output_dtypes=[x.dtype, x.dtype],
        )
        return total, normed

    def _kernel(self, shape: NormShape) -> Kernel:
        kernel = self._made.get(shape)
        if kernel is None:
            kernel = self._made[shape] = norm_text(self._dialect, shape).build(self._factory)
        return kernel


def norm_threads(width: int) -> int:
    """Of a block: whole warps, as many as there are pieces of eight where that is allowed."""
    return min(MOST_THREADS, -(-width // 256) * 32)


def norm_text(dialect: Dialect, shape: NormShape) -> KernelText:
    """src/add_norm.h."""
    constants: Constants = {"WIDTH": shape.width, "NORM_THREADS": norm_threads(shape.width), "Elem": shape.dtype}
    eps = f"TQ_CONSTANT float EPS = {np.float32(shape.eps):.9e}f;\n"
    source = (
        f"TQ_SHARED_VARIABLE(float, of_warps[{norm_threads(shape.width) // 32}]);\n"
        f"tq_add_norm({PLACE[dialect]}, {{rows, added, weight}}, sum, normed, of_warps);\n"
    )
    head = header_text(dialect, constants, eps, "add_norm")
    return KernelText("norm", NORM_INPUTS, ("sum", "normed"), source, head, contiguous=True)
