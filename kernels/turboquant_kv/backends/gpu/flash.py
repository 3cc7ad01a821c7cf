"""Prefill attention on CUDA's tensor cores over one layer's decoded histories: no mask is read, positions decide.

FlashAttention-2 (arXiv 2307.08691, after 2205.14135) with this project's rule of who sees what (format.py), for 16-bit
types and head dimensions up to MAX_DIM. Owns tile sizes, the kernel's text and its launch; the histories are
page_kernels.py's, and what has no kernel here takes masked_prefill.py's mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu.arena import prefill_arena
from turboquant_kv.backends.gpu.prefill_plan import PrefillGroup
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
from turboquant_kv.codec.format import UnsupportedFormatError

FLASH_INPUTS = ("queries", "keys", "values", "figures", "sinks")
MIN_DIM = 64  # shorter ones are not tried
MAX_DIM = 256  # of 512 no tile's sums fit the registers
DTYPES = (mx.float16, mx.bfloat16)
# Two blocks of 128 threads, of 255 registers each, are what a processor's registers hold, and two stages of tiles what
# its shared memory does beside their queries. One block of 8 warps reads tiles half as often but ends more unevenly: on
# an H100 it was 5% slower, 10% with three stages.
WARPS = 4
STAGES = 2
NO_SINK = -1e30  # a logit that weighs nothing


@dataclass(frozen=True, slots=True)
class FlashShape:
    """What a prefill kernel is compiled for."""

    num_q_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    page_tokens: int
    sink_tokens: int
    dtype: mx.Dtype  # of queries, history and output
    capped: bool = False

    @property
    def warp_rows(self) -> int:
        """Queries of a warp: 32 share each fragment that is read, where that many rows of sums fit its registers."""
        return 32 if self.v_dim <= 128 else 16

    @property
    def columns(self) -> int:
        """Keys of a tile, whatever their pages: 64, or fewer where two blocks' shared memory would not hold them."""
        return 64 if max(self.k_dim, self.v_dim) <= 128 else 32

    @property
    def rows(self) -> int:
        """Queries of a block, all of one head."""
        return WARPS * self.warp_rows


class FlashKernels:
    """The prefill kernels of one kind of GPU, made at the first use of each shape."""

    def __init__(self, dialect: Dialect, factory: KernelFactory | None = None) -> None:
        """factory: by default MLX's own for the dialect."""
        self._dialect, self._factory = dialect, factory or mlx_factory(dialect)
        self._made: dict[FlashShape, Kernel] = {}

    def has_kernel(self, shape: FlashShape) -> bool:
        fits = min(shape.k_dim, shape.v_dim) >= MIN_DIM and max(shape.k_dim, shape.v_dim) <= MAX_DIM
        return self._dialect == "cuda" and fits and shape.dtype in DTYPES

    def attend(
        self,
        shape: FlashShape,
        queries: mx.array,
        history: tuple[mx.array, mx.array],
        group: PrefillGroup,
        *,
        scale: float,
        sinks: mx.array | None,
        cap: float = 0.0,
    ) -> mx.array:
        """Attention of the group's queries (B, Hq, T, D): (B, Hq, T, Dv) in their dtype, zeros past each one's queries.

        history: keys (rows, D) and values (rows, Dv) of all sequences, each where the group says. scale is positive;
        sinks (Hq,) join the denominator; cap: of a capped shape. Raises UnsupportedFormatError for what has no kernel.
        """
        num_rows, batch = queries.shape[2], len(group.sequences)
        k_shape, v_shape = (group.num_rows, shape.k_dim), (group.num_rows, shape.v_dim)
        if (
            not self.has_kernel(shape)
            or scale <= 0  # peaks are looked for before scores are scaled
            or shape.capped != (cap > 0)
            or queries.shape != (batch, shape.num_q_heads, num_rows, shape.k_dim)
            or (history[0].shape, history[1].shape) != (k_shape, v_shape)
            or {queries.dtype, history[0].dtype, history[1].dtype} != {shape.dtype}
        ):
            raise UnsupportedFormatError(f"queries {queries.shape} over {history[0].shape} do not fit {shape}")
        # a run of rows begins at a multiple of a warp's behind the sink, up to warp_rows - 1 before the first query
        before = max((one.figures.q_start - shape.sink_tokens) % shape.warp_rows for one in group.sequences)
        num_blocks = -(-(before + num_rows) // shape.rows)
        out: mx.array = self._kernel(shape)(
            inputs=[
                queries,
                *history,
                group.prefill_figures(num_rows, scale, cap),
                _no_sinks(shape.num_q_heads) if sinks is None else sinks.astype(mx.float32),
            ],
            grid=(32 * WARPS * num_blocks, shape.num_q_heads, batch),
            threadgroup=(32 * WARPS, 1, 1),
            output_shapes=[(batch, shape.num_q_heads, num_rows, shape.v_dim)],
            output_dtypes=[shape.dtype],
        )[0]
        return out

    def _kernel(self, shape: FlashShape) -> Kernel:
        kernel = self._made.get(shape)
        if kernel is None:
            kernel = self._made[shape] = flash_text(shape).build(self._factory)
        return kernel


@cache
def _no_sinks(num_heads: int) -> mx.array:
    return mx.array(np.full(num_heads, NO_SINK, np.float32))


def flash_text(shape: FlashShape) -> KernelText:
    """The prefill kernel of a shape, in CUDA's dialect: src/prefill.h."""
    arena = prefill_arena(shape.k_dim, shape.v_dim, shape.rows, shape.columns, STAGES)
    constants: Constants = {
        **{"D": shape.k_dim, "DV": shape.v_dim},
        **{"HEADS": shape.num_kv_heads, "G": shape.num_q_heads // shape.num_kv_heads},
        **{"PAGE": shape.page_tokens, "SINK": shape.sink_tokens, "In": shape.dtype},
        **{"WARPS": WARPS, "STAGES": STAGES, "WARP_ROWS": shape.warp_rows, "COLUMNS": shape.columns},
        "CAPPED": shape.capped,
        **arena.constants,
    }
    source = f"tq_prefill({PLACE['cuda']}, {{queries, keys, values, figures, sinks}}, out);\n"
    head = header_text("cuda", constants, "", "prefill")
    # contiguous: queries are copied if they are not, which a launch of this length hides
    return KernelText("prefill", FLASH_INPUTS, ("out",), source, head, arena.num_bytes, contiguous=True)
