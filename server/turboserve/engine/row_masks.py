"""Masks of the rows that have a token rule, filled on the host while the device computes their logits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboserve.engine.generation import Generation
from turboserve.engine.token_rules import Mask

log = logging.getLogger(__name__)

# (256, 8) float32: what the bits of each byte, the lowest first, add to a logit
ADDENDS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.float32(0.0), np.float32(-np.inf))


@dataclass(frozen=True, slots=True)
class StepMasks:
    """Of one step: which rows of the batch are restricted, and how; and what rules raised instead."""

    places: Sequence[int]  # (R,) of the batch's rows
    mask: mx.array  # of these, in either form that `BatchSampler.sample` takes
    failed: Mapping[int, Exception]  # by place


class RowMasks:
    """Fills the masks of a step's rows, all in one array that is used again."""

    def __init__(self) -> None:
        self._bits = np.zeros((0, 0), np.uint32)

    def fill(self, rows: Sequence[Generation], vocab_len: int) -> StepMasks | None:
        """None where no row has a rule. A rule that raises fails its own row; nothing is raised.

        Rules see all tokens that their answers have, so none of these may be in flight.
        """
        ruled = [i for i, row in enumerate(rows) if row.rule is not None]
        if not ruled:
            return None
        num_words = -(-vocab_len // 32)
        if self._bits.shape[0] < len(ruled) or self._bits.shape[1] != num_words:
            self._bits = np.zeros((len(ruled), num_words), np.uint32)
        places: list[int] = []
        failed: dict[int, Exception] = {}
        for i in ruled:
            try:
                if fill_mask(rows[i], self._bits[len(places)]):
                    places.append(i)
            except Exception as exc:
                log.exception("the token rule of request %s failed", rows[i].request_id)
                failed[i] = exc.with_traceback(None)  # its frames would keep caches alive
        bits = self._bits[: len(places)]
        # A CPU adds in a tenth of the time of selecting; to a GPU bits are less to carry.
        is_on_cpu = mx.default_device() == mx.Device(mx.cpu)
        return StepMasks(places, mx.array(_as_addends(bits, vocab_len) if is_on_cpu else bits), failed)


def _as_addends(bits: npt.NDArray[np.uint32], vocab_len: int) -> npt.NDArray[np.float32]:
    """(R, ceil(V / 32)) bits to (R, V): 0 or minus infinity, to be added to logits."""
    return ADDENDS[bits.astype("<u4", copy=False).view(np.uint8)].reshape(len(bits), 32 * bits.shape[1])[:, :vocab_len]


def fill_mask(row: Generation, mask: Mask) -> bool:
    """Write what the row's rule and its end tokens allow next; False: everything, and the mask means nothing.

    A complete answer ends even before `min_tokens`, as does one that has nothing but its end to go on with.
    Raises what the rule does, and RuntimeError where it leaves no token at all.
    """
    assert row.rule is not None
    if row.rule.is_complete:
        mask[:] = 0
        _set_bits(mask, row.end_ids)
        is_restricted = True
    else:
        is_restricted = row.rule.fill(mask)
        if len(row.answer) < row.request.min_tokens:
            ends = np.zeros_like(mask)
            _set_bits(ends, row.end_ids)
            others = ~ends & mask if is_restricted else ~ends
            if others.any():
                mask[:] = others
                is_restricted = True
    if is_restricted and not mask.any():
        raise RuntimeError("the rule allows no token")
    return is_restricted


def _set_bits(mask: Mask, tokens: Collection[int]) -> None:
    for token in tokens:
        if token >> 5 < len(mask):
            mask[token >> 5] |= np.uint32(1 << (token & 31))
