"""What to do next, decided from numbers alone: admission, prefill order, chunk length, queue room.

The step loop (loop.py) acts on these; nothing here holds state or touches MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A short prompt overtakes longer ones, but nobody waits more steps than this for a chunk.
MAX_SKIPPED_STEPS = 8

MAX_RETRY_AFTER_S = 60
TYPICAL_REQUEST_S = 2  # a short chat answer; only shapes the advice in Retry-After


@dataclass(frozen=True, slots=True)
class PrefillView:
    """One sequence that still has prompt tokens to feed."""

    num_remaining: int
    skipped_steps: int


def pick_prefill(candidates: Sequence[PrefillView]) -> int | None:
    """Index of the sequence whose chunk runs in this step; None when there is none.

    Least work first gives short prompts a short wait; whoever was passed over long enough goes first.
    """
    if not candidates:
        return None
    starved = [i for i, c in enumerate(candidates) if c.skipped_steps >= MAX_SKIPPED_STEPS]
    if starved:
        return max(starved, key=lambda i: candidates[i].skipped_steps)
    return min(range(len(candidates)), key=lambda i: candidates[i].num_remaining)


def chunk_len(num_remaining: int, max_chunk: int) -> int:
    """Tokens of the next prefill chunk: evenly cut, so that no chunk is a tiny rest."""
    if num_remaining <= max_chunk:
        return num_remaining
    num_chunks = -(-num_remaining // max_chunk)
    return -(-num_remaining // num_chunks)


def can_admit(num_running: int, max_running: int) -> bool:
    return num_running < max_running


def can_queue(num_waiting: int, num_running: int, max_queued: int, max_running: int) -> bool:
    """Free running slots count too, so that a queue of zero still serves."""
    return num_waiting < max_queued + max(0, max_running - num_running)


def retry_after_s(num_waiting: int, max_running: int) -> int:
    """Advice for a refused caller: about how long until the queue has moved."""
    return min(MAX_RETRY_AFTER_S, 1 + TYPICAL_REQUEST_S * num_waiting // max_running)
