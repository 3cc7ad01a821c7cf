"""The native CPU backend: C++ kernels that attend straight on the packed codes (docs/cpu.md).

Owns the border to `turboquant_kv.native._kernels`: geometry and tables going in, views of rows per call. Exact rows
are NumPy arrays as in numpy_ops. Masks that are no sliding window take the walk of tiles.py over decoded tiles.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.base import (
    NO_SPAN,
    Array,
    AttentionCall,
    CanonicalPages,
    ExactRows,
    HostFloats,
    LayerShape,
    LayerStore,
    Means,
    PageIds,
    PageWrites,
    SequenceView,
    StepPlan,
    StepRows,
    narrower,
)
from turboquant_kv.backends.numpy_ops.backend import (
    KIT,
    NUMPY_DTYPES,
    NumpyBackend,
    NumpyRowStore,
    Rows,
    as_floats,
    as_rows,
    attend_by_tiles,
    from_floats,
)
from turboquant_kv.backends.portable.canonical import block_mean_scores
from turboquant_kv.backends.portable.row_arrays import RowPlan
from turboquant_kv.backends.portable.tiles import Tile
from turboquant_kv.blas import product_address, thread_limit
from turboquant_kv.codec.codebook import thresholds
from turboquant_kv.codec.codec import Codec
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.rotation import Which, hadamard_base, rotation_matrix, signs
from turboquant_kv.codec.scalar import scalar_codec
from turboquant_kv.codec.trellis import TrellisCodec

log = logging.getLogger(__name__)

_PARTS = (
    "Store",
    "LinearWeights",
    "DecoderBlock",
    "DecoderModel",
    "set_blas",
)  # of the compiled module; a checkout may be newer than what was compiled
ISA_SWITCH = "TURBOQUANT_ISA"
THREADS_SWITCH = "TURBOQUANT_THREADS"

Floats = npt.NDArray[np.float32]


@lru_cache(maxsize=1)
def load_kernels() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and why it is missing."""
    try:
        module = importlib.import_module("turboquant_kv.native._kernels")
    except ImportError as exc:
        return None, str(exc)
    if missing := [name for name in _PARTS if not hasattr(module, name)]:
        return None, f"they were built from older sources, without {', '.join(missing)}: install again"
    if not module.isa_levels():
        return None, "they were built for another CPU alone (TURBOQUANT_LEVELS=native): install again"
    module.set_num_threads(num_threads())
    module.set_blas(product_address())
    return module, ""


def num_threads() -> int:
    """TURBOQUANT_THREADS, else what OMP_NUM_THREADS, the container and the affinity allow (blas.thread_limit)."""
    text = os.environ.get(THREADS_SWITCH, "").strip()
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else thread_limit()


def isa_choice() -> str:
    """The level that TURBOQUANT_ISA names, or "": the fastest."""
    return os.environ.get(ISA_SWITCH, "").strip()


def is_available() -> bool:
    return load_kernels()[0] is not None


class NativeStore(NumpyRowStore):
    """Pages of one layer in the kernels' own layout, attended over by them; implements tiles.TileSource as well.

    Raises UnsupportedFormatError for a codec without C++ kernels.
    """

    def __init__(self, kernels: ModuleType, shape: LayerShape, fmt: KVFormat, means: Means | None, isa: str) -> None:
        self.shape, self.fmt, self._kernels = shape, fmt, kernels
        self.store: Any = kernels.Store(shape.num_kv_heads, fmt.page_tokens, fmt.sink_tokens, fmt.scale, isa)
        self._means = centred = means if fmt.centred else None
        self._v_mean: Floats | None = None if centred is None else centred.v
        self._set_side("k", shape.k_dim, fmt.keys, None if centred is None or centred.rotary else centred.k)
        self._set_side("v", shape.v_dim, fmt.values, self._v_mean)
        if centred is not None and centred.rotary is not None:
            rotary = centred.rotary
            self.store.set_rotary(rotary.averaged(centred.k).ravel(), rotary.frequencies, rotary.stride, rotary.gap)
        self._make_rows(shape)
        self._page_bytes = fmt.page_bytes(shape.num_kv_heads, shape.k_dim, shape.v_dim)
        assert self.store.page_bytes == self._page_bytes, "the native layout costs what the format says"

    def _set_side(self, which: Which, dim: int, codec: Codec, mean: Floats | None) -> None:
        if isinstance(codec, TrellisCodec):
            bits, edges = codec.bits, None
        else:
            bits = scalar_codec(codec, NativeBackend.name).bits
            edges = thresholds(bits)
        flat_mean = None if mean is None else np.ascontiguousarray(mean, np.float32).ravel()
        flips = signs(dim, self.fmt.rotation_seed, which).astype(np.float32)
        base = hadamard_base(dim).astype(np.float32).ravel()
        self.store.set_side(which == "k", dim, bits, flips, base, flat_mean, codec.table(), edges)

    @property
    def num_pages(self) -> int:
        return int(self.store.num_pages)

    @property
    def allocated_bytes(self) -> int:
        """Of the pages that were ever given out; the rest of the last slab is untouched."""
        return self.num_pages * self._page_bytes

    def grow(self, num_pages: int) -> None:
        self.store.grow(num_pages)

    def encode(self, pages: PageWrites, k: Rows, v: Rows) -> None:
        self.store.encode(*pages, dense_rows(k), dense_rows(v))

    def _from_mlx(self, x: mx.array) -> Rows:
        return rows_from_mlx(self._kernels, x)

    def decode(self, page_ids: PageIds, first_page: int) -> tuple[Rows, Rows]:
        k, _ = self._decode("k", page_ids, first_page)
        v, _ = self._decode("v", page_ids, first_page)
        return from_floats(k, self.shape.dtype), from_floats(v, self.shape.dtype)

    def _decode(self, which: Which, page_ids: PageIds, first_page: int | None = None) -> tuple[Floats, Floats]:
        """Rows (H, P*page, D) and scales (H, P*page): the model's basis where a first page is told, else unscaled."""
        dim = self.shape.k_dim if which == "k" else self.shape.v_dim
        rows = np.empty((self.shape.num_kv_heads, len(page_ids) * self.fmt.page_tokens, dim), np.float32)
        scales = np.empty(rows.shape[:2], np.float32)
        self.store.decode(which == "k", first_page is not None, page_ids, first_page or 0, rows, scales)
        return rows, scales

    def read(self, page_ids: PageIds) -> CanonicalPages:
        lead = (len(page_ids), self.shape.num_kv_heads, self.fmt.page_tokens)
        pages = CanonicalPages(
            np.empty((*lead, self.fmt.keys.code_bytes(self.shape.k_dim)), np.uint8),
            np.empty(lead, np.float16),
            np.empty((*lead, self.fmt.values.code_bytes(self.shape.v_dim)), np.uint8),
            np.empty(lead, np.float16),
        )
        if len(page_ids):
            self.store.transfer(True, False, page_ids, pages.k_codes, pages.k_scales)
            self.store.transfer(False, False, page_ids, pages.v_codes, pages.v_scales)
        return pages

    def write(self, page_ids: PageIds, pages: CanonicalPages) -> None:
        pages.check(self.shape, self.fmt)
        dense = np.ascontiguousarray
        self.store.transfer(True, True, page_ids, dense(pages.k_codes), dense(pages.k_scales))
        self.store.transfer(False, True, page_ids, dense(pages.v_codes), dense(pages.v_scales))

    def tile(self, page_ids: PageIds) -> Tile:
        return Tile(*self._decode("k", page_ids), *self._decode("v", page_ids))

    def exact_tile(self, rows: ExactRows) -> Tile:
        return Tile(as_floats(rows.k), None, as_floats(rows.v), None)

    def rotate_queries(self, q: Floats) -> Floats:
        rotated: Floats = q @ rotation_matrix(self.shape.k_dim, self.fmt.rotation_seed, "k").T
        return rotated

    def mean_scores(self, q: Floats, first_page: int, num_pages: int) -> Floats | None:
        if self._means is None:
            return None
        scores: Floats = block_mean_scores(KIT, self._means, self.fmt, q, first_page, num_pages)
        return scores

    def restore_output(self, rotated: Floats, mass: Floats) -> Floats:
        out: Floats = rotated @ rotation_matrix(self.shape.v_dim, self.fmt.rotation_seed, "v")
        return out if self._v_mean is None else out + mass * self._v_mean[:, None]

    def attend(self, call: AttentionCall) -> mx.array:
        window, plan = self.window, call.plan
        assert isinstance(plan, NativeStepPlan)
        if call.mask is not None:
            found = sliding_window(call.mask, call.views)
            if found is None:
                return attend_by_tiles(self, self.shape, call)
            window = narrower(window, found)
        batch, num_q_heads, num_rows, _ = call.queries.shape
        dtype = call.queries.dtype
        make = np.empty if plan.fewest_queries == num_rows else np.zeros
        out = make((batch, num_q_heads, num_rows, self.shape.v_dim), NUMPY_DTYPES[dtype])
        sinks = None if call.sinks is None else np.ascontiguousarray(as_floats(as_rows(call.sinks)))
        queries = rows_from_mlx(self._kernels, call.queries)
        self.store.attend(queries, out, plan.figures, plan.page_ids, call.exact, call.scale, sinks, window, call.cap)
        return mx.array(self._kernels.as_bfloat16(out) if dtype == mx.bfloat16 else out)

    def exact_arrays(self) -> tuple[Rows, Rows]:
        """The layer's exact rows, keys (H, rows, D) and values (H, rows, Dv)."""
        return self._rows.k, self._rows.v

    @property
    def takes_floats(self) -> bool:
        return bool(self.shape.dtype == mx.float32)

    def append_and_attend_floats(
        self, plan: StepPlan, keys: HostFloats, values: HostFloats, queries: HostFloats, *, scale: float
    ) -> HostFloats:
        assert isinstance(plan, NativeStepPlan)
        exact = self._rows.append(plan, keys, values, self.encode)
        make = np.empty if plan.fewest_queries == queries.shape[2] else np.zeros
        out: HostFloats = make((*queries.shape[:3], self.shape.v_dim), np.float32)
        self.store.attend(queries, out, plan.figures, plan.page_ids, exact, scale, None, self.window, 0.0)
        return out


class NativeStepPlan(RowPlan):
    """What the kernels are told of a step's sequences: figures (B, 9) int64 (native_store.h) and all their pages."""

    def __init__(self, rows: StepRows) -> None:
        super().__init__(rows, lambda places: places)
        at, figures = 0, []
        for view in rows.views:
            sink, window = view.sink or NO_SPAN, view.window or NO_SPAN
            ids = at, len(view.page_ids)
            figures.append((view.q_start, view.num_queries, *ids, sink.first, sink.num_rows, *window))
            at += len(view.page_ids)
        self.figures = np.array(figures, np.int64)
        self.page_ids = np.concatenate([view.page_ids for view in rows.views]).astype(np.int64, copy=False)
        self.fewest_queries = min(view.num_queries for view in rows.views)


class NativeBackend(NumpyBackend):
    """C++ kernels for storage and attention; exact rows and foreign masks as in the NumPy backend.

    Raises UnsupportedFormatError when the kernels are not built or TURBOQUANT_ISA names what this CPU lacks.
    """

    name = "cpu-native"

    def __init__(self) -> None:
        super().__init__()
        kernels, reason = load_kernels()
        if kernels is None:
            raise UnsupportedFormatError(f"KV backend cpu-native: the kernels are not built ({reason})")
        self._kernels = kernels
        levels: list[str] = kernels.isa_levels()
        self.isa = isa_choice() or levels[0]
        if self.isa not in levels:
            hint = "; a build with LEVELS=all has the others" if len(levels) == 1 else ""
            raise UnsupportedFormatError(f"{ISA_SWITCH}={self.isa}: this CPU and build have {', '.join(levels)}{hint}")
        self.name = f"cpu-native/{self.isa}"

    def new_store(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> LayerStore:
        return NativeStore(self._kernels, shape, fmt, means, self.isa)

    def prepare_step(self, rows: StepRows) -> NativeStepPlan:
        return NativeStepPlan(rows)

    def from_mlx(self, x: mx.array) -> Rows:
        return rows_from_mlx(self._kernels, x)


def rows_from_mlx(kernels: ModuleType, x: mx.array) -> Rows:
    """A view of x with a dense last axis, bfloat16 as its bits in uint16."""
    # NumPy's way for bfloat16 is a view that MLX has to compute: tens of microseconds a layer.
    return dense_rows(kernels.bfloat16_bits(x) if x.dtype == mx.bfloat16 else as_rows(x))


def dense_rows(rows: Array) -> Rows:
    """The same rows, copied only if their last axis has gaps."""
    dense: Rows = rows if rows.strides[-1] == rows.itemsize else np.ascontiguousarray(rows)
    return dense


def sliding_window(mask: mx.array, views: Sequence[SequenceView]) -> int | None:
    """The window w (0: all) if a bool mask says no more than `p - w < j <= p`, the same w in every row; else None.

    Looking costs one pass over the mask, which is far less than attention through decoded tiles.
    """
    if mask.dtype != mx.bool_ or int(np.prod(mask.shape[:-3] if mask.ndim == 4 else (1,))) not in (1, len(views)):
        return None
    values = np.asarray(mask)
    values = values.reshape((1,) * (4 - values.ndim) + values.shape)
    if values.shape[1] != 1:
        return None
    keys = np.arange(values.shape[-1])
    window, longest = 0, 0  # of rows that leave keys out; of rows that see everything before them
    for b, view in enumerate(views):
        if view.num_queries == 0:
            continue
        rows = values[b if values.shape[0] > 1 else 0, 0, : view.num_queries]
        positions = view.q_start + np.arange(view.num_queries)
        if len(rows) != view.num_queries or values.shape[-1] <= positions[-1]:
            return None
        widest = int(rows.sum(axis=-1).max())
        expected = (keys <= positions[:, None]) & (keys > positions[:, None] - widest)
        if not np.array_equal(rows, expected):
            return None
        if widest > positions[-1]:
            longest = max(longest, widest)
        elif window not in (0, widest):
            return None
        else:
            window = widest
    return None if 0 < window < longest else window
