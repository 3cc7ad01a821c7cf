"""Drawing tokens on a CPU by the native kernels: a few loops over a row's logits.

The same draw as the operations of sampling.py and weighted_draw.py, number by number: only a sum of float32 next to a
power of two, which decides the unit of weights, may round to its other side, as it may in another batch. Thirty
operations on a row cost MLX most of a millisecond, several layers' time in a small model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.native.backend import isa_choice, load_kernels
from turboserve.engine.weighted_draw import SEARCH_STEPS, TIE_OCTAVES
from turboserve.messages import SamplingParams

_FACTORS = [TIE_OCTAVES, -TIE_OCTAVES, *(-step * TIE_OCTAVES for step in SEARCH_STEPS)]
_STEPS = np.array([2.0**octaves for octaves in _FACTORS], np.float32)


class NativeDraw:
    """Parameters of a batch's rows as the kernels take them."""

    def __init__(self, kernels: Any, params: Sequence[SamplingParams], vocab_len: int, min_temperature: float) -> None:
        """A temperature of 0 takes the likeliest; others are min_temperature at least."""
        self._kernels, self._isa = kernels, isa_choice()
        octaves = [math.log2(math.e) / max(p.temperature, min_temperature) if p.temperature > 0 else 0 for p in params]
        with np.errstate(divide="ignore"):
            self._log2_min_p = np.log2(np.array([p.min_p for p in params], np.float32))
        self._octaves = np.array(octaves, np.float32)
        self._top_p = np.array([min(p.top_p, 1.0) for p in params], np.float32)
        self._top_k = np.array([min(max(p.top_k, 0), vocab_len) for p in params], np.int32)

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_len: int, min_temperature: float) -> NativeDraw | None:
        """None where a GPU draws, or there are no kernels."""
        kernels, _ = load_kernels()
        if kernels is None or mx.default_device() != mx.Device(mx.cpu):
            return None
        return cls(kernels, params, vocab_len, min_temperature)

    def draw(
        self, logits: mx.array, numbers: npt.NDArray[np.uint32]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Tokens (B,) uint32 from adjusted logits (B, V) and random numbers (B,), and which (B,) mean nothing.

        They are drawn when it returns: as arrays of MLX's, another thread would be woken to say so.
        """
        rows = np.ascontiguousarray(np.asarray(logits))
        tokens, is_broken = np.empty(len(rows), np.uint32), np.empty(len(rows), np.bool_)
        params = self._octaves, self._log2_min_p, self._top_p, self._top_k, _STEPS
        self._kernels.draw(rows, numbers, *params, tokens, is_broken, self._isa)
        return tokens, is_broken
