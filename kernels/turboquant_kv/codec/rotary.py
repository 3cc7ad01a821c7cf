"""How keys turn with their position, and what a mean that turns with them looks like over a block of tokens.

RoPE multiplies a key by a matrix R(p) that turns pairs of its dims by angles proportional to its position p. A mean m
of keys before that turn is R(p) m after it: subtracted at the key's own position it holds a bias of k_proj, which a
constant mean cannot. Scores would then need q . R(p) m for every key, so the mean is kept constant over a block of
BLOCK_TOKENS: the average of R(p) m over the block, which is R at the block's middle times m with each pair shrunk by
`Rotary.averaged`. Pairs that turn fast within a block shrink to nothing, which is right: they have no mean there.

Owns the arithmetic. How a model's own rotation is learned is cache/rope_probe.py's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 16
"""Tokens that share one mean of keys; pages are whole blocks, the first page begins behind the sink."""

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Rotary:
    """R(p): pair j of a key's dims, (stride * j, stride * j + gap), turns by p * frequencies[j] and grows by amplitude.

    frequencies  (P,) float64, radians per position; dims in no pair stay as they are
    stride, gap  1, P: the halves of the turned dims are partners; 2, 1: neighbours are
    amplitude    1 but for scaled variants (YaRN's mscale)
    """

    frequencies: Float64
    stride: int
    gap: int
    amplitude: float = 1.0

    @property
    def num_pairs(self) -> int:
        return len(self.frequencies)

    @property
    def first(self) -> NDArray[np.int64]:
        """(P,) the first dim of each pair."""
        return self.stride * np.arange(self.num_pairs)

    @property
    def second(self) -> NDArray[np.int64]:
        """(P,) its partner."""
        return self.first + self.gap

    def turned(self, x: NDArray[np.floating[Any]], positions: NDArray[Any]) -> Float64:
        """R(p) x for x (..., D), positions broadcastable to its leading axes."""
        angles = np.asarray(positions, np.float64)[..., None] * self.frequencies
        return self._turned(np.asarray(x, np.float64), angles, self.amplitude)

    def turned_back(self, y: NDArray[np.floating[Any]], positions: NDArray[Any]) -> Float64:
        """The inverse of `turned`."""
        angles = -np.asarray(positions, np.float64)[..., None] * self.frequencies
        return self._turned(np.asarray(y, np.float64), angles, 1.0 / self.amplitude)

    def _turned(self, x: Float64, angles: Float64, amplitude: float) -> Float64:
        a, b = x[..., self.first], x[..., self.second]
        cos, sin = amplitude * np.cos(angles), amplitude * np.sin(angles)
        turned_a, turned_b = a * cos - b * sin, a * sin + b * cos
        out = np.broadcast_to(x, (*turned_a.shape[:-1], x.shape[-1])).copy()
        out[..., self.first], out[..., self.second] = turned_a, turned_b
        return out

    def averaged(self, mean: NDArray[np.floating[Any]]) -> Float64:
        """A mean (..., D) before the turn, so shrunk that R at a block's middle makes it the block's average.

        The average of BLOCK_TOKENS equally spaced turns is the middle one times the Dirichlet kernel; the amplitude
        is in it as well, so what is left to do is a plain turn by `middle`.
        """
        half = self.frequencies / 2
        flat = np.abs(np.sin(half)) < 1e-9
        kernel = np.sin(BLOCK_TOKENS * half) / (BLOCK_TOKENS * np.where(flat, 1.0, np.sin(half)))
        shrink = self.amplitude * np.where(flat, 1.0, kernel)
        out = np.array(mean, np.float64)
        out[..., self.first] *= shrink
        out[..., self.second] *= shrink
        return out

    def block_means(self, mean: NDArray[np.floating[Any]], first_position: int, num_blocks: int) -> Float32:
        """(H, num_blocks, D): of each of the blocks that begin at first_position, the average of R(p) mean (H, D)."""
        return self.block_means_at(mean, first_position + BLOCK_TOKENS * np.arange(num_blocks))

    def block_means_at(self, mean: NDArray[np.floating[Any]], starts: NDArray[np.int64]) -> Float32:
        """(H, N, D): the same of blocks that begin at any positions (N,)."""
        middles = starts + (BLOCK_TOKENS - 1) / 2
        averaged = self.averaged(mean)[:, None]
        return self._turned(averaged, middles[:, None] * self.frequencies, 1.0).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; floats survive it exactly."""
        return {
            "frequencies": self.frequencies.tolist(),
            "stride": self.stride,
            "gap": self.gap,
            "amplitude": self.amplitude,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Rotary:
        """Inverse of `to_dict`. Raises ValueError for what is none."""
        try:
            frequencies = np.array(saved["frequencies"], np.float64)
            rotary = cls(frequencies, int(saved["stride"]), int(saved["gap"]), float(saved["amplitude"]))
        except (KeyError, TypeError) as exc:
            raise ValueError(f"no rotation of keys: {exc!r}") from exc
        if frequencies.ndim != 1 or not np.isfinite(frequencies).all() or not 0 < rotary.amplitude < np.inf:
            raise ValueError("no rotation of keys: its numbers are none")
        return rotary

    def fingerprint(self) -> str:
        """Stable hash, 16 hexadecimal digits, of all that gives means their meaning."""
        told = f"{self.stride}:{self.gap}:{self.amplitude!r}:".encode() + self.frequencies.tobytes()
        return hashlib.sha256(told).hexdigest()[:16]
