"""Work of the kinds that requests bring, done once before the server is ready, so that the first one waits for nothing
that the second does not: kernels compile, libraries start their threads, memory is taken.

Goes through the runner like requests do, with tokens that mean nothing. Leaves no conversation and no page behind.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import cycle

import mlx.core as mx

from turboserve.engine.device import on_cpu
from turboserve.engine.generation import Generation
from turboserve.engine.graph_choice import TRIAL_STEPS, GraphChoice, refused_graphs
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.runner import Runner
from turboserve.engine.sampling import row_sampling
from turboserve.engine.speculation import MOST_DRAFTS
from turboserve.engine.token_rules import Mask
from turboserve.messages import Event, Request, SamplingParams

log = logging.getLogger(__name__)

# Each way of drawing has operations of its own.
DRAWS = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(top_p=0.95),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
    SamplingParams(presence_penalty=0.1, frequency_penalty=0.1, logit_bias=((0, 1.0),)),
)
# On a CPU nothing is compiled for lengths or numbers of rows: a first request took no longer than a second one before
# there was a warm-up. What mx.compile makes there and the weights' first reading are had for less than a second.
CPU_CHUNKS = (16, 8)
CPU_ROWS = 2
LONGEST_PAGE = 256  # steps after which room that has not come will not come
MOST_LOGPROBS = 20  # that a request may ask for
ODD_TOKENS = 37  # of a prompt's last chunk: operations on whole tiles and on ragged ones differ


@dataclass(frozen=True, slots=True)
class Plan:
    """Chunks of the prompt that is read, with how many rows tokens are decoded, and how many tokens each time.

    with_guesses: also what checks guessed tokens, where any are. draws: the ways of drawing. with_rules: by a mask and
    with logprobs too.
    """

    chunks: tuple[int, ...]
    row_counts: tuple[int, ...]
    num_tokens: int
    with_guesses: bool = False
    draws: tuple[SamplingParams, ...] = DRAWS
    with_rules: bool = True

    @classmethod
    def for_device(cls, prefill_tokens: int, max_running: int, max_context: int) -> Plan:
        """On a GPU what requests can meet; a chunk comes first without, then with a history."""
        chunks: tuple[int, ...]
        if mx.default_device() == mx.Device(mx.cpu):
            chunks, most_rows, num_tokens = CPU_CHUNKS, CPU_ROWS, 1
        else:
            chunks, most_rows = (prefill_tokens, prefill_tokens, ODD_TOKENS), max_running
            num_tokens = 2  # the second one's step begins as all later ones do
        row_counts = _doubling(min(most_rows, max_running))
        room = max_context - num_tokens * (len(DRAWS) + len(row_counts)) - 1  # the rest is for answers
        while sum(chunks) > room:
            chunks = chunks[1:]
        return cls(chunks, row_counts, num_tokens, mx.default_device() != mx.Device(mx.cpu))


def _doubling(most: int) -> tuple[int, ...]:
    """2, 4, 8, ... up to and with `most`; one row is decoded in any case."""
    counts: list[int] = []
    while 2 << len(counts) < most:
        counts.append(2 << len(counts))
    return (*counts, most) if most > 1 else ()


def warm_up(
    runner: Runner, parts: EngineParts, vocab_len: int, plan: Plan, keep_graphs: str = "off"
) -> tuple[float, GraphChoice]:
    """The seconds it took, and whether decode steps keep their graphs (settings.keep_graphs).

    A failure is logged and no more: requests meet it again, and are told.
    """
    began = time.perf_counter()
    graphs: GraphChoice | None = None
    try:
        graphs = do_once(runner, parts, vocab_len, plan, keep_graphs)
    except Exception:
        log.warning("the model could not be warmed up; first requests may be slow, or fail", exc_info=True)
        graphs = refused_graphs(keep_graphs, on_cpu=on_cpu()) or GraphChoice(None, "the warm-up failed")
    return time.perf_counter() - began, graphs


def do_once(runner: Runner, parts: EngineParts, vocab_len: int, plan: Plan, keep_graphs: str) -> GraphChoice:
    """The plan's work; whether decode steps keep their graphs. Raises what the model raises. Leaves nothing behind."""
    rows: list[Generation] = []
    graphs = refused_graphs(keep_graphs, on_cpu=on_cpu())
    try:
        can_cut = _work(runner, parts, vocab_len, plan, rows)
        if graphs is None and can_cut:
            graphs = _try_graphs(runner, keep_graphs)
        if runner.speculation is not None and plan.with_guesses and can_cut:
            runner.try_guesses(MOST_DRAFTS)
    finally:
        runner.leave([row for row in rows if runner.has(row)])
        for row in rows:
            parts.runtime.release(row.caches or [])
        parts.memory.family.trim(1 << 62)
    return graphs or GraphChoice(None, "these caches cannot be cut")


def _try_graphs(runner: Runner, wanted: str) -> GraphChoice:
    try:
        _make_room(runner)
        return runner.try_graphs(wanted)
    except Exception:
        log.warning("decode steps cannot keep their graphs: each is built anew", exc_info=True)
        return GraphChoice(None, "the trial failed: the log has details")


def _make_room(runner: Runner) -> None:
    """Decode until no conversation closes a page within the trial: they are of different lengths, and not chosen."""
    for _ in range(LONGEST_PAGE):
        if runner.trial_room >= TRIAL_STEPS:
            return
        _decode(runner, 1)


def _work(runner: Runner, parts: EngineParts, vocab_len: int, plan: Plan, rows: list[Generation]) -> bool:
    """Prefill, then decode one row in each way of drawing, then by a mask and with logprobs, then more and more rows.

    Where there are adapters, with them: what a row without one needs is needed beside them as well.
    `rows` gets all whose caches have to be given back, whatever happens. Whether there were as many rows as planned.
    """
    prompt = [i % vocab_len for i in range(sum(plan.chunks) + 1)]
    adapters = [*parts.loaded.adapters] or [None]
    first = _new_row(prompt)
    first.caches = parts.runtime.make_cache()
    rows.append(first)
    for chunk, first.adapter in zip(plan.chunks, cycle(adapters), strict=False):
        for error in runner.prefill([(first, chunk)]).values():
            raise error
    for params, first.adapter in zip(plan.draws, cycle(adapters), strict=False):
        runner.leave([row for row in rows if runner.has(row)])
        first.sampling = row_sampling(params, vocab_len)
        runner.join(first)
        _decode(runner, plan.num_tokens)
    runner.leave([row for row in rows if runner.has(row)])
    if plan.with_rules:
        first.sampling, first.rule = row_sampling(SamplingParams(), vocab_len, num_top=MOST_LOGPROBS), _Everything()
    runner.join(first)
    _decode(runner, 1)
    first.rule = None
    for num_rows in plan.row_counts:
        while len(rows) < num_rows:
            length = runner.usable_prefix(first, len(prompt) - 1)
            if length < 1:
                return False  # these caches cannot be cut, so there are no others without another prefill
            other = _new_row(prompt[: length + 1])
            other.adapter = [None, *adapters][len(rows) % (1 + len(adapters))]
            other.sampling = row_sampling(plan.draws[len(rows) % len(plan.draws)], vocab_len)
            other.caches, other.cache_len = runner.fork(first, length), length
            rows.append(other)
            runner.join(other)
        _decode(runner, plan.num_tokens)
    runner.land()
    return True


def _decode(runner: Runner, num_tokens: int) -> None:
    for _ in range(num_tokens):
        for row, outcome in runner.step().items():
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is not None:
                assert not isinstance(outcome, list), "nothing is guessed for rows without a lease"
                row.answer.append(outcome.token)


class _Everything:
    """A rule that allows all tokens, by a mask."""

    is_complete = False

    def fill(self, mask: Mask) -> bool:
        mask[:] = 0xFFFFFFFF
        return True

    def accept(self, token: int) -> None:
        """Nothing."""


class _Nobody:
    """Reads no events, for there are none."""

    def put(self, event: Event) -> None:
        """Nothing."""


def _new_row(prompt: list[int]) -> Generation:
    return Generation(Request("warm-up", ()), _Nobody(), 0.0, prompt=list(prompt), max_answer_len=1 << 30)
