"""Kernels over whole pages: encoding exact rows, and one side of a history decoded for prefill.

For dims that are a power of two (64, 128, 256, 512); gpu.py takes the MLX operations for others. Leaves the text's
vocabulary to gpu_source.py and where results go to gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu_source import (
    ENCODE_INPUTS,
    HISTORY_INPUTS,
    Constants,
    Dialect,
    Kernel,
    KernelFactory,
    KernelText,
    constants_text,
    header,
    mlx_factory,
    piece,
    table_text,
)
from turboquant_kv.codebook import centroids, thresholds
from turboquant_kv.format import ScaleKind

WARPS = 4  # vectors of a block
SCALE_KINDS: dict[ScaleKind, int] = {"plain": 0, "norm": 1, "least_squares": 2, "unbiased": 3}


@dataclass(frozen=True, slots=True)
class SideShape:
    """What a page kernel is compiled for: keys or values of a layer."""

    num_heads: int
    dim: int
    bits: int
    page_tokens: int
    scale: ScaleKind
    dtype: mx.Dtype  # of exact rows

    @property
    def has_kernel(self) -> bool:
        return self.dim & (self.dim - 1) == 0


@lru_cache(maxsize=64)
def _figures(*values: int) -> mx.array:
    """As an array of eight: fewer would come in another of Metal's address spaces."""
    return mx.array(np.array([*values, *(0 for _ in range(8 - len(values)))], np.int32))


class PageKernels:
    """The kernels of one kind of GPU, made at the first use of each shape."""

    def __init__(self, dialect: Dialect, factory: KernelFactory | None = None) -> None:
        self._dialect, self._factory = dialect, factory or mlx_factory(dialect)
        self._made: dict[tuple[str, SideShape], Kernel] = {}

    def _kernel(self, role: str, shape: SideShape) -> Kernel:
        kernel = self._made.get((role, shape))
        if kernel is None:
            text = encode_text(self._dialect, shape) if role == "encode" else history_text(self._dialect, shape)
            kernel = self._made[role, shape] = text.build(self._factory)
        return kernel

    def encode(self, shape: SideShape, rows: mx.array, constants: mx.array) -> tuple[mx.array, mx.array]:
        """rows (H, P*page, D) to packed codes (P, H, page, bytes) and scales (P, H, page).

        constants: signs / sqrt(D) (D,), then means (H, D), flat.
        """
        num_rows = rows.shape[1]
        pages = (num_rows // shape.page_tokens, shape.num_heads, shape.page_tokens)
        packed, scales = self._kernel("encode", shape)(
            inputs=[rows, _figures(num_rows), constants],
            grid=(32 * WARPS * -(-num_rows // WARPS), shape.num_heads, 1),
            threadgroup=(32 * WARPS, 1, 1),
            output_shapes=[(*pages, shape.dim * shape.bits // 8), pages],
            output_dtypes=[mx.uint8, mx.float16],
        )
        return packed, scales

    def history(
        self,
        shape: SideShape,
        pages: tuple[mx.array, mx.array],
        page_ids: mx.array,
        num_tokens: int,
        sink: tuple[mx.array, int],
        window: tuple[mx.array, int],
        constants: mx.array,
    ) -> mx.array:
        """(H, columns, D) in the exact rows' dtype: sink, decoded pages, window. sink, window: rows and how many."""
        num_columns = sink[1] + num_tokens + window[1]
        history: mx.array
        (history,) = self._kernel("history", shape)(
            inputs=[*pages, page_ids, sink[0], window[0], _figures(num_columns, sink[1], num_tokens), constants],
            grid=(32 * WARPS * -(-num_columns // WARPS), shape.num_heads, 1),
            threadgroup=(32 * WARPS, 1, 1),
            output_shapes=[(shape.num_heads, num_columns, shape.dim)],
            output_dtypes=[shape.dtype],
        )
        return history


def _constants(shape: SideShape) -> dict[str, int | bool | mx.Dtype]:
    return {
        **{"D": shape.dim, "BITS": shape.bits, "HEADS": shape.num_heads, "PAGE": shape.page_tokens},
        **{"ROTATION": shape.dim, "SCALE_KIND": SCALE_KINDS[shape.scale]},
    }


def encode_text(dialect: Dialect, shape: SideShape) -> KernelText:
    """Exact rows to codes."""
    constants: Constants = {**_constants(shape), "In": shape.dtype, "Half": mx.float16}
    tables = table_text("tq_book", centroids(shape.bits)) + table_text("tq_thresholds", thresholds(shape.bits))
    body = constants_text(dialect, constants) + piece(f"opening_{dialect}") + piece("encode")
    return KernelText("encode", ENCODE_INPUTS, ("packed", "scales"), body, header(dialect, "portable", tables))


def history_text(dialect: Dialect, shape: SideShape) -> KernelText:
    """Codes and exact rows to full vectors."""
    constants: Constants = {**_constants(shape), "Exact": shape.dtype}
    tables = table_text("tq_book", centroids(shape.bits))
    body = constants_text(dialect, constants) + piece(f"opening_{dialect}") + piece("history")
    return KernelText("history", HISTORY_INPUTS, ("history",), body, header(dialect, "portable", tables))
