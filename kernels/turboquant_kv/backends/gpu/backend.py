"""The GPU backend: attention and encoding on packed pages in fused kernels, for Metal and CUDA.

Pages stay in the canonical layout (docs/gpu.md says why that costs nothing), in MLX arrays. Owns page tables, exact
rows as the kernels take them, and which path a call takes; `details` names them. Array masks are the MLX operations of
mlx_ops over the same pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.base import (
    AttentionCall,
    ExactRows,
    LayerShape,
    LayerStore,
    Means,
    PageIds,
    SequenceView,
    StepPlan,
)
from turboquant_kv.backends.gpu.device import MIN_CAPABILITY, compute_capability
from turboquant_kv.backends.gpu.figures import MIN_ELEMENTS, SequenceFigures
from turboquant_kv.backends.gpu.flash import FlashKernels, FlashShape
from turboquant_kv.backends.gpu.launch import DecodeKernels, DecodeLaunch, LayerInputs
from turboquant_kv.backends.gpu.masked_prefill import masked_attention
from turboquant_kv.backends.gpu.page_kernels import PageKernels, SideShape
from turboquant_kv.backends.gpu.shape import MAX_QUERY_ROWS, DecodeShape, codec_kind, is_power_of_two
from turboquant_kv.backends.gpu.source import Dialect
from turboquant_kv.backends.gpu.turns import Turns
from turboquant_kv.backends.mlx_ops.backend import KIT, GrowingArrays, MlxBackend, attend_by_tiles
from turboquant_kv.backends.page_runs import runs_of
from turboquant_kv.backends.portable.canonical import CanonicalStorage
from turboquant_kv.codec.codec import Codec
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.rotary import BLOCK_TOKENS
from turboquant_kv.codec.rotation import Which, rotation_matrix, signs

# A slice is a launch of its own, a scatter is one for all but a slow one; where they break even was not measured.
MAX_SLICES = 4
# Norm of a head's key mean up to which its share of a score may be a product of halves: queries of norm 20 then get
# errors of about 0.02 at 128 dims, a tenth of what 4-bit codes do. Qwen2.5 has layers with 130 to 900.
LONGEST_PLAIN_MEAN = 48.0


class OpenArrays(GrowingArrays):
    """Page arrays that kernels may read."""

    @property
    def codes(self) -> mx.array:
        return self._codes

    @property
    def scales(self) -> mx.array:
        return self._scales

    def put_whole(self, page_ids: PageIds, packed: mx.array, scales: mx.array) -> None:
        """As `put`; few runs of ids, as prefill has them, are written as a slice each."""
        runs = runs_of(page_ids)
        if len(runs) > MAX_SLICES:
            self.put(page_ids, packed, scales)
            return
        done = 0
        for start, stop in runs:
            part = slice(done, done + stop - start)
            self._codes[start:stop], self._scales[start:stop] = packed[part], scales[part]
            done = part.stop


class Kernels(NamedTuple):
    """The kernels of one kind of GPU; all layers and runtimes share them."""

    dialect: Dialect
    decode: DecodeKernels
    pages: PageKernels
    flash: FlashKernels


class GpuStepPlan(StepPlan):
    """One page table and one set of figures for all layers of a step.

    page_table (B, width) int32, rows padded. Figures tell where each sequence's exact rows lie: in arrays of its own,
    or, where a kernel takes no more arrays, behind each other in joined ones.
    """

    def __init__(self, views: Sequence[SequenceView], page_table: mx.array) -> None:
        self.page_table = page_table
        self.sink_rows, self.window_rows = [_num_rows(v.sink) for v in views], [_num_rows(v.window) for v in views]
        self.separate: tuple[SequenceFigures, ...] = tuple([_figures(view) for view in views])

    @cached_property
    def joined(self) -> tuple[SequenceFigures, ...]:
        """Figures of exact rows that lie behind each other."""
        figures = []
        sink_offset = window_offset = 0
        for row, num_sink, num_window in zip(self.separate, self.sink_rows, self.window_rows, strict=True):
            figures.append(row._replace(sink_offset=sink_offset, window_offset=window_offset))
            sink_offset += num_sink
            window_offset += num_window
        return tuple(figures)


class GpuStore(CanonicalStorage, LayerStore):
    """Pages of one layer with everything else that its kernels read, and which of them a call takes."""

    def __init__(
        self, shape: LayerShape, fmt: KVFormat, means: Means | None, kernels: Kernels, turns: Turns | None
    ) -> None:
        """turns: of the means' rotation."""
        self._arrays: list[OpenArrays] = []

        def new_arrays(heads: int, dim: int, codec: Codec) -> OpenArrays:
            self._arrays.append(OpenArrays(heads, dim, codec, fmt.page_tokens))
            return self._arrays[-1]

        super().__init__(KIT, shape, fmt, means, new_arrays)
        self._kernels = kernels
        heads, page = shape.num_kv_heads, fmt.page_tokens
        (k_bits, k_trellis), (v_bits, v_trellis) = codec_kind(fmt.keys, "gpu"), codec_kind(fmt.values, "gpu")
        self._sides = (
            SideShape(heads, shape.k_dim, k_bits, page, fmt.scale, shape.dtype, k_trellis, *_turning(means, fmt)[:2]),
            SideShape(heads, shape.v_dim, v_bits, page, fmt.scale, shape.dtype, v_trellis),
        )
        centred = means if fmt.centred else None
        k_mean = np.zeros((heads, shape.k_dim), np.float32) if centred is None else centred.k
        if centred is not None and centred.rotary is not None:
            k_mean = centred.rotary.averaged(k_mean).astype(np.float32)
        self._turns, self._turning = turns, _turning(means, fmt)
        v_mean = np.zeros((heads, shape.v_dim), np.float32) if centred is None else centred.v
        k_rotation = rotation_matrix(shape.k_dim, fmt.rotation_seed, "k")
        v_rotation = rotation_matrix(shape.v_dim, fmt.rotation_seed, "v")
        self._constants = _constants(k_rotation, True, k_mean), _constants(v_rotation, False, v_mean)
        self._page_constants = (
            self._constants[0] if is_power_of_two(shape.k_dim) else _page_constants("k", fmt, k_mean),
            self._constants[1] if is_power_of_two(shape.v_dim) else _page_constants("v", fmt, v_mean),
        )
        self._no_rows = mx.zeros((heads, 1, shape.k_dim), shape.dtype), mx.zeros((heads, 1, shape.v_dim), shape.dtype)
        self._launches: dict[tuple[int, int, mx.Dtype], DecodeLaunch] = {}

    def encode(self, page_ids: PageIds, first_page: int, k: mx.array, v: mx.array) -> None:
        turns = self._float_turns(first_page + len(page_ids))
        for side, arrays, constants, rows, turned in zip(
            self._sides, self._arrays, self._page_constants, (k, v), (turns, None), strict=True
        ):
            pages = self._kernels.pages.encode(side, rows.astype(side.dtype), constants, first_page, turned)
            arrays.put_whole(page_ids, *pages)

    def _float_turns(self, num_pages: int) -> mx.array | None:
        """Angles of a conversation's first pages."""
        return None if self._turns is None else self._turns.floats(num_pages * self.fmt.page_tokens // BLOCK_TOKENS)

    def history(self, view: SequenceView, table: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of a sequence, (H, columns, D): sink, its pages (in `table`, (1, width)) decoded, window."""
        num_tokens = len(view.page_ids) * self.fmt.page_tokens
        k, v = (
            self._kernels.pages.history(
                side,
                (arrays.codes, arrays.scales) if arrays.num_pages else (mx.zeros((8,), mx.uint8), _NO_SCALES),
                table,
                num_tokens,
                _rows_of(view.sink, name, no_rows),
                _rows_of(view.window, name, no_rows),
                constants,
                turned,
            )
            for side, arrays, constants, name, no_rows, turned in zip(
                self._sides,
                self._arrays,
                self._page_constants,
                "kv",
                self._no_rows,
                (self._float_turns(len(view.page_ids)), None),
                strict=True,
            )
        )
        return k, v

    def attend(self, call: AttentionCall) -> mx.array:
        if call.mask is not None:
            return attend_by_tiles(self, self.shape, call)
        if call.queries.shape[2] <= MAX_QUERY_ROWS:
            return self._decode_attention(call)
        if call.queries.dtype == self.shape.dtype:
            return self._prefill_attention(call)
        return attend_by_tiles(self, self.shape, call)

    def _decode_attention(self, call: AttentionCall) -> mx.array:
        """All sequences in one launch, codes read where they lie."""
        launch, plan = self.launch_for(call.queries), call.plan
        assert isinstance(plan, GpuStepPlan)
        layer, figures = self.layer_inputs(call.views, plan, launch)
        out: mx.array = launch(layer, call.queries, figures, plan.page_table, scale=call.scale, sinks=call.sinks)
        return out

    def layer_inputs(
        self, views: Sequence[SequenceView], plan: GpuStepPlan, launch: DecodeLaunch
    ) -> tuple[LayerInputs, tuple[SequenceFigures, ...]]:
        """What the decode kernels read for these sequences, whose exact rows are joined if there are too many."""
        if self.num_pages == 0:
            self.grow(1)  # kernels take no empty arrays
        if len(views) <= launch.max_sets:
            exact, figures = self._separate_rows(views), plan.separate
        else:
            exact = [*self._joined([view.sink for view in views]), *self._joined([view.window for view in views])]
            figures = plan.joined
        k, v = self._arrays
        pages = k.codes, k.scales, v.codes, v.scales
        return LayerInputs(pages, exact, *self._constants, self._decode_turns(plan, launch)), figures

    def _decode_turns(self, plan: GpuStepPlan, launch: DecodeLaunch) -> tuple[mx.array, ...]:
        """Angles of all blocks that the page table may name."""
        if self._turns is None:
            return ()
        num_blocks = plan.page_table.shape[1] * self.fmt.page_tokens // BLOCK_TOKENS
        if launch.reads_half_turns:
            return (self._turns.halves(num_blocks, self._turning[2]),)
        return (self._turns.floats(num_blocks),)

    def _prefill_attention(self, call: AttentionCall) -> mx.array:
        """One sequence after the other: its history in the model's dtype, for the time of one layer's attention."""
        outputs, shape, queries, plan = [], self.shape, call.queries, call.plan
        assert isinstance(plan, GpuStepPlan)
        flash = FlashShape(
            *(queries.shape[1], shape.num_kv_heads, shape.k_dim, shape.v_dim),
            *(self.fmt.page_tokens, self.fmt.sink_tokens, shape.dtype),
        )
        for b, view in enumerate(call.views):
            if view.num_queries == 0:
                outputs.append(mx.zeros((1, queries.shape[1], queries.shape[2], shape.v_dim), queries.dtype))
                continue
            table = plan.page_table if len(call.views) == 1 else plan.page_table[b : b + 1]
            q, history = queries[b : b + 1], self.history(view, table)
            if self._kernels.flash.has_kernel(flash):
                out = self._kernels.flash.attend(flash, q, history, view, scale=call.scale, sinks=call.sinks)
            else:
                out = masked_attention(q, history, view, self.fmt, scale=call.scale, sinks=call.sinks)
            outputs.append(out)
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def launch_for(self, queries: mx.array) -> DecodeLaunch:
        """The launch for queries (B, Hq, T, D). Raises UnsupportedFormatError when there is none."""
        key = queries.shape[1], queries.shape[2], queries.dtype
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._kernels.decode.launch_for(
                decode_shape(*key, self.shape, self.fmt, self._turning)
            )
        return launch

    def _separate_rows(self, views: Sequence[SequenceView]) -> list[mx.array]:
        """Each sequence's exact rows as arrays of their own, as many sets as a kernel is made for."""
        exact: list[mx.array] = []
        for i in range(1 << (len(views) - 1).bit_length()):  # each number is a kernel: powers of two are enough
            view = views[i if i < len(views) else 0]
            for rows in (view.sink, view.window):
                exact += self._no_rows if rows is None else (rows.k_buffer, rows.v_buffer)
        return exact

    def _joined(self, parts: Sequence[ExactRows | None]) -> tuple[mx.array, mx.array]:
        """Exact rows of a batch behind each other, (H, rows, D) and (H, rows, Dv)."""
        present = [rows for rows in parts if rows is not None]
        if not present:
            return self._no_rows
        if len(present) == 1:
            return present[0].k, present[0].v
        k, v = (mx.concatenate([getattr(rows, side) for rows in present], axis=1) for side in ("k", "v"))
        return k, v


_NO_SCALES = mx.zeros((8,), mx.float16)
PREFILL: dict[Dialect, str] = {
    "cuda": "a fused kernel for 16-bit types and head dimensions up to 256, else MLX's attention with a mask",
    "metal": "MLX's attention with a mask",
}


def _rows_of(rows: ExactRows | None, side: str, no_rows: mx.array) -> tuple[mx.array, int]:
    return (no_rows, 0) if rows is None else (getattr(rows, side), rows.num_rows)


class GpuBackend(MlxBackend):
    """Fused kernels, and MLX operations for what they do not cover."""

    name = "gpu"

    def __init__(
        self,
        dialect: Dialect | None = None,
        kernels: DecodeKernels | None = None,
        page_kernels: PageKernels | None = None,
        flash_kernels: FlashKernels | None = None,
    ) -> None:
        """Kernels replace the device's own. Raises UnsupportedFormatError where there is no GPU that they run on."""
        dialect = dialect or device_dialect()
        self.kernels = Kernels(
            dialect,
            kernels or device_kernels(dialect),
            page_kernels or device_page_kernels(dialect),
            flash_kernels or device_flash_kernels(dialect),
        )
        self.name = f"gpu-{dialect}"
        self._turns: dict[tuple[str, int], Turns] = {}  # by rotation and length of sink
        self._table_of: list[PageIds] = []
        self._table = mx.zeros((1, MIN_ELEMENTS), mx.int32)

    @property
    def details(self) -> str:
        """What runs where, for logs and statistics."""
        dialect = self.kernels.dialect
        return (
            f"decode attention (up to {MAX_QUERY_ROWS} query rows) and encoding: fused {dialect} kernels; "
            f"prefill over one layer's decoded history at a time: {PREFILL[dialect]}; array masks: MLX operations"
        )

    def new_store(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> LayerStore:
        """Raises UnsupportedFormatError for a geometry without a kernel: at load time, not at the first token."""
        decode_shape(shape.num_kv_heads, 1, shape.dtype, shape, fmt, _turning(means, fmt))
        return GpuStore(shape, fmt, means, self.kernels, self._turns_of(means, fmt))

    def _turns_of(self, means: Means | None, fmt: KVFormat) -> Turns | None:
        if means is None or means.rotary is None or not fmt.centred:
            return None
        key = means.rotary.fingerprint(), fmt.sink_tokens
        if key not in self._turns:
            self._turns[key] = Turns(means.rotary, fmt.sink_tokens)
        return self._turns[key]

    def prepare_step(self, views: Sequence[SequenceView]) -> GpuStepPlan:
        return GpuStepPlan(views, self._page_table([view.page_ids for view in views]))

    def _page_table(self, ids: list[PageIds]) -> mx.array:
        """(B, width) int32, rows padded; uploaded only when a sequence's pages have changed."""
        if len(ids) != len(self._table_of) or any(a is not b for a, b in zip(ids, self._table_of, strict=True)):
            width = max(MIN_ELEMENTS, *(len(row) for row in ids))
            table = np.zeros((len(ids), width), np.int32)
            for row, pages in zip(table, ids, strict=True):
                row[: len(pages)] = pages
            self._table_of, self._table = ids, mx.array(table)
        return self._table


def _constants(rotation: npt.NDArray[np.float32], transpose: bool, means: npt.NDArray[np.float32]) -> mx.array:
    """A rotation as the kernels read it and a layer's means (H, D), flat.

    Of a power of two dims the first row is enough, sign / sqrt(D): a Sylvester matrix begins with ones.
    """
    if is_power_of_two(len(rotation)):
        rotation = rotation[0]
    elif transpose:
        rotation = rotation.T
    return mx.array(np.concatenate([rotation.reshape(-1), means.reshape(-1)]).astype(np.float32))


def _page_constants(which: Which, fmt: KVFormat, means: npt.NDArray[np.float32]) -> mx.array:
    """What page kernels read, signs / sqrt(D) and means (H, D), flat: of a power of two dims `_constants`' own."""
    dim = means.shape[1]
    scaled = signs(dim, fmt.rotation_seed, which) / np.sqrt(dim)
    return mx.array(np.concatenate([scaled, means.reshape(-1)]).astype(np.float32))


def _turning(means: Means | None, fmt: KVFormat) -> tuple[int, bool, int]:
    """Pairs of key dims that turn, whether partners are neighbours, and how many halves stand for a factor."""
    if means is None or means.rotary is None or not fmt.centred:
        return 0, False, 1
    longest = float(np.linalg.norm(means.k, axis=1).max())
    return means.rotary.num_pairs, means.rotary.stride == 2, 1 if longest <= LONGEST_PLAIN_MEAN else 2


def decode_shape(
    num_q_heads: int,
    num_rows: int,
    dtype: mx.Dtype,
    layer: LayerShape,
    fmt: KVFormat,
    turning: tuple[int, bool, int] = (0, False, 1),
) -> DecodeShape:
    """What these queries' kernels are compiled for. Raises UnsupportedFormatError when there are none.

    turning: how many pairs of key dims turn, whether partners are neighbours, and DecodeShape.turn_parts.
    """
    (k_bits, k_trellis), (v_bits, v_trellis) = codec_kind(fmt.keys, "gpu"), codec_kind(fmt.values, "gpu")
    shape = DecodeShape(
        *(num_q_heads, layer.num_kv_heads, layer.k_dim, layer.v_dim, k_bits, v_bits),
        *(fmt.page_tokens, fmt.sink_tokens, num_rows, dtype, layer.dtype),
        k_trellis=k_trellis,
        v_trellis=v_trellis,
        pairs=turning[0],
        neighbours=turning[1],
        turn_parts=turning[2],
    )
    shape.check()
    return shape


def _figures(view: SequenceView) -> SequenceFigures:
    """With exact rows in arrays of the sequence's own."""
    sink, window = view.sink, view.window
    return SequenceFigures(
        q_start=view.q_start,
        num_queries=view.num_queries,
        num_pages=len(view.page_ids),
        sink_offset=0,
        num_sink=0 if sink is None else sink.num_rows,
        window_offset=0,
        window_start=0 if window is None else window.start,
        num_window=0 if window is None else window.num_rows,
    )


def _num_rows(rows: ExactRows | None) -> int:
    return 0 if rows is None else rows.num_rows


@cache
def device_kernels(dialect: Dialect) -> DecodeKernels:
    """The decode kernels of this machine's GPU: all layers and runtimes share them."""
    return DecodeKernels(dialect)


@cache
def device_page_kernels(dialect: Dialect) -> PageKernels:
    """The page kernels of this machine's GPU."""
    return PageKernels(dialect)


@cache
def device_flash_kernels(dialect: Dialect) -> FlashKernels:
    """The prefill kernels of this machine's GPU."""
    return FlashKernels(dialect)


def device_dialect() -> Dialect:
    """Of the kernels for this machine's GPU. Raises UnsupportedFormatError when it has none, or too old a one."""
    if mx.metal.is_available():
        return "metal"
    if not mx.cuda.is_available():
        raise UnsupportedFormatError("KV backend 'gpu' needs Metal or CUDA; MLX has neither here")
    if compute_capability() < MIN_CAPABILITY:
        wanted, found = (".".join(map(str, c)) for c in (MIN_CAPABILITY, compute_capability()))
        raise UnsupportedFormatError(f"KV backend 'gpu' needs compute capability {wanted}, this GPU has {found}")
    return "cuda"
