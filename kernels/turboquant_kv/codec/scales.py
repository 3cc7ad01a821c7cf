"""The one scalar that is stored with a vector, in float64: what it normalises, what it means, where float16 ends."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .codec import ScaleKind

FLOAT16_MAX = 65504.0

Float64 = NDArray[np.float64]


def unit_variance(y: Float64) -> tuple[Float64, Float64]:
    """y (..., D) as (z, rms): z (..., D) of unit variance, or all zeros, and rms (...) with y = rms * z.

    An infinity gives a NaN rms, as a NaN does.
    """
    rms = np.sqrt(np.mean(y * y, axis=-1))
    rms = np.where(np.isinf(rms), np.nan, rms)  # else `stored` would hide an infinity by its clamp
    return y / np.where(rms == 0, 1.0, rms)[..., None], rms


def fitted_scale(z: Float64, c: Float64, scale: ScaleKind) -> Float64:
    """The factor (...) that multiplies decoded values c to stand for z (..., D), where |z|^2 = D or z = 0.

    plain           1                   the paper's: restores the norm before quantisation
    norm            |z| / |c|           the decoded vector has the norm of the original
    least_squares   <z, c> / |c|^2      least error, but inner products shrink by about 1 - D
    unbiased        |z|^2 / <z, c>      the decoded vector's projection on the original is the original
    """
    z_energy, c_energy = np.sum(z * z, axis=-1), np.sum(c * c, axis=-1)
    inner = np.sum(z * c, axis=-1)
    if scale == "plain":
        return np.ones(z.shape[:-1])
    if scale == "norm":
        return np.asarray(np.sqrt(z_energy / c_energy))
    if scale == "least_squares":
        return np.asarray(inner / c_energy)
    return np.asarray(z_energy / np.where(inner == 0, 1.0, inner))


def stored(scales: Float64) -> NDArray[np.float16]:
    """As float16: above 65504 clamped, below 6e-5 less precise, below 3e-8 zero."""
    return np.asarray(np.minimum(scales, FLOAT16_MAX)).astype(np.float16)
