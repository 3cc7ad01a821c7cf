"""What every backend offers the cache: stores of pages, exact rows, and attention over both.

A backend decides how pages are laid out in memory and who computes on them. The cache above it
only knows page ids, token counts and bytes. `Array` is the backend's own array type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import BLOCK_TOKENS, Rotary

Array = Any
PageIds = npt.NDArray[np.int64]


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
    (cache/key_balance.py); k is of keys so multiplied, so backends need not know. None: as the model gives them.
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

    def k_rows(self, fmt: KVFormat, first_page: int, num_pages: int) -> npt.NDArray[np.float32]:
        """(H, num_pages * page, D): the same for each token of a conversation's pages."""
        blocks = self.k_blocks(fmt.page_start(first_page), num_pages * fmt.page_tokens // BLOCK_TOKENS)
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


class ExactRows:
    """Consecutive exact tokens: k (H, n, D), v (H, n, Dv); `start` is the first one's position.

    They are the first rows of buffers that may hold more: slices are made only when they are asked for.
    """

    __slots__ = ("k_buffer", "num_rows", "start", "v_buffer")

    def __init__(self, start: int, k_buffer: Array, v_buffer: Array, num_rows: int | None = None) -> None:
        """num_rows: by default all that the buffers hold."""
        self.start, self.k_buffer, self.v_buffer = start, k_buffer, v_buffer
        self.num_rows: int = k_buffer.shape[1] if num_rows is None else num_rows

    @property
    def k(self) -> Array:
        return self.k_buffer[:, : self.num_rows]

    @property
    def v(self) -> Array:
        return self.v_buffer[:, : self.num_rows]


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence as attention sees it: `num_queries` query rows that begin at `q_start`.

    sink covers [0, min(length, sink)); window covers every exact token from the first query's page
    on; page_ids hold pages 0 .. len-1, which may reach into the window: a query in page i sees
    pages < i through their codes, and page i itself exactly.
    """

    q_start: int
    num_queries: int
    page_ids: PageIds
    sink: ExactRows | None
    window: ExactRows | None


class StepPlan:
    """What a backend prepares once for all layers of a step. Backends that prepare something subclass it."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention in one step.

    queries  (B, Hq, T, D) in the model's dtype
    views    one per row: this layer's exact rows, and what is the same in all layers (positions, pages)
    plan     what `Backend.prepare_step` made of the views of any layer of this step
    mask     None for causal, else bool or additive, broadcastable to (B, Hq, T, N) with columns by absolute position;
             causality must be part of it
    sinks    (Hq,) logits that join the softmax's denominator and carry no value
    """

    queries: mx.array
    views: Sequence[SequenceView]
    plan: StepPlan
    scale: float
    mask: mx.array | None = None
    sinks: mx.array | None = None


class LayerStore(ABC):
    """One layer's pages, and attention over them. Page ids are 0 .. num_pages-1, the same in all layers of a pool."""

    shape: LayerShape
    fmt: KVFormat

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
    def encode(self, page_ids: PageIds, first_page: int, k: Array, v: Array) -> None:
        """Write pages: k (H, P*page, D), v (H, P*page, Dv), exact values in token order.

        They are pages first_page, first_page + 1, ... of their conversation: where keys stand decides their mean.
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

    def prepare_step(self, views: Sequence[SequenceView]) -> StepPlan:
        """What all layers of a step share, made once: page tables, positions, launch plans.

        `views` are any one layer's: of those only what is the same in all layers is read.
        """
        return StepPlan()

    @abstractmethod
    def empty_rows(self, num_heads: int, num_rows: int, dim: int, dtype: mx.Dtype) -> Array:
        """A buffer for exact rows, (H, n, D)."""

    @abstractmethod
    def write_rows(self, buffer: Array, start: int, rows: Array) -> Array:
        """The buffer with rows written at `start`; may or may not be the same object."""

    @abstractmethod
    def concatenate(self, arrays: Sequence[Array]) -> Array:
        """Along the token axis (1)."""

    @abstractmethod
    def from_mlx(self, x: mx.array) -> Array:
        """(B, H, T, D) of the model, in the backend's array type, dtype kept."""

    @abstractmethod
    def to_mlx(self, rows: Array, dtype: mx.Dtype) -> mx.array:
        """Exact rows as MLX has them."""

    @abstractmethod
    def wait_for(self, arrays: Sequence[mx.array]) -> None:
        """Called before `from_mlx` and `attend` with all of a layer's inputs: an eager backend computes them here."""

    @abstractmethod
    def evaluate(self, arrays: Sequence[Array]) -> None:
        """Finish pending work on these arrays, so that no lazy graph outlives a step."""
