"""The plain meaning of ScalarCodec in float64: the twin that every fast encoder and decoder is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .codebook import centroids, thresholds
from .codec import Encoded, ScaleKind
from .packing import pack, unpack
from .scales import Float64, fitted_scale, stored, unit_variance


def quantise(z: NDArray[np.floating[Any]], bits: int) -> NDArray[np.uint8]:
    """Codes (uint8, z's shape) of the nearest centroids of unit-variance coordinates z.

    A code is the number of thresholds strictly below z, so a value on a threshold takes the lower code.
    Raises UnsupportedFormatError.
    """
    return np.searchsorted(thresholds(bits), z, side="left").astype(np.uint8)


def encode(y: Float64, bits: int, scale: ScaleKind) -> Encoded:
    """Codes and scales of rotated vectors y (..., D); see Codec.encode.

    Coordinates are divided by their root mean square and quantised (paper, algorithm 1); one float16 per vector,
    rms * `fitted_scale`, multiplies the centroids back.
    """
    z, rms = unit_variance(y)
    codes = quantise(z, bits)
    # <z, c> in the scale is positive unless z = 0: every centroid has the sign of its coordinate
    return Encoded(pack(codes, bits), stored(rms * fitted_scale(z, centroids(bits).astype(np.float64)[codes], scale)))


def decode(packed: NDArray[np.uint8], bits: int, head_dim: int) -> Float64:
    """Unscaled centroids (..., head_dim) of packed codes (..., head_dim*bits/8).

    Raises ValueError when the last axis has another length.
    """
    return centroids(bits).astype(np.float64)[unpack(packed, bits, head_dim)]
