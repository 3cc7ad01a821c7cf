"""A model's decode step by the CPU kernels in one call: embedding, decoder layers with attention, norm and head.

A layer of one row is a tenth of a millisecond of arithmetic, and Python's part between two calls was as long again:
threads that wait so long go to sleep. It is the same arithmetic as block.py's two calls a layer, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.base import StepPlan
from turboquant_kv.backends.native.backend import NativeStepPlan, NativeStore, load_kernels
from turboquant_kv.backends.native.block import NativeBlock
from turboquant_kv.backends.native.linear import NativeWeights

Floats = npt.NDArray[np.float32]


class LayerToken(NamedTuple):
    """What one layer's part of a step needs beside the step's plan.

    turn (B, D): of each sequence's position, as NativeBlock.inputs has it. factors: what keys (H, D) and queries
    (Hq, D) are multiplied by, or None.
    """

    store: NativeStore
    turn: Floats
    scale: float
    factors: tuple[Floats, Floats] | None


class NativeDecoder:
    """A model's weights, held by the kernels. One step at a time.

    Raises ValueError for parts that do not fit each other, RuntimeError without kernels.
    """

    def __init__(
        self,
        embedding: NativeWeights,
        blocks: Sequence[NativeBlock],
        norm: tuple[mx.array, float],
        head: NativeWeights,
    ) -> None:
        """norm: weight (W,) and eps of the RMS norm before the head; head: (N, W), maybe the embedding's."""
        kernels, reason = load_kernels()
        if kernels is None:
            raise RuntimeError(f"the native kernels are missing: {reason}")
        weight, eps = np.array(norm[0].astype(mx.float32)), norm[1]
        self._num_out = head.num_out
        held = [block.held for block in blocks]
        self._decoder: Any = kernels.DecoderModel(embedding.held, held, weight, eps, head.held)

    def logits(self, x: Floats) -> Floats:
        """(M, N) from the last layer's results x (M, W)."""
        out = np.empty((len(x), self._num_out), np.float32)
        self._decoder.logits(x, out)
        return out

    def step(self, tokens: npt.NDArray[np.int64], plan: StepPlan, layers: Sequence[LayerToken]) -> Floats:
        """Logits (B, N) after one new token (B,) of each sequence, which all layers append and attend to.

        plan: what the stores' backend prepared; it may move exact rows and encode pages, but has no window of its own.
        Raises ValueError for what does not fit, before anything is written.
        """
        assert isinstance(plan, NativeStepPlan) and plan.rows.window is None
        rows, out = plan.rows, np.empty((len(tokens), self._num_out), np.float32)
        given = []
        for store, turn, scale, factors in layers:
            k, v = store.exact_arrays()
            given.append((store.store, k, v, turn, scale, store.window, *(factors or (None, None))))
        closed = None if rows.closed is None else tuple(rows.closed)
        self._decoder.step(tokens, plan.figures, plan.page_ids, rows.writes, rows.copies, closed, given, out)
        return out
