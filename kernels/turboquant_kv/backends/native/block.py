"""A decoder layer around its attention, by the CPU kernels (docs/cpu.md).

A step of few rows is a few thousand numbers between two products; each operation on them costs MLX ten to thirty
microseconds on a CPU, and a wait for each product as much again. So the kernels do all that comes before attention in
one call (norm, projections, norms of queries and keys, rotation) and all that comes after it in another (projection,
what is added back, norm, gated MLP). `reference_norm`, `reference_turn` and `reference_gate` are what stands between
the products, in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.native.backend import load_kernels
from turboquant_kv.backends.native.linear import NativeWeights

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlockShape:
    """A layer's geometry. Of a head's dims the first 2 * num_pairs turn, in pairs."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_dim: int
    num_pairs: int
    is_interleaved: bool  # pairs are dims 2 j and 2 j + 1; else j and j + num_pairs


class Norms(NamedTuple):
    """RMS norms, each a weight (n,) float32 and its eps; None where a model has none."""

    attention: tuple[mx.array, float]
    mlp: tuple[mx.array, float]
    queries: tuple[mx.array, float] | None = None
    keys: tuple[mx.array, float] | None = None


class NativeBlock:
    """One decoder layer's weights, held by the kernels. Threads may share it.

    Raises ValueError for linear layers that do not fit each other, RuntimeError without kernels.
    """

    def __init__(self, linears: Sequence[NativeWeights], norms: Norms, shape: BlockShape) -> None:
        """linears: of queries, keys, values, attention's output, gate, up and down."""
        kernels, reason = load_kernels()
        if kernels is None:
            raise RuntimeError(f"the native kernels are missing: {reason}")
        self.shape = shape
        weights = [None if norm is None else np.array(norm[0].astype(mx.float32)) for norm in norms]
        eps = [0.0 if norm is None else norm[1] for norm in norms]
        heads = shape.num_heads, shape.num_kv_heads, shape.num_pairs, shape.is_interleaved
        self._block: Any = kernels.DecoderBlock([w.held for w in linears], weights, eps, *heads)

    @property
    def held(self) -> Any:
        """As the compiled module has it."""
        return self._block

    def inputs(self, x: Floats, turn: Floats) -> tuple[Floats, Floats, Floats]:
        """Queries (B, Hq, T, D), keys (B, H, T, D) and values (B, H, T, Dv), turned, from x (B, T, W).

        turn (1 or B, T, D): cosine and sine of each position at a pair's first and second dim, and factors at dims
        that do not turn. A row with a NaN or an infinity becomes NaN.
        """
        shape, (batch, num_rows, _) = self.shape, x.shape
        q = np.empty((batch, shape.num_heads, num_rows, shape.head_dim), np.float32)
        k = np.empty((batch, shape.num_kv_heads, num_rows, shape.head_dim), np.float32)
        v = np.empty((batch, shape.num_kv_heads, num_rows, shape.v_dim), np.float32)
        self._block.attention_inputs(x, turn, q, k, v)
        return q, k, v

    def outputs(self, x: Floats, attended: Floats) -> Floats:
        """The layer's result (B, T, W) from its input x (B, T, W) and attention's (B, Hq, T, Dv)."""
        y = np.empty_like(x)
        self._block.outputs(x, attended, y)
        return y


def reference_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x * weight / sqrt(mean of x^2 + eps) along the last axis."""
    mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    normed: Floats = (x / np.sqrt(mean + eps) * weight).astype(np.float32)
    return normed


def reference_turn(x: Floats, turn: Floats, num_pairs: int, *, is_interleaved: bool) -> Floats:
    """Rows x (..., D) turned as `NativeBlock.inputs` says."""
    pairs = np.arange(num_pairs)
    first, second = (2 * pairs, 2 * pairs + 1) if is_interleaved else (pairs, pairs + num_pairs)
    out = x * turn
    c, s = turn[..., first], turn[..., second]
    out[..., first] = x[..., first] * c - x[..., second] * s
    out[..., second] = x[..., first] * s + x[..., second] * c
    return out


def reference_gate(gate: Floats, up: Floats) -> Floats:
    """gate * sigmoid(gate) * up."""
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        gated: Floats = (wide / (1 + np.exp(-wide)) * up).astype(np.float32)
    return gated
