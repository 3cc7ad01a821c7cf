"""What to do next, decided from numbers alone: who starts, whose prompt is read and how far, who grows or makes way.

The step loop (step_loop.py) acts on these; nothing here holds state or touches MLX. Whether there is memory
is the memory's verdict, what follows from a verdict is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# A short prompt overtakes longer ones, but nobody waits more steps than this for a chunk.
MAX_SKIPPED_STEPS = 8

MAX_RETRY_AFTER_S = 60
TYPICAL_REQUEST_S = 2  # a short chat answer; only shapes the advice in Retry-After

# The head of the queue waits no longer than this for KV memory, unless its answer has begun. Long enough
# for a full answer of those who have it; a client that is told to come back is better off than one whose
# connection times out.
MAX_ROOM_WAIT_S = 120.0

# Whoever was told to wait asks again when memory was freed, and this often in any case: a disk that takes files again
# and a prefix that a running request has computed meanwhile free nothing, and yet may be what was missing.
ASK_AGAIN_S = 1.0

# A verdict is carried out at once and nearly always holds. What can keep it from holding (files that cannot be
# read, a disk that refuses) is found once each; the rest is for the next step.
MAX_VERDICT_ROUNDS = 8


# --- admission: in order of arrival, preempted requests first; the head is not overtaken


class Admission(Enum):
    """What is due for the head of the queue."""

    NOTHING = "leave it, and everybody behind it, for the next step"
    PREPARE = "tokenise its prompt"
    ASK = "ask the memory for room"
    GIVE_UP = "refuse it: it has waited long enough"


@dataclass(frozen=True, slots=True)
class HeadView:
    """The first of the waiting requests.

    roomless_s: since it first found no room, None: it has not asked. told_to_wait_at: the memory's generation
    when it last asked, since_asked_s ago.
    """

    is_prepared: bool
    has_answer: bool = False
    roomless_s: float | None = None
    told_to_wait_at: int | None = None
    since_asked_s: float = 0.0


def next_admission(
    head: HeadView | None, *, num_running: int, max_running: int, may_prepare: bool, memory_generation: int
) -> Admission:
    """may_prepare: whether this step has not prepared a prompt yet; more than one would hold up running streams."""
    if head is None or num_running >= max_running:
        return Admission.NOTHING
    if not head.is_prepared:
        return Admission.PREPARE if may_prepare else Admission.NOTHING
    if head.roomless_s is not None and head.roomless_s > MAX_ROOM_WAIT_S and not head.has_answer:
        return Admission.GIVE_UP
    has_news = head.told_to_wait_at != memory_generation or head.since_asked_s >= ASK_AGAIN_S
    return Admission.ASK if has_news else Admission.NOTHING


def can_queue(num_waiting: int, num_running: int, max_queued: int, max_running: int) -> bool:
    """Free running slots count too, so that a queue of zero still serves."""
    return num_waiting < max_queued + max(0, max_running - num_running)


def retry_after_s(num_waiting: int, max_running: int) -> int:
    """Advice for a refused caller: about how long until the queue has moved."""
    return min(MAX_RETRY_AFTER_S, 1 + TYPICAL_REQUEST_S * num_waiting // max_running)


# --- prefill


@dataclass(frozen=True, slots=True)
class PrefillView:
    """One request that still has prompt tokens to feed."""

    num_remaining: int
    skipped_steps: int


def pick_prefill(candidates: Sequence[PrefillView]) -> int | None:
    """Index of the request whose chunk runs in this step; None when there is none.

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


# --- growth and preemption


@dataclass(frozen=True, slots=True)
class RowView:
    """One answer being generated. `order` of admission: the oldest has the lowest."""

    order: int
    num_tokens: int
    reserved_tokens: int


def growing(rows: Sequence[RowView]) -> list[int]:
    """Indices of those that have outgrown their reservation, the oldest first: it may take from the younger ones."""
    grown = [i for i, row in enumerate(rows) if row.num_tokens > row.reserved_tokens]
    return sorted(grown, key=lambda i: rows[i].order)


class WithoutGrowth(Enum):
    """What becomes of an answer that has no room to go on."""

    MAKE_WAY = "it waits until older ones have ended"
    END = "it ends here, by length"


def without_growth(order: int, running: Sequence[int]) -> WithoutGrowth:
    """running: orders of all that run. The oldest has nobody to wait for."""
    return WithoutGrowth.MAKE_WAY if any(other < order for other in running) else WithoutGrowth.END


def to_preempt(named: Sequence[int], running: Sequence[int]) -> list[int]:
    """Indices of the running requests whose orders a verdict names, as it orders them; one that has ended is left."""
    return [running.index(order) for order in named if order in running]
