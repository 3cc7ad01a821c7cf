"""The same text far from the beginning of a context, without the tokens before it.

RoPE makes attention scores depend on distances alone, so an uncompressed run does not change when all positions move by
an offset. Codes of keys do change: what is quantised is the key as it stands at its position. `ShiftedCache` tells the
model positions that begin at the offset, and `shifted` turns calibrated means as far, so that a page holds exactly the
codes that it would hold behind that many other tokens.

What this leaves out: attention spread over tokens that are not there, and how exactly kernels compute the angles of
large page numbers, since pages are still counted from the text's own beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import Means
from turboquant_kv.cache import seam
from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.protocol import AttendingCache, LayerInput


class ShiftedCache(AttendingCache):
    """One layer's cache, of whatever kind, whose first token stands at position `shift` for the model."""

    def __init__(self, inner: Any, shift: int) -> None:
        self.inner, self.shift = inner, shift
        self._fetched: tuple[Any, Any] | None = None

    @property
    def offset(self) -> Any:
        """The next token's position: an int, or (B,) of a batch."""
        return self.inner.offset + self.shift

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self._fetched = self.inner.update_and_fetch(keys, values)
        return self._fetched

    def make_mask(self, *args: Any, **kwargs: Any) -> mx.array | str | None:
        """The inner cache's: columns of a mask count its own tokens."""
        mask: mx.array | str | None = self.inner.make_mask(*args, **kwargs)
        return mask

    def attend(
        self,
        queries: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
        cap: float = 0.0,
    ) -> mx.array:
        assert self._fetched is not None, "attention was asked for without new keys in this cache"
        (keys, values), self._fetched = self._fetched, None
        return seam.scaled_dot_product_attention(queries, keys, values, self.inner, scale, mask, sinks, cap)

    def _attend(self, step: LayerInput) -> mx.array:
        raise AssertionError("attend does it")

    def pending_arrays(self) -> list[Any]:
        return self.inner.pending_arrays() if isinstance(self.inner, AttendingCache) else [self.inner.state]

    def release(self) -> None:
        if isinstance(self.inner, AttendingCache):
            self.inner.release()


def at_offset(caches: Sequence[Any], shift: int, attention_layers: Sequence[bool]) -> list[Any]:
    """The caches as a model shall see them; rings and recurrent states, whose positions are nobody's, stay."""
    if shift == 0:
        return list(caches)
    pairs = zip(leaves(caches), attention_layers, strict=True)
    return with_leaves(caches, [ShiftedCache(c, shift) if moves else c for c, moves in pairs])


def shifted(calibration: Calibration, shift: int, attention_layers: Sequence[bool] | None = None) -> Calibration:
    """Means for pages whose first token stands `shift` positions further on; a mean that does not turn stays.

    attention_layers: as `at_offset` has them, which leaves other caches where they are; None: all move.

    R(p + shift) m = R(p) R(shift) m, so the mean before the turn is turned once.
    """
    moved = {i for i in calibration.layers if attention_layers is None or attention_layers[i]}
    layers = {i: _shifted(means, shift) if i in moved else means for i, means in calibration.layers.items()}
    return replace(calibration, layers=layers)


def _shifted(means: Means, shift: int) -> Means:
    if means.rotary is None:
        return means
    turned = replace(means.rotary, amplitude=1.0).turned(means.k, np.array(shift))  # it grows once, at its position
    return replace(means, k=turned.astype(np.float32))
