"""Tables of angles with which kernels turn the keys' means (src/turning.h), shared by layers that turn alike.

Angles reach thousands of turns, so they are computed in float64 here; the kernels only multiply. A row is BLOCK_TOKENS
tokens, 8 bytes a pair: an eighth of one head's float16 keys, for all heads, layers and conversations together, and
twice that where prefill and tensor cores both read it. No KV byte count has it.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.codec.rotary import BLOCK_TOKENS, Rotary

MIN_BLOCKS = 256
SPARE_BLOCKS = 2  # a tile of 32 tokens may end behind the last page


class Turns:
    """Of one rotation and one length of sink."""

    def __init__(self, rotary: Rotary, sink_tokens: int) -> None:
        self._rotary, self._sink_tokens = rotary, sink_tokens
        self._angles: npt.NDArray[np.float64] = np.zeros((0, 0))
        self._floats: mx.array | None = None
        self._halves: dict[int, mx.array] = {}

    def floats(self, num_blocks: int) -> mx.array:
        """Rows of at least `num_blocks` blocks: cosines, then sines, float32 (rows, 2 * padded pairs)."""
        self._grow(num_blocks)
        if self._floats is None:
            self._floats = mx.array(self._rows().astype(np.float32))
        return self._floats

    def halves(self, num_blocks: int, num_parts: int) -> mx.array:
        """The same rows as float16; of two parts, behind each row what that left out. Flat, seen as float32."""
        self._grow(num_blocks)
        if num_parts not in self._halves:
            rows = self._rows()
            parts = [rows.astype(np.float16)]
            if num_parts == 2:
                parts.append((rows - parts[0].astype(np.float64)).astype(np.float16))
            self._halves[num_parts] = mx.array(np.stack(parts, axis=1).reshape(-1).view(np.float32))
        return self._halves[num_parts]

    def _grow(self, num_blocks: int) -> None:
        if len(self._angles) >= num_blocks + SPARE_BLOCKS:
            return
        count = MIN_BLOCKS
        while count < num_blocks + SPARE_BLOCKS:
            count *= 2
        middles = self._sink_tokens + BLOCK_TOKENS * np.arange(count) + (BLOCK_TOKENS - 1) / 2
        self._angles = middles[:, None] * self._rotary.frequencies
        self._floats, self._halves = None, {}

    def _rows(self) -> npt.NDArray[np.float64]:
        pad = [(0, 0), (0, -self._rotary.num_pairs % 8)]
        return np.concatenate([np.pad(np.cos(self._angles), pad), np.pad(np.sin(self._angles), pad)], axis=1)
