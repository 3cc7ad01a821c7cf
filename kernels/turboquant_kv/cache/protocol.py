"""Caches that compute attention over themselves: what seam.py dispatches on, and the verbs batches share.

Keeps the books of one update followed by one attend. New tokens are kept back until their queries
arrive, so that an eager backend waits once a layer for queries, keys and values together;
`update_and_fetch` therefore returns only the new tokens' keys and values. There must be no attribute
called `bits` here: mlx-lm would take its own affine path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np


class UnsupportedModelError(RuntimeError):
    """A model uses its cache in a way that compressed attention cannot serve."""


class LayerInput(NamedTuple):
    """What a model hands one layer in one step.

    keys (B, H, T, D), values (B, H, T, Dv) of the new tokens, queries (B, Hq, T, D); mask: None for one query row,
    "causal", or an array broadcastable to (B, Hq, T, N) with columns by absolute position; sinks (Hq,) or None; cap: a
    score s becomes cap * tanh(s / cap) before the mask, unless it is 0.
    """

    keys: mx.array
    values: mx.array
    queries: mx.array
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None
    cap: float = 0.0

    @property
    def array_mask(self) -> mx.array | None:
        """The mask, if it says more than causality."""
        return None if isinstance(self.mask, str) else self.mask


class AttendingCache(ABC):
    """One layer's cache, for one conversation or several, that owns its attention."""

    _pending: tuple[mx.array, mx.array] | None = None  # keys, values (B, H, T, D) of this step

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
        cap: float = 0.0,
    ) -> mx.array:
        """Append this step's tokens; attention of queries (B, Hq, T, D) over all that is held, (B, Hq, T, Dv).

        scale, mask, sinks, cap: as LayerInput has them.
        """
        if self._pending is None:
            raise UnsupportedModelError("attention was asked for without new keys in this cache")
        if mask is None and queries.shape[2] > 1:
            raise UnsupportedModelError("attention without a causal mask is not supported on a compressed cache")
        (keys, values), self._pending = self._pending, None
        return self._attend(LayerInput(keys, values, queries, scale, mask, sinks, cap))

    @abstractmethod
    def _attend(self, step: LayerInput) -> mx.array:
        """Append and attend."""

    @abstractmethod
    def pending_arrays(self) -> list[Any]:
        """What is still to be computed, as `mx.eval` takes it; nothing where a backend computes at once."""

    def evaluate(self) -> None:
        """Finish pending work, so that no lazy graph outlives a step."""
        mx.eval(self.pending_arrays())

    @abstractmethod
    def release(self) -> None:
        """Give all memory back now; idempotent."""

    def _hold(self, keys: mx.array, values: mx.array) -> None:
        """Keep a step's keys and values until its queries come."""
        if self._pending is not None:
            raise UnsupportedModelError(
                "this model reads its KV cache without mlx-lm's scaled_dot_product_attention, "
                "so it cannot be compressed"
            )
        self._pending = keys, values

    @property
    def _num_pending(self) -> int:
        return 0 if self._pending is None else self._pending[0].shape[2]

    def _trim_pending(self, n: int) -> int:
        """Drop up to n tokens that no query has asked for yet; returns how many are left to drop."""
        held = self._num_pending
        if held > n > 0:
            assert self._pending is not None
            keys, values = self._pending
            self._pending = keys[:, :, : held - n], values[:, :, : held - n]
        elif held <= n:
            self._pending = None
        return max(0, n - held)


class BatchRows(AttendingCache):
    """Several conversations in one layer: rows of any lengths, none padded, moved or copied."""

    _remaining: list[int] | None = None  # valid tokens still to come per row, while right-padded

    @property
    @abstractmethod
    def _held_lengths(self) -> list[int]:
        """Tokens appended per row."""

    @abstractmethod
    def _cut_rows(self, counts: Sequence[int]) -> None:
        """Drop so many of each row's last tokens, none of which is pending."""

    @abstractmethod
    def exact_room(self, idx: int) -> int:
        """Tokens that row `idx` may take now, of which any number of the last can be cut off again without loss."""

    @abstractmethod
    def extract(self, idx: int) -> Any:
        """Row `idx` as a single cache; the batch stays as it is."""

    @property
    def lengths(self) -> list[int]:
        """Tokens held per row, this step's included."""
        held = self._held_lengths
        return [n + new for n, new in zip(held, self._valid(self._num_pending, len(held)), strict=True)]

    def length_of(self, idx: int) -> int:
        """Of `lengths`, one row's; its cost does not grow with the number of rows."""
        return self.lengths[idx] if self._num_pending else self._held_lengths[idx]

    def _valid(self, num_new: int, num_rows: int) -> list[int]:
        """How many of a step's tokens belong to each row; the rest is padding."""
        if self._remaining is None:
            return [num_new] * num_rows
        return [min(num_new, left) for left in self._remaining]

    def _take(self, num_new: int) -> list[int]:
        """How many of a step's tokens each row gets; of a right-padded prompt, so many fewer are still to come."""
        valid = self._valid(num_new, len(self._held_lengths))
        if self._remaining is not None:
            self._remaining = [left - n for left, n in zip(self._remaining, valid, strict=True)]
        return valid

    @property
    def offset(self) -> mx.array:
        """Tokens held per row, (B,) int32: each row's next position."""
        return positions(tuple(self.lengths))

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce a right-padded prompt: row b brings `lengths[b]` tokens, then padding until finalize."""
        if left_padding is not None and any(left_padding):
            raise ValueError("left padding is not needed here: rows may have different lengths")
        if right_padding is not None and any(right_padding):
            if lengths is None:
                raise ValueError("right padding needs the rows' lengths")
            self._remaining = list(lengths)

    def finalize(self) -> None:
        self._remaining = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys (B, H, T, D) and values (B, H, T, Dv), less each row's padding; returns just these."""
        num_rows = len(self._held_lengths)
        if keys.shape[0] != num_rows:
            raise ValueError(f"a batch of {num_rows} conversations got keys for {keys.shape[0]}")
        self._hold(keys, values)
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """As mlx-lm asks for it; an array is (B, 1, N, longest row), columns by absolute position."""
        longest = max(self.lengths) + N
        is_plain = window_size is None or longest <= window_size
        if (is_plain and not return_array) or (N == 1 and window_size is None):  # the latter as mlx-lm's caches
            return None if N == 1 else "causal"
        rows = self.offset[:, None, None, None] + mx.arange(N)[:, None]
        columns = mx.arange(longest)
        mask = columns <= rows
        return mask if window_size is None else mask & (columns > rows - window_size)

    def size(self) -> int:
        return max(self.lengths, default=0)

    def empty(self) -> bool:
        return self.size() == 0

    def can_cut(self, idx: int) -> bool:
        """Whether row `idx` may lose tokens that it has written."""
        return True

    def is_trimmable(self) -> bool:
        return all(self.can_cut(i) for i in range(len(self._held_lengths)))

    def trim(self, n: int) -> int:
        """Drop the last n tokens of every row, at most the shortest row's; returns how many. Raises as `trim_rows`."""
        lengths = self.lengths
        n = min([n, *lengths])
        surplus = max(0, n - self._num_pending)
        self._check_cut([surplus] * len(lengths))
        self._trim_pending(n)
        if surplus:
            self._cut_rows([surplus] * len(lengths))
        return n

    def trim_rows(self, counts: Sequence[int]) -> None:
        """Drop each row's last tokens, so many as `counts` says, after a step that all layers have written.

        Into a compressed page the cut is lossy (sequence.py). Raises ValueError when a row holds fewer, and
        UnsupportedModelError when one cannot go back; no row has lost anything then.
        """
        held = self._held_lengths
        if self._pending is not None or any(not 0 <= n <= have for n, have in zip(counts, held, strict=True)):
            raise ValueError(f"rows of {held} tokens cannot be cut by {list(counts)}")
        self._check_cut(counts)
        if any(counts):
            self._cut_rows(counts)

    def _check_cut(self, counts: Sequence[int]) -> None:
        """Raises UnsupportedModelError for a row that is to lose tokens and cannot."""
        for i, num_tokens in enumerate(counts):
            if num_tokens and not self.can_cut(i):
                raise UnsupportedModelError(f"row {i} cannot lose {num_tokens} tokens: its ring has overwritten others")


def row_indices(batch_indices: Sequence[int] | mx.array) -> list[int]:
    """Of `filter`, as integers; an array is read once, for each element read by itself is a computation of its own."""
    if isinstance(batch_indices, mx.array):
        return [int(i) for i in np.array(batch_indices)]
    return [int(i) for i in batch_indices]


@lru_cache(maxsize=4)  # all layers of a step ask for the same ones
def positions(lengths: tuple[int, ...]) -> mx.array:
    return mx.array(lengths, dtype=mx.int32)
