"""What to do next, decided from numbers alone: who starts, whose prompt is read and how far, who grows or makes way.

The step loop (step_loop.py) acts on these; nothing here holds state or touches MLX. Whether there is memory
is the memory's verdict, what follows from a verdict is decided here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

# A short prompt overtakes longer ones, but nobody waits more steps than this for a chunk.
MAX_SKIPPED_STEPS = 8

# Prompt tokens of a step unless set. On a GPU fewer would leave it waiting for the host, and one with much memory has
# room for the activations of more; a CPU is as fast with these, and streams wait less.
GPU_PREFILL_TOKENS, CPU_PREFILL_TOKENS = 2048, 256
LARGE_GPU_BYTES, LARGE_GPU_PREFILL_TOKENS = 48 << 30, 8192
CPU_LEAST_CHUNK = 8  # rows; the CPU kernels attend with so few as in decode steps, in integers (kDecodeRows, store.h)
MIN_PREFILL_TOKENS = 32  # below it a step's fixed costs are most of its time
MAX_PADDING = 1.25  # tokens of a pass by useful ones
MIN_SHARED_TOKENS = 64  # common tokens yet to be computed that are worth waiting for: about a page
SPEED_MEMORY = 0.7  # what a chunk's figures still weigh when the next one has been measured

MAX_RETRY_AFTER_S = 60
TYPICAL_REQUEST_S = 2  # a short chat answer; only shapes the advice in Retry-After

# The head of the queue waits no longer than this for KV memory, unless its answer has begun. Long enough
# for a full answer of those who have it; a client that is told to come back is better off than one whose
# connection times out.
MAX_ROOM_WAIT_S = 120.0

# Of a step: a chat's prompt takes about a millisecond, and running streams wait for it.
MAX_PREPARE_S = 0.02

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
    """may_prepare: whether this step has time for another prompt's preparation (`has_time_to_prepare`)."""
    if head is None or num_running >= max_running:
        return Admission.NOTHING
    if not head.is_prepared:
        return Admission.PREPARE if may_prepare else Admission.NOTHING
    if head.roomless_s is not None and head.roomless_s > MAX_ROOM_WAIT_S and not head.has_answer:
        return Admission.GIVE_UP
    has_news = head.told_to_wait_at != memory_generation or head.since_asked_s >= ASK_AGAIN_S
    return Admission.ASK if has_news else Admission.NOTHING


def has_time_to_prepare(num_prepared: int, spent_s: float) -> bool:
    """Whether a step that has prepared so many prompts, in so many seconds, prepares another one.

    Prompts that arrive together can only be read together if they are prepared in one step. One that takes long is the
    last of its step.
    """
    return num_prepared == 0 or spent_s < MAX_PREPARE_S


def can_queue(num_waiting: int, num_running: int, max_queued: int, max_running: int) -> bool:
    """Free running slots count too, so that a queue of zero still serves."""
    return num_waiting < max_queued + max(0, max_running - num_running)


def retry_after_s(num_waiting: int, max_running: int) -> int:
    """Advice for a refused caller: about how long until the queue has moved."""
    return min(MAX_RETRY_AFTER_S, 1 + TYPICAL_REQUEST_S * num_waiting // max_running)


# --- prefill


@dataclass(frozen=True, slots=True)
class PrefillView:
    """One request that still has prompt tokens to feed.

    beginning: equal for two of which one is about to compute tokens that the other needs as well.
    """

    num_remaining: int
    skipped_steps: int
    beginning: Hashable = None


class Piece(NamedTuple):
    """A request that is read in this step, by its place among the candidates, and how far."""

    place: int
    num_tokens: int


def most_prefill_tokens(wanted: int, *, on_cpu: bool, gpu_bytes: int = 0) -> int:
    """Prompt tokens that a step computes at most; wanted 0: what the device needs to be busy.

    gpu_bytes: of a GPU's own memory; 0 where it shares the host's.
    """
    if wanted or on_cpu:
        return wanted or CPU_PREFILL_TOKENS
    return LARGE_GPU_PREFILL_TOKENS if gpu_bytes >= LARGE_GPU_BYTES else GPU_PREFILL_TOKENS


def prefill_budget(most: int, *, streams_run: bool, tokens_per_s: float | None, max_wait_s: float) -> int:
    """Prompt tokens for the next step: fewer while streams run, which shall not wait longer than max_wait_s for it.

    tokens_per_s: None before anything was measured. max_wait_s 0: no bound.
    """
    if not streams_run or not max_wait_s or tokens_per_s is None:
        return most
    return min(most, max(MIN_PREFILL_TOKENS, int(tokens_per_s * max_wait_s)))


class PrefillSpeed:
    """Tokens per second of the latest chunks, each weighing as long as it took."""

    def __init__(self) -> None:
        self._num_tokens = self._seconds = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        return self._num_tokens / self._seconds if self._seconds > 0 else None

    def learn(self, num_tokens: int, seconds: float) -> None:
        """One more chunk was computed."""
        self._num_tokens = SPEED_MEMORY * self._num_tokens + num_tokens
        self._seconds = SPEED_MEMORY * self._seconds + seconds


def plan_prefill(
    candidates: Sequence[PrefillView], budget: int, *, may_group: bool, block: int = 1, least: int = 0
) -> list[Piece]:
    """Who is read in this step, and how far.

    Least work first gives short prompts a short wait; whoever was passed over long enough goes first. Others whose
    whole rest fits into the budget are computed in the same pass, padded to the longest, unless padding would cost
    more than a quarter of what it pads or they wait for what is computed in it. Requests with nothing left to read
    cost nothing. block, least: as in `chunk_len`; what is read together has as many whole blocks each, and no chunk has
    `least` tokens or fewer beside one that has more.
    """
    pieces = [Piece(i, 0) for i, c in enumerate(candidates) if c.num_remaining <= 0]
    order = [i for i, c in enumerate(candidates) if c.num_remaining > 0]
    order.sort(key=lambda i: candidates[i].num_remaining)
    starved = [i for i in order if candidates[i].skipped_steps >= MAX_SKIPPED_STEPS]
    if not order:
        return pieces
    lead = max(starved, key=lambda i: candidates[i].skipped_steps) if starved else order[0]
    pass_ = [Piece(lead, chunk_len(candidates[lead].num_remaining, budget, block, least))]
    order.remove(lead)
    for i in order if may_group else ():
        rest, beginning = candidates[i].num_remaining, candidates[i].beginning
        if beginning is not None and any(candidates[p.place].beginning == beginning for p in pass_):
            continue
        first = pass_[0].num_tokens
        if (block > 1 and rest // block != first // block) or (rest <= least) != (first <= least):
            continue
        lens = [*(p.num_tokens for p in pass_), rest]
        padded_len = len(lens) * max(lens)
        if padded_len <= min(budget, MAX_PADDING * sum(lens)):
            pass_.append(Piece(i, rest))
    return pieces + pass_


def concerned(candidates: Sequence[PrefillView], pieces: Sequence[Piece]) -> list[int]:
    """Places of those who are read in this step, and of those who wait for what these compute."""
    places = {piece.place for piece in pieces}
    beginnings = {candidates[i].beginning for i in places} - {None}
    return [i for i, c in enumerate(candidates) if i in places or c.beginning in beginnings]


def chunk_len(num_remaining: int, max_chunk: int, block: int = 1, least: int = 0) -> int:
    """Tokens of the next prefill chunk: evenly cut, so that no chunk is a tiny rest, and whole blocks but for the last.

    No prompt's rest has `least` tokens or fewer, so that how a prompt is cut does not decide what computes its end. A
    chunk is max_chunk or a block at most, and `least` more.
    """
    most = max(max_chunk // block, 1) * block
    if num_remaining <= most:
        return num_remaining
    num_chunks = -(-num_remaining // most)
    chunk = -(-num_remaining // (num_chunks * block)) * block
    return chunk if num_remaining - chunk > least else num_remaining


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
