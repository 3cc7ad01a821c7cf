"""One layer's pages and exact rows on a GPU, with what its kernels read beside them, and the order of their launches.

Pages stay in the canonical layout (docs/gpu.md says why that costs nothing), in MLX arrays. Array masks are the MLX
operations of mlx_ops over the same pages. Which backend makes these stores is backend.py's business.

Pages and exact rows are written in place. MLX's own updates are in place only while no launch that reads the array is
under way, and copy the whole array otherwise, which with steps that overlap is always. MLX does not know of such
writes, so every launch on a layer's arrays gets the fence of the one before and leaves its own (`GpuStore._fence`).
Arrays grow in that order too: a launch copies the old one's content into a larger one, which all later launches get.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.base import (
    AttentionCall,
    AttentionInput,
    ExactBuffers,
    ExactRows,
    LayerShape,
    LayerStore,
    Means,
    PageIds,
    PageWrites,
    StepInputs,
    StepPlan,
)
from turboquant_kv.backends.gpu.flash import FlashKernels, FlashShape
from turboquant_kv.backends.gpu.launch import FENCE, DecodeKernels, DecodeLaunch, LayerInputs
from turboquant_kv.backends.gpu.masked_prefill import masked_attention
from turboquant_kv.backends.gpu.page_kernels import PageKernels, Places, SideShape
from turboquant_kv.backends.gpu.plan import NO_WINDOW, Plan
from turboquant_kv.backends.gpu.prefill_plan import PrefillGroup
from turboquant_kv.backends.gpu.shape import MAX_QUERY_ROWS, DecodeShape, codec_kind, is_power_of_two
from turboquant_kv.backends.gpu.source import Dialect
from turboquant_kv.backends.gpu.step_plan import GpuStepPlan
from turboquant_kv.backends.gpu.turns import Turns
from turboquant_kv.backends.mlx_ops.backend import KIT, GrowingArrays, attend_by_tiles
from turboquant_kv.backends.portable.canonical import CanonicalStorage
from turboquant_kv.codec.codec import Codec
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.rotary import BLOCK_TOKENS
from turboquant_kv.codec.rotation import Which, rotation_matrix, signs

# Norm of a head's key mean up to which its share of a score may be a product of halves: queries of norm 20 then get
# errors of about 0.02 at 128 dims, a tenth of what 4-bit codes do. Qwen2.5 has layers with 130 to 900.
LONGEST_PLAIN_MEAN = 48.0
ROWS_A_LAUNCH = 1 << 15  # a grid's second axis has fewer than 65,536 blocks


class OpenArrays(GrowingArrays):
    """Page arrays that kernels may read, and write in place; whoever else reads them waits first."""

    def __init__(self, store: GpuStore, heads: int, dim: int, codec: Codec, page_tokens: int) -> None:
        super().__init__(heads, dim, codec, page_tokens)
        self._store = store

    @property
    def codes(self) -> mx.array:
        return self._codes

    @property
    def scales(self) -> mx.array:
        return self._scales

    def grow(self, num_pages: int) -> None:
        target = self.grown_to(num_pages)
        self._codes, self._scales = (self._grown(old, target) for old in (self._codes, self._scales))

    def _grown(self, old: mx.array, num_pages: int) -> mx.array:
        """An array of so many pages that begins with the old one's, without waiting for anything."""
        held = old.shape[0]
        new = mx.zeros((num_pages, *old.shape[1:]), old.dtype)
        if held:
            source, target = (pages.reshape(1, len(pages), -1).view(mx.uint32) for pages in (old, new))
            self._store.copy(source, target, held)
        return new

    def put(self, page_ids: PageIds, packed: mx.array, scales: mx.array) -> None:
        places = Places.of([np.arange(len(page_ids)), page_ids])
        for source, target in ((packed, self._codes), (scales, self._scales)):
            num_pages, held = len(page_ids), target.shape[0]
            if num_pages:
                self._store.put(source.reshape(1, 1, num_pages, -1), target.reshape(1, held, -1), places)

    def get(self, page_ids: PageIds) -> tuple[mx.array, mx.array]:
        self._store.settle()
        pages = super().get(page_ids)
        mx.eval(*pages)  # before a later launch writes what they are read from
        return pages


class Kernels(NamedTuple):
    """The kernels of one kind of GPU; all layers and runtimes share them."""

    dialect: Dialect
    decode: DecodeKernels
    pages: PageKernels
    flash: FlashKernels


class GpuStore(CanonicalStorage, LayerStore):
    """Pages of one layer with everything else that its kernels read, and which of them a call takes."""

    def __init__(
        self, shape: LayerShape, fmt: KVFormat, means: Means | None, kernels: Kernels, turns: Turns | None
    ) -> None:
        """turns: of the means' rotation."""
        self._arrays: list[OpenArrays] = []
        self._fence = FENCE  # of the latest launch on this layer's arrays

        def new_arrays(heads: int, dim: int, codec: Codec) -> OpenArrays:
            self._arrays.append(OpenArrays(self, heads, dim, codec, fmt.page_tokens))
            return self._arrays[-1]

        super().__init__(KIT, shape, fmt, means, new_arrays)
        self._kernels = kernels
        heads, page = shape.num_kv_heads, fmt.page_tokens
        (k_bits, k_trellis), (v_bits, v_trellis) = codec_kind(fmt.keys, "gpu"), codec_kind(fmt.values, "gpu")
        self._sides = (
            SideShape(heads, shape.k_dim, k_bits, page, fmt.scale, shape.dtype, k_trellis, *turning_of(means, fmt)[:2]),
            SideShape(heads, shape.v_dim, v_bits, page, fmt.scale, shape.dtype, v_trellis),
        )
        centred = means if fmt.centred else None
        k_mean = np.zeros((heads, shape.k_dim), np.float32) if centred is None else centred.k
        if centred is not None and centred.rotary is not None:
            k_mean = centred.rotary.averaged(k_mean).astype(np.float32)
        self._turns, self._turning = turns, turning_of(means, fmt)
        self._is_balanced = means is not None and means.key_factors is not None
        v_mean = np.zeros((heads, shape.v_dim), np.float32) if centred is None else centred.v
        k_rotation = rotation_matrix(shape.k_dim, fmt.rotation_seed, "k")
        v_rotation = rotation_matrix(shape.v_dim, fmt.rotation_seed, "v")
        balance = _balance(means, shape.dtype)
        self._constants = _constants(k_rotation, True, k_mean, balance), _constants(v_rotation, False, v_mean)
        self._page_constants = (
            self._constants[0] if is_power_of_two(shape.k_dim) else _page_constants("k", fmt, k_mean),
            self._constants[1] if is_power_of_two(shape.v_dim) else _page_constants("v", fmt, v_mean),
        )
        self._k_rows, self._v_rows = (mx.zeros((heads, 0, d), shape.dtype) for d in (shape.k_dim, shape.v_dim))
        self._launches: dict[tuple[int, int, mx.Dtype, bool], DecodeLaunch] = {}

    # --- order: every launch on this layer's arrays behind the one before

    def put(self, source: mx.array, target: mx.array, places: Places) -> None:
        """As PageKernels.put, on an array of this layer."""
        self._fence = self._kernels.pages.put(source, target, places, self._fence)

    def copy(self, source: mx.array, target: mx.array, num_rows: int) -> None:
        """The first rows of source (H, rows, D) to the same places of target (H, more rows, D), by a launch."""
        for first in range(0, num_rows, ROWS_A_LAUNCH):
            self.put(source[None], target, _same_places(first, min(num_rows, first + ROWS_A_LAUNCH)))

    def settle(self) -> None:
        """Wait for all launches so far: the arrays are about to be replaced, or read by others than our kernels."""
        mx.eval(self._fence)

    def pending_arrays(self) -> list[mx.array]:
        return [self._fence]

    # --- pages

    def encode(self, pages: PageWrites, k: mx.array, v: mx.array) -> None:
        self._encode(Places.of(pages), int(pages.numbers.max(initial=-1)) + 1, k, v)

    def _encode(self, pages: Places, num_pages: int, k: mx.array, v: mx.array) -> None:
        """num_pages: of a conversation that has the last of these pages."""
        if not pages.length:
            return
        turns = self._float_turns(num_pages)
        for side, arrays, constants, rows, turned in zip(
            self._sides, self._arrays, self._page_constants, (k, v), (turns, None), strict=True
        ):
            self._fence = self._kernels.pages.encode(
                side,
                rows.astype(side.dtype),
                pages,
                (arrays.codes, arrays.scales),
                constants,
                self._fence,
                turned,
            )

    def _float_turns(self, num_pages: int) -> mx.array | None:
        """Angles of a conversation's first pages."""
        return None if self._turns is None else self._turns.floats(num_pages * self.fmt.page_tokens // BLOCK_TOKENS)

    # --- exact rows

    @property
    def num_rows(self) -> int:
        return int(self._k_rows.shape[1])

    def grow_rows(self, num_rows: int) -> None:
        if num_rows > self.num_rows:
            self._k_rows, self._v_rows = (self._grown_rows(old, num_rows) for old in (self._k_rows, self._v_rows))

    def _grown_rows(self, old: mx.array, num_rows: int) -> mx.array:
        new = mx.zeros((old.shape[0], num_rows, old.shape[2]), old.dtype)
        self.copy(old, new, old.shape[1])
        return new

    def put_rows(self, first: int, rows: ExactRows) -> None:
        places = Places.of([np.arange(rows.num_rows), first + np.arange(rows.num_rows)])
        self.put(rows.k[None], self._k_rows, places)
        self.put(rows.v[None], self._v_rows, places)

    def get_rows(self, first: int, num_rows: int) -> ExactRows:
        self.settle()
        index = first + mx.arange(num_rows)
        rows = ExactRows(self._k_rows[:, index], self._v_rows[:, index])
        mx.eval(*rows)
        return rows

    def move_rows(self, order: PageIds) -> None:
        self.settle()
        index = mx.array(order)
        self._k_rows, self._v_rows = self._k_rows[:, index], self._v_rows[:, index]
        mx.eval(self._k_rows, self._v_rows)

    def exact(self) -> ExactBuffers:
        if not self.num_rows:
            self.grow_rows(1)  # kernels take no empty arrays
        return ExactBuffers(self._k_rows, self._v_rows, self._k_rows, self._v_rows)

    def append(self, plan: StepPlan, keys: mx.array, values: mx.array) -> ExactBuffers:
        assert isinstance(plan, GpuStepPlan)
        plan.hand_over(keys, values)
        self._move(plan)
        exact = self.exact()
        if plan.rows.window is not None:
            window = self._window(plan, self._k_rows, keys), self._window(plan, self._v_rows, values)
            exact = ExactBuffers(self._k_rows, self._v_rows, *window)
            if plan.rows.pages is not None:
                self._encode(plan.pages, plan.num_pages, *window)
        if plan.rows.writes.shape[1]:
            self.put(keys, self._k_rows, plan.writes)
            self.put(values, self._v_rows, plan.writes)
        plan.stored(self._fence)
        return exact

    def _move(self, plan: GpuStepPlan) -> None:
        """What comes before a step's new rows: rows that change their place, full tails that become pages."""
        if plan.rows.copies is not None:
            self.put(self._k_rows[None], self._k_rows, plan.copies)
            self.put(self._v_rows[None], self._v_rows, plan.copies)
        if plan.rows.closed is not None:
            self._encode(plan.closed, plan.num_pages, self._k_rows, self._v_rows)

    def _window(self, plan: GpuStepPlan, held: mx.array, new: mx.array) -> mx.array:
        """A step's own window of one side, (H, rows, D)."""
        runs = plan.rows.window
        assert runs is not None
        if len(new) == 1 and len(runs) == 1 and runs[0].is_new:  # one sequence's new rows as they are
            return new.squeeze(0)[:, runs[0].first : runs[0].first + runs[0].num_rows]
        held_places, new_places, num_rows = plan.window_places
        window = mx.zeros((held.shape[0], num_rows, held.shape[2]), held.dtype)
        for source, places in ((held[None], held_places), (new, new_places)):
            if places is not None:
                self.put(source, window, places)
        return window

    # --- attention

    def histories(self, group: PrefillGroup, exact: ExactBuffers, page_table: mx.array) -> tuple[mx.array, mx.array]:
        """Keys (rows, D) and values (rows, Dv) of the group's sequences, as PageKernels.history has them.

        page_table (B, width) int32 of the whole step.
        """
        turns = self._float_turns(group.most_pages)
        decoded = []
        for side, arrays, constants, sink, window, turned in zip(
            self._sides, self._arrays, self._page_constants, exact[:2], exact[2:], (turns, None), strict=True
        ):
            rows, self._fence = self._kernels.pages.history(
                side,
                (arrays.codes, arrays.scales) if arrays.num_pages else (_NO_CODES, _NO_SCALES),
                page_table,
                group,
                sink,
                window,
                constants,
                self._fence,
                turned,
            )
            decoded.append(rows)
        return decoded[0], decoded[1]

    def balances(self, plan: StepPlan, queries: mx.array, mask: mx.array | None) -> bool:
        """Where the attention kernel writes the new rows."""
        return self._is_balanced and self._appends(plan, queries, mask)

    def _appends(self, plan: StepPlan, queries: mx.array, mask: mx.array | None) -> bool:
        """Whether a step's attention writes the new rows itself."""
        return mask is None and plan.rows.is_decode and self.launch_for(queries).can_append

    def append_and_attend(
        self,
        plan: StepPlan,
        keys: mx.array,
        values: mx.array,
        queries: mx.array,
        *,
        scale: float,
        mask: mx.array | None,
        sinks: mx.array | None,
        cap: float = 0.0,
    ) -> mx.array:
        """A decode step's attention writes the new rows itself."""
        if not self._appends(plan, queries, mask):
            return super().append_and_attend(plan, keys, values, queries, scale=scale, mask=mask, sinks=sinks, cap=cap)
        assert isinstance(plan, GpuStepPlan)
        if plan.rows.copies is not None or plan.rows.closed is not None:
            self._move(plan)
        call = AttentionCall(queries, plan, self.exact(), scale, None, sinks, cap)
        return self._decode_attention(call, (keys, values), self.balances(plan, queries, mask))

    def attend_over(self, inputs: StepInputs, layer: int, step: AttentionInput) -> tuple[mx.array, mx.array]:
        key = inputs.key
        assert isinstance(key, StepKey)
        launch = self.launch_for(step.queries, step.cap > 0)
        if (launch, step.scale, step.cap) != (key.launch, key.scale, key.cap):
            raise UnsupportedFormatError("layers of this model attend in different ways")
        figures, page_table = inputs.shared
        *pages, k_rows, v_rows, fence = inputs.layers[layer][:7]
        arrays = LayerInputs(
            *(tuple(pages), (k_rows, v_rows, k_rows, v_rows), *self._constants, fence),  # type: ignore[arg-type]
            turns=tuple(inputs.layers[layer][7:]),
        )
        return launch.run(
            *(arrays, step.queries, key.plan_over(figures), page_table),
            new_rows=(step.keys, step.values),
            sinks=step.sinks,
            balanced=self._is_balanced,
        )

    def wrote(self, launched: mx.array) -> None:
        self._fence = launched

    def step_arrays(self, plan: GpuStepPlan, launch: DecodeLaunch) -> list[mx.array]:
        """This layer's of a StepInputs, after what comes before a step's new rows."""
        self._move(plan)
        layer = self.layer_inputs(self.exact(), plan, launch)
        return [*layer.pages, *layer.exact[:2], layer.fence, *layer.turns]

    def attend(self, call: AttentionCall) -> mx.array:
        if call.mask is None and call.queries.shape[2] <= MAX_QUERY_ROWS:
            return self._decode_attention(call)
        if call.mask is None and call.queries.dtype == self.shape.dtype and not self.window:
            return self._prefill_attention(call)
        self.settle()
        out = attend_by_tiles(self, self.shape, call)
        mx.eval(out)  # before a later launch writes what it reads
        return out

    def _decode_attention(
        self, call: AttentionCall, new_rows: tuple[mx.array, mx.array] | None = None, balanced: bool = False
    ) -> mx.array:
        """All sequences in one launch, codes read where they lie. new_rows, balanced: as DecodeLaunch.run has them."""
        launch, plan = self.launch_for(call.queries, call.cap > 0), call.plan
        assert isinstance(plan, GpuStepPlan)
        layer = self.layer_inputs(call.exact, plan, launch)
        launch_plan = plan.plan_for(launch, call.scale, self.window or NO_WINDOW, call.cap)
        out, self._fence = launch.run(
            *(layer, call.queries, launch_plan, plan.page_table),
            new_rows=new_rows,
            sinks=call.sinks,
            balanced=balanced,
        )
        return out

    def layer_inputs(self, exact: ExactBuffers, plan: GpuStepPlan, launch: DecodeLaunch) -> LayerInputs:
        """What the decode kernels read of this layer."""
        k, v = self._arrays
        if not k.num_pages:
            self.grow(1)  # kernels take no empty arrays
        pages = k.codes, k.scales, v.codes, v.scales
        return LayerInputs(pages, exact, *self._constants, self._fence, self._decode_turns(plan, launch))

    def _decode_turns(self, plan: GpuStepPlan, launch: DecodeLaunch) -> tuple[mx.array, ...]:
        """Angles of all blocks that the page table may name."""
        if self._turns is None:
            return ()
        num_blocks = plan.page_table.shape[1] * self.fmt.page_tokens // BLOCK_TOKENS
        if launch.reads_half_turns:
            return (self._turns.halves(num_blocks, self._turning[2]),)
        return (self._turns.floats(num_blocks),)

    def _prefill_attention(self, call: AttentionCall) -> mx.array:
        """Histories in the model's dtype, for the time of one layer's attention, of all sequences that fit at once."""
        shape, queries, plan = self.shape, call.queries, call.plan
        assert isinstance(plan, GpuStepPlan)
        flash = FlashShape(
            *(queries.shape[1], shape.num_kv_heads, shape.k_dim, shape.v_dim),
            *(self.fmt.page_tokens, self.fmt.sink_tokens, shape.dtype, call.cap > 0),
        )
        groups = plan.groups_for(self.fmt.page_tokens, shape.num_kv_heads, self._kernels.flash.tile(flash))
        if len(groups) == 1:
            return self._attend_group(flash, groups[0], queries, call, plan.page_table)
        parts = [self._attend_group(flash, one, queries[one.first : one.last], call, plan.page_table) for one in groups]
        return mx.concatenate(parts)

    def _attend_group(
        self, flash: FlashShape, group: PrefillGroup, queries: mx.array, call: AttentionCall, page_table: mx.array
    ) -> mx.array:
        """queries: the group's."""
        if not group.num_places:  # none of these prompts has tokens left
            return mx.zeros((*queries.shape[:3], flash.v_dim), queries.dtype)
        history = self.histories(group, call.exact, page_table)
        options: Any = {"scale": call.scale, "sinks": call.sinks, "cap": call.cap}
        if self._kernels.flash.has_kernel(flash):
            return self._kernels.flash.attend(flash, queries, history, group, **options)
        return masked_attention(queries, history, group, self.fmt, **options)

    def launch_for(self, queries: mx.array, capped: bool = False) -> DecodeLaunch:
        """The launch for queries (B, Hq, T, D), capped or not. Raises UnsupportedFormatError when there is none."""
        key = queries.shape[1], queries.shape[2], queries.dtype, capped
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._kernels.decode.launch_for(
                decode_shape(*key[:3], self.shape, self.fmt, self._turning, capped)
            )
        return launch


@lru_cache(maxsize=4)
def _same_places(first: int, last: int) -> Places:
    """Rows that stay at their numbers; all layers ask for the same ones."""
    rows = np.arange(first, last)
    return Places.of([rows, rows])


_NO_CODES, _NO_SCALES = mx.array(np.zeros(8, np.uint8)), mx.array(np.zeros(8, np.float16))


class StepKey(NamedTuple):
    """What a decode step's graph has in it beside arrays: the launch of all layers, and its Plan without the array."""

    launch: DecodeLaunch
    scale: float
    cap: float
    plan: tuple[Any, ...]
    table_width: int

    def plan_over(self, figures: mx.array) -> Plan:
        """The plan with its array."""
        return Plan(figures, *self.plan)


def _constants(
    rotation: npt.NDArray[np.float32],
    transpose: bool,
    means: npt.NDArray[np.float32],
    balance: Sequence[npt.NDArray[np.float32]] = (),
) -> mx.array:
    """A rotation as the kernels read it, a layer's means (H, D), and what keys and queries are multiplied by, flat.

    Of a power of two dims the first row is enough, sign / sqrt(D): a Sylvester matrix begins with ones.
    """
    if is_power_of_two(len(rotation)):
        rotation = rotation[0]
    elif transpose:
        rotation = rotation.T
    return mx.array(np.concatenate([x.reshape(-1) for x in (rotation, means, *balance)]).astype(np.float32))


def _balance(means: Means | None, dtype: mx.Dtype) -> tuple[npt.NDArray[np.float32], ...]:
    """What keys (H, D) and queries (H, D) of a balanced layer are multiplied by, rounded to the keys' type."""
    if means is None or means.key_factors is None:
        return ()
    both = means.key_factors, 1 / means.key_factors
    return tuple(np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32)) for x in both)


def _page_constants(which: Which, fmt: KVFormat, means: npt.NDArray[np.float32]) -> mx.array:
    """What page kernels read, signs / sqrt(D) and means (H, D), flat: of a power of two dims `_constants`' own."""
    dim = means.shape[1]
    scaled = signs(dim, fmt.rotation_seed, which) / np.sqrt(dim)
    return mx.array(np.concatenate([scaled, means.reshape(-1)]).astype(np.float32))


def turning_of(means: Means | None, fmt: KVFormat) -> tuple[int, bool, int]:
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
    capped: bool = False,
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
        capped=capped,
    )
    shape.check()
    return shape
