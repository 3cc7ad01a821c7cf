"""Products with a linear layer's weights as MLX stores them, by the CPU kernels (docs/cpu.md).

Inputs are rounded to 16 bits, with a scale for every block of 64 (32 where the weights' groups are that small), so that
a product is made of integers: y = x W^T with W = scale * code + bias per group. mxfp4's numbers are
whole ones, moved and halved, so they are products of integers too. Floats of 16 bits are widened in registers and
multiplied as float32. `reference_product` is the same in NumPy, to be read and compared with.

A sequence's whole blocks of DENSE_ROWS rows may go to OpenBLAS instead, with W as float32, a strip of at most 1 MiB at
a time (`set_dense`): a float32 product, whose inputs are not rounded. Which way is faster, callers find out by `trial`.
Either way a row's result depends on its own numbers and on its place in its sequence, not on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.native.backend import isa_choice, load_kernels

Floats = npt.NDArray[np.float32]

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
MXFP4 = (4, 32)  # its bits and group
DENSE_ROWS = 64  # of a sequence that OpenBLAS multiplies in one call (kDenseRows in linear_weights.h)
UNIT = 64  # inputs that are unpacked together; a layer has a multiple of it
_LEVELS = 32512  # of a rounded input, to either side of zero (linear_jobs.h)


class NativeWeights:
    """One layer's W (N, K), held in MLX's own memory. Threads may share it.

    Raises ValueError for shapes, bits, groups or types that the kernels do not take, RuntimeError without kernels.
    """

    def __init__(self, weight: mx.array, quantised: Quantised | None = None, bias: mx.array | None = None) -> None:
        """weight: (N, K) float16 or bfloat16, or with `quantised` its codes, (N, K * bits / 32) uint32; bias (N,)."""
        kernels, reason = load_kernels()
        if kernels is None:
            raise RuntimeError(f"the native kernels are missing: {reason}")
        offset = None if bias is None else np.array(bias.astype(mx.float32))
        self.own_bytes = 0 if offset is None else int(offset.nbytes)  # beside MLX's arrays
        mx.eval(weight)
        isa = isa_choice()
        if quantised is None:
            self._weights: Any = kernels.LinearWeights(None, None, None, weight, offset, 0, 0, isa)
        else:
            mx.eval([a for a in (quantised.scales, quantised.biases) if a is not None])
            parts = (weight, quantised.scales, quantised.biases, None, offset)
            self._weights = kernels.LinearWeights(*parts, quantised.bits, quantised.group, isa)

    @property
    def held(self) -> Any:
        """As the compiled module has them."""
        return self._weights

    @property
    def num_out(self) -> int:
        return int(self._weights.num_out)

    @property
    def num_in(self) -> int:
        return int(self._weights.num_in)

    def look_up(self, ids: mx.array) -> mx.array:
        """Rows of W, where it is a table of embeddings: ids (...) to (..., K) float32. Raises ValueError for others."""
        flat = np.ascontiguousarray(np.asarray(ids), np.int64)
        out = np.empty((*ids.shape, self._weights.num_in), np.float32)
        self._weights.look_up(flat.reshape(-1), out.reshape(-1, self._weights.num_in))
        return mx.array(out)

    def multiply(self, x: mx.array) -> mx.array:
        """x (..., T, K) to x W^T + bias, (..., T, N) float32; x (M, K) are M sequences of one row.

        With codes, a row with a NaN or an infinity becomes NaN.
        """
        rows = np.ascontiguousarray(np.asarray(x.astype(mx.float32)))
        out = np.empty((*x.shape[:-1], self._weights.num_out), np.float32)
        num_rows, seq_len = out.size // self._weights.num_out, x.shape[-2] if x.ndim > 2 else 1
        self._weights.multiply(
            rows.reshape(num_rows, self._weights.num_in), out.reshape(num_rows, self._weights.num_out), seq_len
        )
        return mx.array(out)

    def trial(self, x: Floats, num_out: int, by_blas: bool) -> Floats:
        """The first outputs (M, num_out) of one sequence x (M, K), by OpenBLAS or by the own kernel, to be compared.

        On this thread alone. Raises ValueError for OpenBLAS where it is missing.
        """
        out = np.empty((len(x), num_out), np.float32)
        self._weights.trial(x, out, by_blas)
        return out

    def set_dense(self, is_dense: bool) -> None:
        """Whether OpenBLAS, where it is there, multiplies each sequence's whole blocks of DENSE_ROWS rows."""
        self._weights.set_dense(is_dense)


class Quantised:
    """What MLX's quantisation keeps beside the codes.

    Affine: scales and biases (N, K / group) of one float type. mxfp4: scales (N, K / 32) uint8 and no biases.
    """

    def __init__(self, scales: mx.array, biases: mx.array | None, bits: int, group: int) -> None:
        self.scales, self.biases, self.bits, self.group = scales, biases, bits, group

    @property
    def mode(self) -> str:
        """As MLX calls it."""
        return "mxfp4" if self.biases is None else "affine"

    def dense(self, codes: mx.array) -> mx.array:
        """W (N, K) float32, by MLX."""
        if self.biases is None:
            return mx.dequantize(codes, self.scales, None, self.group, self.bits, mode=self.mode, dtype=mx.float32)
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(codes, scales, biases, self.group, self.bits)


def reference_product(x: Floats, weight: Floats, block: int) -> Floats:
    """What the kernels compute, for x (M, K) and dequantised weights (N, K): (M, N). block: inputs with one scale."""
    blocks = x.reshape(len(x), -1, block)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(largest > 0, np.float32(_LEVELS) / largest, 0).astype(np.float32)
        rounded = np.rint(blocks * inverse) * (largest / np.float32(_LEVELS))
    product: Floats = rounded.reshape(x.shape) @ weight.T
    return product
