"""Kernels over whole pages: encoding exact rows, and one side of histories decoded for prefill.

Leaves the text's vocabulary to source.py and where results go to store.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.gpu.figures import (
    MIN_ELEMENTS,
    AnyFigures,
    EncodeFigures,
    PutFigures,
    array_of,
)
from turboquant_kv.backends.gpu.launch import FENCE_SHAPE
from turboquant_kv.backends.gpu.prefill_plan import PrefillGroup
from turboquant_kv.backends.gpu.source import (
    PLACE,
    Constants,
    Dialect,
    Kernel,
    KernelFactory,
    KernelText,
    codec_table,
    header_text,
    mlx_factory,
    strided,
    table_text,
)
from turboquant_kv.codec.codebook import thresholds
from turboquant_kv.codec.format import ScaleKind
from turboquant_kv.codec.rotation import Signs, hadamard_base
from turboquant_kv.codec.trellis_reference import levels

ENCODE_INPUTS = ("rows", "pages", "figures", "constants", "codes", "scales", "fence")
HISTORY_INPUTS = ("codes", "scales", "page_ids", "sink", "window", "figures", "constants", "fence")
PUT_INPUTS = ("source", "target", "places", "figures", "fence")
THREADS = 128
# Of a power of two dims, what a thread holds of a vector: 8 or 16. More exchange less and need more registers.
LANE_DIMS = 8
# Vectors that a thread decodes one after the other, their codes asked for at once; more need more registers.
ROUNDS = 4
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
    trellis: bool = False  # the bits are a trellis codec's
    pairs: int = 0  # of dims that turn with position, and take the mean with them
    neighbours: bool = False  # partners lie side by side, else `pairs` apart

    @property
    def base(self) -> int:
        """Order of the Hadamard matrix's factor that is not Sylvester's; 1 for powers of two."""
        return len(hadamard_base(self.dim))

    @property
    def lanes(self) -> int:
        """Neighbouring threads that share a vector, each with LANE_DIMS of it or a column of src/pages.h."""
        return min(32, self.dim // LANE_DIMS) if self.base == 1 else self.dim // self.base

    @property
    def rounds(self) -> int:
        """Vectors of which a thread decodes its part."""
        return ROUNDS if self.base == 1 else 1  # columns meet in shared memory, which has room for one


class Places(NamedTuple):
    """Row or page numbers for a launch: columns of `length` int32 behind each other, flat."""

    array: mx.array
    length: int

    @classmethod
    def of(cls, columns: Sequence[npt.NDArray[np.int64]] | npt.NDArray[np.int64]) -> Places:
        """Columns of equal length."""
        flat = np.array(columns, np.int32).reshape(-1)
        padding = np.zeros(max(0, MIN_ELEMENTS - len(flat)), np.int32)
        return cls(mx.array(np.concatenate([flat, padding])), len(columns[0]))


@lru_cache(maxsize=64)
def _uploaded(figures: AnyFigures) -> mx.array:
    """All layers of a step ask for the same ones."""
    return array_of(figures)


class PageKernels:
    """The kernels of one kind of GPU, made at the first use of each shape.

    Those that write pages or rows do it in place, in an array that they are given. All return a fence: an array that
    is there once they are done. Whoever reads or writes the same arrays next is given that fence, and so comes later.
    """

    def __init__(self, dialect: Dialect, factory: KernelFactory | None = None) -> None:
        self._dialect, self._factory = dialect, factory or mlx_factory(dialect)
        self._made: dict[tuple[str, SideShape | mx.Dtype, int], Kernel] = {}

    def _kernel(self, role: str, shape: SideShape, tile: int = 1) -> Kernel:
        kernel = self._made.get((role, shape, tile))
        if kernel is None:
            text = encode_text(self._dialect, shape) if role == "encode" else history_text(self._dialect, shape, tile)
            kernel = self._made[role, shape, tile] = text.build(self._factory)
        return kernel

    def _put_kernel(self, dtype: mx.Dtype) -> Kernel:
        kernel = self._made.get(("put", dtype, 1))
        if kernel is None:
            kernel = self._made["put", dtype, 1] = put_text(self._dialect, dtype).build(self._factory)
        return kernel

    def encode(
        self,
        shape: SideShape,
        rows: mx.array,
        pages: Places,
        arrays: tuple[mx.array, mx.array],
        constants: mx.array,
        fence: mx.array,
        turns: mx.array | None = None,
    ) -> mx.array:
        """rows (H, rows, D) to pages of arrays (all pages, H, page, bytes) uint8 and (all pages, H, page) float16.

        pages: ids, which of its conversation each is, the row where each begins. constants: signs / sqrt(D) (D,), then
        means (H, D), flat. turns: Turns.floats of all blocks, where the shape has pairs.
        """
        num_pages, block_rows = pages.length, THREADS // shape.lanes
        made: mx.array
        (made,) = self._kernel("encode", shape)(
            inputs=[
                *(rows, pages.array, _uploaded(EncodeFigures(num_pages)), constants, *arrays, fence),
                *(() if turns is None else (turns,)),
            ],
            grid=(THREADS * -(-num_pages * shape.page_tokens // block_rows), shape.num_heads, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[FENCE_SHAPE],
            output_dtypes=[mx.float32],
        )
        return made

    def put(self, source: mx.array, target: mx.array, places: Places, fence: mx.array) -> mx.array:
        """Rows of source (B, H, T, D), row t of sequence b being number b * T + t, to rows of target (H, rows, D).

        places: which rows, and where they go. The target's rows are dense; both are of one dtype.
        """
        elements, rows_each = source.shape[3], source.shape[2]
        made: mx.array
        (made,) = self._put_kernel(source.dtype)(
            inputs=[source, target, places.array, _uploaded(PutFigures(places.length, elements, rows_each)), fence],
            grid=(THREADS * -(-elements // THREADS), places.length, source.shape[1]),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[FENCE_SHAPE],
            output_dtypes=[mx.float32],
        )
        return made

    def history(
        self,
        shape: SideShape,
        pages: tuple[mx.array, mx.array],
        page_table: mx.array,
        group: PrefillGroup,
        sink: mx.array,
        window: mx.array,
        constants: mx.array,
        fence: mx.array,
        turns: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Histories of the group's sequences, (rows, D) in the exact rows' dtype, and the launch's fence.

        Of each sequence (H, places) rows: sink, decoded pages, window; or, where the group has tiles, those of
        src/history.h, of dims that are multiples of 64. page_table (B, width) int32 of the whole step.
        sink, window: exact rows (H, rows, D), in which the group's figures say where each sequence's lie. turns: as for
        `encode`; pages are the conversations' first ones.
        """
        block_columns = THREADS // shape.lanes * shape.rounds
        history, made = self._kernel("history", shape, group.tile)(
            inputs=[
                *(*pages, page_table, sink, window, group.history_figures, constants, fence),
                *(() if turns is None else (turns,)),
            ],
            grid=(THREADS * -(-group.most_places // block_columns), shape.num_heads, len(group.sequences)),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(group.num_rows, shape.dim), FENCE_SHAPE],
            output_dtypes=[shape.dtype, mx.float32],
        )
        return history, made


def encode_text(dialect: Dialect, shape: SideShape) -> KernelText:
    """Exact rows to codes: src/encode.h."""
    constants = {**_constants(shape), "SCALE_KIND": SCALE_KINDS[shape.scale], "In": shape.dtype}
    limits = _trellis_thresholds(shape.bits) if shape.trellis else thresholds(shape.bits)
    tables = table_text("tq_book", codec_table(shape.bits, shape.trellis)) + table_text("tq_thresholds", limits)
    source = (
        "TQ_SHARED_VARIABLE(TqEncodeShared, shared);\n"
        f"tq_encode({PLACE[dialect]}, {{{strided('rows', 3)}, pages, constants, {_turns(shape)}}}, "
        "tq_encode_figures(figures), {TQ_WRITABLE(uchar, codes), TQ_WRITABLE(Half, scales)}, shared);\n"
    )
    head = header_text(dialect, constants, tables + _base_text(hadamard_base(shape.dim)), "encode")
    return KernelText("encode", _with_turns(ENCODE_INPUTS, shape), ("fence_out",), source, head)


def put_text(dialect: Dialect, dtype: mx.Dtype) -> KernelText:
    """Rows to other places: src/rows.h."""
    source = (
        f"tq_put_rows({PLACE[dialect]}, {{{strided('source', 4)}, {strided('target', 2)}, places}}, "
        "tq_put_figures(figures));\n"
    )
    head = header_text(dialect, {"Element": dtype}, "", "rows")
    return KernelText("put", PUT_INPUTS, ("fence_out",), source, head)


def history_text(dialect: Dialect, shape: SideShape, tile: int = 1) -> KernelText:
    """Codes and exact rows to full vectors: src/history.h. tile: columns of a tile; 1: histories are rows."""
    constants = {**_constants(shape), "ROUNDS": shape.rounds, "TILE": tile, "Exact": shape.dtype}
    tables = table_text("tq_book", codec_table(shape.bits, shape.trellis)) + _base_text(hadamard_base(shape.dim).T)
    source = (
        "TQ_SHARED_VARIABLE(TqHistoryShared, shared);\n"
        f"tq_history({PLACE[dialect]}, {{codes, scales, page_ids, {strided('sink', 3)}, {strided('window', 3)}, "
        f"constants, {_turns(shape)}}}, figures, history, shared);\n"
    )
    head = header_text(dialect, constants, tables, "history")
    return KernelText("history", _with_turns(HISTORY_INPUTS, shape), ("history", "fence_out"), source, head)


def _constants(shape: SideShape) -> Constants:
    per_lane = shape.dim // shape.lanes
    return {
        **{"D": shape.dim, "BITS": shape.bits, "HEADS": shape.num_heads, "PAGE": shape.page_tokens},
        **{"BASE": shape.base, "LANES": shape.lanes, "PER": per_lane, "UNITS": -(-per_lane // 8)},
        **{"TRELLIS": shape.trellis, "TURN_PAIRS": shape.pairs, "NEIGHBOURS": shape.neighbours},
    }


def _turns(shape: SideShape) -> str:
    """The argument, or anything of its type that is not read."""
    return "turns" if shape.pairs else "constants"


def _with_turns(inputs: tuple[str, ...], shape: SideShape) -> tuple[str, ...]:
    return (*inputs, "turns") if shape.pairs else inputs


def _trellis_thresholds(bits: int) -> npt.NDArray[np.float32]:
    """(2**(bits + 1),): of each subset the middles between its levels, and a last one that nothing exceeds."""
    subsets = levels(bits).astype(np.float64).reshape(-1, 4).T
    middles = (subsets[:, 1:] + subsets[:, :-1]) / 2
    most = np.full((4, 1), np.finfo(np.float32).max)
    return np.concatenate([middles, most], axis=1).astype(np.float32).reshape(-1)


def _base_text(base: Signs) -> str:
    """tq_base of src/pages.h."""
    rows = [sum(1 << int(k) for k in np.flatnonzero(row < 0)) for row in base]
    choice = "".join(f"i == {i} ? {row}u : " for i, row in enumerate(rows[:-1]))
    return f"TQ_FN uint tq_base(int i) {{ return {choice}{rows[-1]}u; }}\n"
