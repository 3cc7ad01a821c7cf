"""What every backend offers the cache: stores of pages, exact rows, and attention over both.

A backend decides how pages are laid out in memory and who computes on them. The cache above it
only knows page ids, token counts and bytes. `Array` is the backend's own array type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.rotary import BLOCK_TOKENS, Rotary

Array = Any
PageIds = npt.NDArray[np.int64]
HostFloats = npt.NDArray[np.float32]


def narrower(window: int, other: int | None) -> int:
    """Of two sliding windows, of which 0 or None hides nothing."""
    return min(window, other) if window and other else window or other or 0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Geometry of one attention layer's cache."""

    num_kv_heads: int
    k_dim: int
    v_dim: int
    dtype: mx.Dtype  # the model's own dtype, kept by the exact windows

    def fits(self, keys: mx.array, values: mx.array) -> bool:
        """Whether keys (B, H, T, D) and values (B, H, T, Dv) are of this layer."""
        _, num_heads, _, dim = keys.shape
        return (num_heads, dim, values.shape[3]) == (self.num_kv_heads, self.k_dim, self.v_dim) and (
            keys.dtype == self.dtype
        )

    @property
    def raw_token_bytes(self) -> int:
        """Bytes of one uncompressed token, keys and values, all heads."""
        return self.num_kv_heads * (self.k_dim + self.v_dim) * self.dtype.size


@dataclass(frozen=True, slots=True)
class Means:
    """Calibrated means of one layer: k (H, D) and v (H, Dv), float32, in the model's own basis.

    rotary: how keys turn with position; k is then the mean before that turn. None: k is the mean of keys as they are.
    key_factors: (H, D), what keys are multiplied by before a store sees them, and queries divided by
    (cache/key_balance.py); k is of keys so multiplied, so backends need not know, unless their stores do it themselves
    (`LayerStore.balances`). None: as the model gives them.
    """

    k: npt.NDArray[np.float32]
    v: npt.NDArray[np.float32]
    rotary: Rotary | None = None
    key_factors: npt.NDArray[np.float32] | None = None

    def k_blocks(self, first_position: int, num_blocks: int) -> npt.NDArray[np.float32]:
        """(H, num_blocks, D): what is subtracted from keys in blocks of BLOCK_TOKENS from first_position on."""
        if self.rotary is None:
            return np.repeat(self.k[:, None], num_blocks, axis=1)
        return self.rotary.block_means(self.k, first_position, num_blocks)

    def k_rows(self, fmt: KVFormat, numbers: PageIds) -> npt.NDArray[np.float32]:
        """(H, P * page, D): the same for each token of pages that have these numbers (P,) in their conversations."""
        first = fmt.sink_tokens + fmt.page_tokens * numbers
        starts = (first[:, None] + np.arange(0, fmt.page_tokens, BLOCK_TOKENS)).ravel()
        if self.rotary is None:
            return np.repeat(self.k[:, None], len(starts) * BLOCK_TOKENS, axis=1)
        blocks = self.rotary.block_means_at(self.k, starts)
        return np.repeat(blocks, BLOCK_TOKENS, axis=1)


@dataclass(frozen=True, slots=True)
class CanonicalPages:
    """Pages in the reference layout (docs/codec.md), the one that is saved and compared.

    k_codes (P, H, page, code_bytes of the keys' codec) uint8, k_scales (P, H, page) float16; the same for v.
    """

    k_codes: npt.NDArray[np.uint8]
    k_scales: npt.NDArray[np.float16]
    v_codes: npt.NDArray[np.uint8]
    v_scales: npt.NDArray[np.float16]

    @property
    def num_pages(self) -> int:
        return len(self.k_codes)

    def check(self, shape: LayerShape, fmt: KVFormat) -> None:
        """Raises ValueError when an array does not have the format's shape or type."""
        lead = (self.num_pages, shape.num_kv_heads, fmt.page_tokens)
        expected = {
            "k_codes": ((*lead, fmt.keys.code_bytes(shape.k_dim)), np.uint8),
            "v_codes": ((*lead, fmt.values.code_bytes(shape.v_dim)), np.uint8),
            "k_scales": (lead, np.float16),
            "v_scales": (lead, np.float16),
        }
        for name, (dims, dtype) in expected.items():
            array = getattr(self, name)
            if array.shape != dims or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype}{array.shape}; this format needs {np.dtype(dtype)}{dims}")


class ExactRows(NamedTuple):
    """Consecutive exact tokens: k (H, n, D), v (H, n, Dv)."""

    k: Array
    v: Array

    @property
    def num_rows(self) -> int:
        return int(self.k.shape[1])


class ExactBuffers(NamedTuple):
    """One layer's exact rows in one step: keys (H, rows, D) and values (H, rows, Dv) of all conversations.

    Sinks lie in the layer's own rows. Windows do as well, unless the step's new tokens fill pages: then they are
    behind each other in arrays made for the step.
    """

    sink_k: Array
    sink_v: Array
    window_k: Array
    window_v: Array


class RowSpan(NamedTuple):
    """Consecutive exact tokens: rows [first, first + num_rows) of a buffer; `start` is the first one's position."""

    start: int
    first: int
    num_rows: int


NO_SPAN = RowSpan(0, 0, 0)


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence as attention sees it in every layer: `num_queries` query rows that begin at `q_start`.

    sink covers [0, min(length, sink)); window covers every exact token from the first query's page
    on; page_ids hold pages 0 .. len-1, which may reach into the window: a query in page i sees
    pages < i through their codes, and page i itself exactly.
    """

    q_start: int
    num_queries: int
    page_ids: PageIds
    sink: RowSpan | None
    window: RowSpan | None


class PageWrites(NamedTuple):
    """Pages to encode: ids (P,), which page of its conversation each is (P,), and the row where each begins (P,)."""

    page_ids: PageIds
    numbers: PageIds
    starts: PageIds

    @classmethod
    def following(cls, page_ids: PageIds, first_page: int, page_tokens: int) -> PageWrites:
        """Pages first_page, first_page + 1, ... of one conversation, whose rows follow each other."""
        places = np.arange(len(page_ids), dtype=np.int64)
        return cls(page_ids, first_page + places, places * page_tokens)

    def rows(self, page_tokens: int) -> PageIds:
        """(P * page,): the source's row of each token."""
        return (self.starts[:, None] + np.arange(page_tokens)).ravel()


class Run(NamedTuple):
    """Rows [first, first + num_rows) of the layer's exact rows, or of a step's new ones, which are (B * T) in a row."""

    is_new: bool
    first: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class StepRows:
    """What a step does with rows, the same in all layers, made once. Row numbers are of the layer's exact rows.

    views     one per sequence: what its queries attend over once everything below is done
    num_new   T: new rows of each sequence, padding included; row t of sequence b is number b * T + t
    copies    (2, n) int64: rows that move first, from and to
    closed    pages to encode from the layer's exact rows
    window    runs that make the step's own window, in order; None: windows lie in the layer's exact rows
    pages     pages to encode from that window
    writes    (2, n) int64: new rows that stay exact, by their number, and where they go
    """

    views: Sequence[SequenceView]
    num_new: int = 1
    copies: PageIds | None = None
    closed: PageWrites | None = None
    window: Sequence[Run] | None = None
    pages: PageWrites | None = None
    writes: PageIds = field(default_factory=lambda: np.empty((2, 0), np.int64))

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one new row, which stays exact."""
        return self.num_new == 1 and self.window is None and self.writes.shape[1] == len(self.views)

    def window_pairs(self) -> tuple[tuple[PageIds, PageIds], int]:
        """Of held rows and of new ones: (2, n) numbers, and places in the window that the runs make; its length."""
        is_new, first, num_rows = np.array(self.window or (), np.int64).reshape(-1, 3).T
        starts = np.cumsum(num_rows) - num_rows
        places = np.arange(int(num_rows.sum()))
        pairs = np.stack([places + np.repeat(first - starts, num_rows), places])
        of_new = np.repeat(is_new, num_rows).astype(bool)
        return (pairs[:, ~of_new], pairs[:, of_new]), len(places)


class StepPlan:
    """What a backend prepares once for all layers of a step. Backends that prepare more subclass it."""

    def __init__(self, rows: StepRows) -> None:
        self.rows = rows

    @property
    def views(self) -> Sequence[SequenceView]:
        return self.rows.views


class AttentionInput(NamedTuple):
    """What a model hands one layer in a decode step: queries (B, Hq, 1, D), keys (B, H, 1, D), values (B, H, 1, Dv).

    scale, sinks, cap: as AttentionCall has them.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    scale: float
    sinks: mx.array | None
    cap: float


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention in one step.

    queries  (B, Hq, T, D) in the model's dtype
    plan     what `Backend.prepare_step` made of the step: positions, pages, where exact rows lie
    exact    this layer's exact rows
    mask     None for causal, else bool or additive, broadcastable to (B, Hq, T, N) with columns by absolute position;
             causality must be part of it
    sinks    (Hq,) logits that join the softmax's denominator and carry no value
    cap      a score s becomes cap * tanh(s / cap) before the mask; sinks are no scores; 0: scores stay as they are
    """

    queries: mx.array
    plan: StepPlan
    exact: ExactBuffers
    scale: float
    mask: mx.array | None = None
    sinks: mx.array | None = None
    cap: float = 0.0

    @property
    def views(self) -> Sequence[SequenceView]:
        return self.plan.views


class StepInputs(NamedTuple):
    """All that a decode step reads of stores and plan, as arrays: a graph that was built over others is right for it.

    key: of what else the graph depends on. Steps with an equal key have arrays of the same meaning in the same places.
    shared: what all layers read; layers: what one does, the last of its launch before among them.
    """

    key: Hashable
    shared: list[mx.array]
    layers: list[list[mx.array]]


class LayerStore(ABC):
    """One layer's pages, and attention over them. Page ids are 0 .. num_pages-1, the same in all layers of a pool."""

    shape: LayerShape
    fmt: KVFormat
    window: int = 0
    """Keys that a query sees, its own included; 0: all before it. Pages and exact rows before a step's first query's
    window may be anybody's by then. Set before anything is written."""

    @property
    @abstractmethod
    def num_pages(self) -> int:
        """Pages that memory is held for."""

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """Bytes held for those pages: codes and scales."""

    @abstractmethod
    def grow(self, num_pages: int) -> None:
        """Hold memory for at least `num_pages` pages; contents are kept."""

    @abstractmethod
    def encode(self, pages: PageWrites, k: Array, v: Array) -> None:
        """Write pages of exact values: k (H, rows, D) and v (H, rows, Dv), in which they lie as `pages` says.

        Where keys stand in their conversation decides their mean.
        """

    @abstractmethod
    def decode(self, page_ids: PageIds, first_page: int) -> tuple[Array, Array]:
        """Lossy values of pages first_page, ... of a conversation, in exact rows' dtype.

        (H, P*page, D) and (H, P*page, Dv).
        """

    @abstractmethod
    def read(self, page_ids: PageIds) -> CanonicalPages:
        """Copies of pages in the canonical layout."""

    @abstractmethod
    def write(self, page_ids: PageIds, pages: CanonicalPages) -> None:
        """Inverse of `read`. Raises ValueError when they are of another format."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Exact rows that memory is held for."""

    @property
    def exact_bytes(self) -> int:
        """Bytes held for those rows."""
        return self.num_rows * self.shape.raw_token_bytes

    @abstractmethod
    def grow_rows(self, num_rows: int) -> None:
        """Hold memory for at least `num_rows` exact rows; contents are kept."""

    @abstractmethod
    def put_rows(self, first: int, rows: ExactRows) -> None:
        """Write exact rows from row `first` on."""

    @abstractmethod
    def get_rows(self, first: int, num_rows: int) -> ExactRows:
        """Copies of exact rows."""

    @abstractmethod
    def move_rows(self, order: PageIds) -> None:
        """Keep these exact rows, in this order, and memory for no others."""

    @abstractmethod
    def append(self, plan: StepPlan, keys: mx.array, values: mx.array) -> ExactBuffers:
        """Do with keys (B, H, T, D) and values (B, H, T, Dv) what the step's StepRows say; this layer's exact rows."""

    @abstractmethod
    def exact(self) -> ExactBuffers:
        """The layer's exact rows, for a step that appended nothing."""

    def balances(self, plan: StepPlan, queries: mx.array, mask: mx.array | None) -> bool:
        """Whether `append_and_attend` applies the layer's key factors to keys and queries itself in this step.

        Else whoever calls it has applied them (cache/key_balance.py). queries (B, Hq, T, D).
        """
        return False

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
        """`append`, then `attend`; both at once where a backend can."""
        exact = self.append(plan, keys, values)
        return self.attend(AttentionCall(queries, plan, exact, scale, mask, sinks, cap))

    def attend_over(self, inputs: StepInputs, layer: int, step: AttentionInput) -> tuple[mx.array, mx.array]:
        """`append_and_attend` of a decode step over `inputs` instead of this store's own arrays, which stay untouched.

        Attention (B, Hq, 1, Dv), and what `wrote` takes once it is on its way. layer: whose arrays they are. Raises
        UnsupportedFormatError where the inputs' key says otherwise than the step.
        """
        raise UnsupportedFormatError("this backend has no decode steps over given arrays")

    def wrote(self, launched: mx.array) -> None:
        """A launch over this store's arrays is on its way; later ones come after it."""
        raise UnsupportedFormatError("this backend has no decode steps over given arrays")

    @property
    def takes_floats(self) -> bool:
        """Whether `append_and_attend_floats` is there."""
        return False

    def append_and_attend_floats(
        self, plan: StepPlan, keys: HostFloats, values: HostFloats, queries: HostFloats, *, scale: float
    ) -> HostFloats:
        """`append_and_attend` with float32 arrays in NumPy's memory: causal, without sinks, where rows are float32."""
        raise NotImplementedError

    def pending_arrays(self) -> list[Array]:
        """What is still to be computed of pages and exact rows; nothing where that is done at once."""
        return []

    @abstractmethod
    def attend(self, call: AttentionCall) -> mx.array:
        """Attention of the call's queries over each row's view; (B, Hq, T, Dv) in the queries' dtype.

        Rows past a view's num_queries come back as zeros.
        """


class Backend(ABC):
    """Makes stores for one kind of device and handles its arrays. One instance serves all layers of a model."""

    name: str

    @abstractmethod
    def new_store(self, shape: LayerShape, fmt: KVFormat, means: Means | None) -> LayerStore:
        """An empty store. Raises UnsupportedFormatError for a geometry without a kernel."""

    def prepare_step(self, rows: StepRows) -> StepPlan:
        """What all layers of a step share, made once: page tables, positions, launch plans."""
        return StepPlan(rows)

    def step_key(self, stores: Sequence[LayerStore], plan: StepPlan) -> Hashable | None:
        """The key that `step_inputs` will have; None for steps that it cannot describe, and before any was seen."""
        return None

    def step_inputs(self, stores: Sequence[LayerStore], plan: StepPlan) -> StepInputs:
        """Do what comes before a decode step's new rows, and describe the rest. Only for plans with a `step_key`."""
        raise UnsupportedFormatError("this backend has no decode steps over given arrays")

    @abstractmethod
    def from_mlx(self, x: mx.array) -> Array:
        """(..., T, D) of the model, in the backend's array type, dtype kept."""

    @abstractmethod
    def to_mlx(self, rows: Array, dtype: mx.Dtype) -> mx.array:
        """Exact rows as MLX has them."""

    @abstractmethod
    def wait_for(self, arrays: Sequence[mx.array]) -> None:
        """Called before a layer's step with all of its inputs: an eager backend computes them here."""
