"""The paper's inner-product variant (algorithm 2), for comparison only: off by default, measured worse.

One bit per coordinate of the budget goes to a sign sketch of the residual (QJL): b-1 bits of Lloyd-Max codes, then
sign(S r) and |r|. Inner products come out unbiased, but with 4 to 6 times the variance that the unbiased scale of
scales.py leaves at the same bits (2 times with an orthogonal S), and a second float16 is stored.
No cache or kernel uses this module; bench/distortion.py measures it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from turboquant_kv.codec.codec import Encoded
from turboquant_kv.codec.packing import pack, unpack
from turboquant_kv.codec.reference import Float64, Real, decode, encode
from turboquant_kv.codec.scalar import ScalarCodec
from turboquant_kv.codec.scales import stored


@dataclass(frozen=True)
class Sketch:
    """S (D, D) float64 and the factor f that makes f |r| S^T sign(S r) an unbiased estimate of r."""

    matrix: Float64
    factor: float


class ProductEncoded(NamedTuple):
    """Codes of b-1 bits with their norm, residual signs (..., D/8) uint8, residual norms (...) float16."""

    codes: Encoded
    signs: NDArray[np.uint8]
    residual_norms: NDArray[np.float16]


def draw_sketch(head_dim: int, rng: np.random.Generator, kind: Literal["gaussian", "orthogonal"]) -> Sketch:
    """A random S: independent N(0, 1) entries as in the paper, or a uniformly random orthonormal matrix.

    For a row s and a unit vector u, E[s sign(<s, u>)] = u E|<s, u>|; the factor is 1 / (D E|<s, u>|), where the mean is
    sqrt(2/pi) for a Gaussian row and Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2)) for a row on the sphere.
    """
    gaussian = rng.standard_normal((head_dim, head_dim))
    if kind == "gaussian":
        return Sketch(gaussian, math.sqrt(math.pi / 2) / head_dim)
    q, r = np.linalg.qr(gaussian)
    log_mean = math.lgamma(head_dim / 2) - math.lgamma((head_dim + 1) / 2) - math.log(math.pi) / 2
    return Sketch(q * np.sign(np.diag(r)), 1 / (head_dim * math.exp(log_mean)))  # the signs make Q uniform


def encode_product(x: Real, bits: int, rotation: Real, sketch: Sketch) -> ProductEncoded:
    """Compress x (..., D) to b-1 bits of codes under the plain scale and one sign of S times the residual each.

    Raises UnsupportedFormatError unless bits is 2, 3 or 4.
    """
    x64 = np.asarray(x, np.float64)
    coarse = _coarse(bits)
    codes = encode(x64, coarse, rotation)
    residual = x64 - decode(codes, coarse, x64.shape[-1], rotation)
    signs = (residual @ sketch.matrix.T > 0).astype(np.uint8)
    return ProductEncoded(codes, pack(signs, 1), stored(np.linalg.norm(residual, axis=-1)))


def decode_product(encoded: ProductEncoded, bits: int, head_dim: int, rotation: Real, sketch: Sketch) -> Float64:
    """Vectors (..., head_dim) whose inner product with q is `inner_product`."""
    residual = _signs(encoded, head_dim) @ sketch.matrix
    weight = sketch.factor * encoded.residual_norms.astype(np.float64)
    return decode(encoded.codes, _coarse(bits), head_dim, rotation) + weight[..., None] * residual


def inner_product(q: Real, encoded: ProductEncoded, bits: int, rotation: Real, sketch: Sketch) -> Float64:
    """Unbiased estimates (...) of <q, x> for q (..., D), as an attention kernel would form them.

    q is rotated and sketched once; the vector contributes codes, signs and two scalars (paper, algorithm 2).
    """
    head_dim = q.shape[-1]
    q64 = np.asarray(q, np.float64)
    coarse = decode(encoded.codes, _coarse(bits), head_dim, np.eye(head_dim))  # still rotated, as is q below
    from_codes = np.sum((q64 @ np.asarray(rotation, np.float64).T) * coarse, axis=-1)
    from_signs = np.sum((q64 @ sketch.matrix.T) * _signs(encoded, head_dim), axis=-1)
    estimate: Float64 = from_codes + sketch.factor * encoded.residual_norms.astype(np.float64) * from_signs
    return estimate


def _coarse(bits: int) -> ScalarCodec:
    """The codec of the first stage."""
    return ScalarCodec(bits - 1, "plain")


def _signs(encoded: ProductEncoded, head_dim: int) -> NDArray[Any]:
    """+-1.0 (..., head_dim)."""
    return unpack(encoded.signs, 1, head_dim) * 2.0 - 1.0
