"""Prefill attention on CUDA's tensor cores over one layer's decoded histories: no mask is read, positions decide.

FlashAttention-2 (arXiv 2307.08691, after 2205.14135) with this project's rule of who sees what (format.py), for 16-bit
types and head dimensions up to MAX_DIM; on Hopper GPUs, for dims of HOPPER_DIMS, FlashAttention-3 (arXiv 2407.08608).
Owns which of both a shape takes, tile sizes, the kernels' text and their launch; the histories are page_kernels.py's,
and what has no kernel here takes masked_prefill.py's mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.gpu.arena import Arena, hopper_prefill_arena, prefill_arena
from turboquant_kv.backends.gpu.device import Device, this_device
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
# Of Hopper's kernel: tiles in flight of each side (three were no faster on an H200) and their columns.
HOPPER_DIMS = (64, 128)
HOPPER_STAGES = 2
HOPPER_COLUMNS = 128
GROUP_WARPS, GROUP_ROWS = 4, 64  # warps that ask for a product together, and its rows
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


class Blocks(NamedTuple):
    """How a kernel shares a shape's work out among thread blocks."""

    file: str
    """Of src/, and its function."""
    warps: int
    """That have queries."""
    warp_rows: int
    """Queries of each."""
    columns: int
    """Keys of a tile."""
    stages: int
    """Tiles in flight."""
    threads: int
    begins_at: int
    """Behind the sink, a block's queries begin at a multiple of this; 1: anywhere."""
    tile: int
    """Columns of the tiles that it reads histories in; 1: rows."""
    arena: Arena

    @property
    def rows(self) -> int:
        """Queries of a block, all of one head."""
        return self.warps * self.warp_rows


def plain_blocks(shape: FlashShape) -> Blocks:
    """Of src/prefill.h."""
    arena = prefill_arena(shape.k_dim, shape.v_dim, WARPS * shape.warp_rows, shape.columns, STAGES)
    rows = shape.warp_rows
    return Blocks("prefill", WARPS, rows, shape.columns, STAGES, 32 * WARPS, begins_at=rows, tile=1, arena=arena)


def hopper_blocks(shape: FlashShape) -> Blocks:
    """Of src/prefill_hopper.h: a group of warps that copies, the others compute.

    Two of these fill the registers with sums of 128 value dims, three with sums of 64: on an H200 three took 0.7 of the
    time that two take there.
    """
    groups = 2 if shape.v_dim > 64 else 3
    rows, threads = groups * GROUP_ROWS, 32 * GROUP_WARPS * (groups + 1)
    return Blocks(
        *("prefill_hopper", groups * GROUP_WARPS, GROUP_ROWS // GROUP_WARPS, HOPPER_COLUMNS, HOPPER_STAGES, threads),
        begins_at=1,
        tile=HOPPER_COLUMNS,
        arena=hopper_prefill_arena(shape.k_dim, shape.v_dim, rows, HOPPER_COLUMNS, HOPPER_STAGES),
    )


class FlashKernels:
    """The prefill kernels of one kind of GPU, made at the first use of each shape."""

    def __init__(self, dialect: Dialect, factory: KernelFactory | None = None, device: Device | None = None) -> None:
        """factory, device: by default MLX's own."""
        self._dialect, self._factory, self._device = dialect, factory or mlx_factory(dialect), device
        self._made: dict[FlashShape, tuple[Blocks, Kernel]] = {}

    def has_kernel(self, shape: FlashShape) -> bool:
        fits = min(shape.k_dim, shape.v_dim) >= MIN_DIM and max(shape.k_dim, shape.v_dim) <= MAX_DIM
        return self._dialect == "cuda" and fits and shape.dtype in DTYPES

    @cached_property
    def _has_hopper(self) -> bool:
        return self._dialect == "cuda" and (self._device or this_device()).has_group_products

    def _takes_hopper(self, shape: FlashShape) -> bool:
        return self._has_hopper and self.has_kernel(shape) and {shape.k_dim, shape.v_dim} <= {*HOPPER_DIMS}

    def tile(self, shape: FlashShape) -> int:
        """Columns of the tiles in which the shape's kernel reads histories; 1 where they are rows."""
        return HOPPER_COLUMNS if self._takes_hopper(shape) else 1

    @property
    def details(self) -> str:
        """What attends in prefill."""
        if self._dialect != "cuda":
            return "MLX's attention with a mask"
        dims = " or ".join(map(str, HOPPER_DIMS))
        own = f" (of {dims}: one on Hopper's own instructions)" if self._has_hopper else ""
        most = f"head dimensions up to {MAX_DIM}{own}"
        return f"a fused kernel for 16-bit types and {most}, else MLX's attention with a mask"

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

        history: keys (rows, D) and values (rows, Dv) of all sequences, each where the group says, whose tile is the
        shape's. scale is positive; sinks (Hq,) join the denominator; cap: of a capped shape. Raises
        UnsupportedFormatError for what has no kernel.
        """
        num_rows, batch = queries.shape[2], len(group.sequences)
        k_shape, v_shape = (group.num_rows, shape.k_dim), (group.num_rows, shape.v_dim)
        if (
            not self.has_kernel(shape)
            or scale <= 0  # peaks are looked for before scores are scaled
            or shape.capped != (cap > 0)
            or group.tile != self.tile(shape)
            or queries.shape != (batch, shape.num_q_heads, num_rows, shape.k_dim)
            or (history[0].shape, history[1].shape) != (k_shape, v_shape)
            or {queries.dtype, history[0].dtype, history[1].dtype} != {shape.dtype}
        ):
            raise UnsupportedFormatError(f"queries {queries.shape} over {history[0].shape} do not fit {shape}")
        blocks, kernel = self._kernel(shape)
        # where runs of rows begin at a multiple, the first may begin before the first query
        before = max((one.figures.q_start - shape.sink_tokens) % blocks.begins_at for one in group.sequences)
        num_blocks = -(-(before + num_rows) // blocks.rows)
        out: mx.array = kernel(
            inputs=[
                queries,
                *history,
                group.prefill_figures(num_rows, scale, cap),
                _no_sinks(shape.num_q_heads) if sinks is None else sinks.astype(mx.float32),
            ],
            grid=(blocks.threads * num_blocks, shape.num_q_heads, batch),
            threadgroup=(blocks.threads, 1, 1),
            output_shapes=[(batch, shape.num_q_heads, num_rows, shape.v_dim)],
            output_dtypes=[shape.dtype],
        )[0]
        return out

    def _kernel(self, shape: FlashShape) -> tuple[Blocks, Kernel]:
        made = self._made.get(shape)
        if made is None:
            blocks = hopper_blocks(shape) if self._takes_hopper(shape) else plain_blocks(shape)
            made = self._made[shape] = blocks, flash_text(shape, blocks).build(self._factory)
        return made


@cache
def _no_sinks(num_heads: int) -> mx.array:
    return mx.array(np.full(num_heads, NO_SINK, np.float32))


def flash_text(shape: FlashShape, blocks: Blocks) -> KernelText:
    """The prefill kernel of a shape, in CUDA's dialect."""
    constants: Constants = {
        **{"D": shape.k_dim, "DV": shape.v_dim},
        **{"HEADS": shape.num_kv_heads, "G": shape.num_q_heads // shape.num_kv_heads},
        **{"PAGE": shape.page_tokens, "SINK": shape.sink_tokens, "In": shape.dtype},
        **{"WARPS": blocks.warps, "STAGES": blocks.stages, "WARP_ROWS": blocks.warp_rows, "COLUMNS": blocks.columns},
        "CAPPED": shape.capped,
        **blocks.arena.constants,
    }
    source = f"tq_{blocks.file}({PLACE['cuda']}, {{queries, keys, values, figures, sinks}}, out);\n"
    return KernelText(
        *(blocks.file, FLASH_INPUTS, ("out",), source, header_text("cuda", constants, "", blocks.file)),
        shared_bytes=blocks.arena.num_bytes,
        bounds=(blocks.threads, 1) if blocks.file == "prefill_hopper" else None,  # its warps share registers out anew
        contiguous=True,  # queries are copied if they are not, which a launch of this length hides
    )
