"""Layers that apply to each row of a batch its own LoRA adapter, or none: y + scale * (x A) B, A and B the row's.

A layer holds the matrices of all adapters that change it, stacked and padded with zeros to the largest rank, and
multiplies every row by its own two: rows of many adapters are one batch. For single tokens no matrix is copied
(`mx.gather_mm`). Rows without an adapter keep the bits of the layer underneath. The arithmetic is mlx-lm's own
(`mlx_lm.tuner.lora`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn

nn: Any = mlx.nn  # whose stubs say too little

EMBEDDINGS: Any = (nn.Embedding, nn.QuantizedEmbedding)

Slots = tuple[int | None, ...]
"""Of each adapter by its index: its place in a layer's stacks; None: it leaves the layer as it is."""

# Batches come and go, and few are known at a time: one that decodes, and prompts that are read.
MAX_KNOWN_BATCHES = 64


class Chosen(NamedTuple):
    """What a layer applies to the rows of one batch."""

    places: mx.array  # (B,) uint32, in the layer's stacks; 0 for rows without
    scales: mx.array  # (B, 1, 1) float32
    has_one: mx.array | None  # (B, 1, 1) bool; None: every row has one


class RowAdapters:
    """Which adapter each row of the forward pass under way has: told by whoever runs it, read by the layers.

    One thread only. Outside `applied` no row has any.
    """

    def __init__(self, scales: Sequence[float]) -> None:
        """`scales`: of all adapters, by their indices."""
        self._scales = tuple(scales)
        self._rows: tuple[int | None, ...] = ()
        self._known: dict[tuple[int | None, ...], dict[Slots, Chosen | None]] = {}

    @property
    def num_rows(self) -> int:
        """Rows of the pass under way; 0 where none has an adapter."""
        return len(self._rows)

    @contextmanager
    def applied(self, rows: Sequence[int | None]) -> Iterator[None]:
        """While this is entered, a forward pass over so many rows applies these adapters, by their indices."""
        if all(row is None for row in rows):
            yield
            return
        self._rows = tuple(rows)
        try:
            yield
        finally:
            self._rows = ()

    def chosen(self, slots: Slots) -> Chosen | None:
        """What a layer with these stacks applies now; None: nothing to any row. The same for all such layers."""
        if not self._rows:
            return None
        if self._rows not in self._known:
            if len(self._known) >= MAX_KNOWN_BATCHES:
                self._known.clear()
            self._known[self._rows] = {}
        known = self._known[self._rows]
        if slots not in known:
            known[slots] = self._choose(slots)
        return known[slots]

    def _choose(self, slots: Slots) -> Chosen | None:
        places = [None if row is None else slots[row] for row in self._rows]
        if all(place is None for place in places):
            return None
        scales = [0.0 if row is None else self._scales[row] for row in self._rows]
        has_one = [[[place is not None]] for place in places]
        return Chosen(
            mx.array([place or 0 for place in places], mx.uint32),
            mx.array(scales, mx.float32)[:, None, None],
            None if all(place is not None for place in places) else mx.array(has_one),
        )


class MixedRowsError(ValueError):
    """A layer's input has other rows than the batch, so that nobody can tell which adapter applies where."""


class AdaptedLinear(nn.Module):  # type: ignore[misc]  # of whatever type mlx says
    """A linear layer, quantised or not, with adapters.

    lora_a (S, R, in) and lora_b (S, out, R): of S adapters, padded to rank R.
    """

    def __init__(self, linear: Any, lora_a: mx.array, lora_b: mx.array, rows: RowAdapters, slots: Slots) -> None:
        super().__init__()
        self.linear, self.lora_a, self.lora_b = linear, lora_a, lora_b
        self._rows, self._slots = rows, slots

    def __call__(self, x: mx.array) -> mx.array:
        """x (B, ..., in), or (B * T, in) of whole rows one after another -> (B, ..., out). Raises MixedRowsError."""
        y: mx.array = self.linear(x)
        chosen = self._rows.chosen(self._slots)
        if chosen is None:
            return y
        by_rows = _by_rows(x, self._rows.num_rows)
        return _added(y, _low_rank(by_rows, self.lora_a, self.lora_b, chosen.places), chosen)


class AdaptedEmbedding(nn.Module):  # type: ignore[misc]
    """A table of embeddings, quantised or not, with adapters; maybe the output layer as well.

    lora_a (S, V, R) and lora_b (S, R, out): of S adapters, padded to rank R.
    """

    def __init__(self, embedding: Any, lora_a: mx.array, lora_b: mx.array, rows: RowAdapters, slots: Slots) -> None:
        super().__init__()
        self.embedding, self.lora_a, self.lora_b = embedding, lora_a, lora_b
        self._rows, self._slots = rows, slots

    def __call__(self, ids: mx.array) -> mx.array:
        """Token ids (B, T) -> (B, T, out). Raises MixedRowsError."""
        y: mx.array = self.embedding(ids)
        chosen = self._rows.chosen(self._slots)
        if chosen is None:
            return y
        if ids.ndim != 2 or ids.shape[0] != self._rows.num_rows:
            raise _mixed(ids, self._rows.num_rows)
        return _added(y, self.lora_a[chosen.places[:, None], ids] @ self.lora_b[chosen.places], chosen)

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states (B, T, out) -> logits (B, T, V). Raises MixedRowsError."""
        y: mx.array = self.embedding.as_linear(x)
        chosen = self._rows.chosen(self._slots)
        if chosen is None:
            return y
        by_rows = _by_rows(x, self._rows.num_rows)
        return _added(y, _low_rank(by_rows, self.lora_b, self.lora_a, chosen.places), chosen)


def _low_rank(x: mx.array, a: mx.array, b: mx.array, places: mx.array) -> mx.array:
    """x (B, M, in), a (S, R, in), b (S, out, R) -> (B, M, out), each row by its own matrices.

    On CUDA, `mx.gather_mm` has single tokens only, by matrices that lie like these.
    """
    if x.shape[1] == 1:
        inner = mx.gather_mm(x, a.swapaxes(1, 2), rhs_indices=places)
        return mx.gather_mm(inner, b.swapaxes(1, 2), rhs_indices=places)
    return x @ a[places].swapaxes(1, 2) @ b[places].swapaxes(1, 2)


def _added(y: mx.array, z: mx.array, chosen: Chosen) -> mx.array:
    """What the layer underneath gives and what adapters add; the bits of rows without one stay."""
    by_rows = y.reshape(z.shape)
    changed = by_rows + (chosen.scales.astype(z.dtype) * z).astype(y.dtype)
    if chosen.has_one is not None:
        changed = mx.where(chosen.has_one, changed, by_rows)
    return changed.reshape(y.shape)


def _by_rows(x: mx.array, num_rows: int) -> mx.array:
    """(B, M, in), however a model shapes it: some flatten rows and tokens to one axis."""
    is_flat = x.ndim == 2 and x.shape[0] % num_rows == 0
    if x.shape[0] != num_rows and not is_flat:
        raise _mixed(x, num_rows)
    return x.reshape(num_rows, -1, x.shape[-1])


def _mixed(x: mx.array, num_rows: int) -> MixedRowsError:
    return MixedRowsError(f"a layer's input of shape {tuple(x.shape)} does not have the batch's {num_rows} rows")


def adapted_layer(layer: Any, parts: dict[int, tuple[mx.array, mx.array]], rows: RowAdapters, num: int) -> Any:
    """`layer` with those adapters of `num` that are in `parts`, by their indices: matrices (in, r) and (r, out)."""
    is_table = isinstance(layer, EMBEDDINGS)
    rank = max(a.shape[1] for a, _ in parts.values())
    lora_a = mx.stack([mx.pad(a, [(0, 0), (0, rank - a.shape[1])]) for a, _ in parts.values()])
    lora_b = mx.stack([mx.pad(b, [(0, rank - b.shape[0]), (0, 0)]) for _, b in parts.values()])
    if not is_table:
        lora_a, lora_b = mx.contiguous(lora_a.swapaxes(1, 2)), mx.contiguous(lora_b.swapaxes(1, 2))
    places = {index: place for place, index in enumerate(parts)}
    slots = tuple(places.get(index) for index in range(num))
    kind = AdaptedEmbedding if is_table else AdaptedLinear
    return kind(layer, lora_a, lora_b, rows, slots)
