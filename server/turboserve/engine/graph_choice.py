"""Whether decode steps keep their graphs (turboquant_kv/cache/kept_graphs.py): tried once on the model's own batch.

Steps by kept graphs must give the logits that the model gives, and be faster by the clock; else the model's Python
builds each step's graph anew, and start-up says why. Graphs of fewer launches (fused_layers.py) must give the logits of
those without, and be faster than they are.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from turboquant_kv.cache.kept_graphs import STEPS_BEFORE, KeptGraphs
from turboquant_kv.cache.protocol import BatchRows
from turboserve.engine.fused_layers import switch_of

log = logging.getLogger(__name__)

NUM_STEPS = 6
ROUNDS = 3
MARGIN = 0.97  # of the time of steps whose graphs are built anew; less is not worth another way of running
# Of the logits' standard deviation: elementwise operations that are fused may round once less.
TOLERANCE = 0.02
TRIAL_STEPS = NUM_STEPS + STEPS_BEFORE + 2  # that a conversation has room for, so that it can be cut back afterwards


@dataclass(frozen=True, slots=True)
class GraphChoice:
    """The graphs, if there are to be any, and what decided."""

    graphs: KeptGraphs | None
    reason: str
    by_ranks: bool = False  # every rank of a divided model keeps its own

    def __str__(self) -> str:
        is_kept = self.graphs is not None or self.by_ranks
        return f"{'kept' if is_kept else 'built anew in every step'} ({self.reason})"


def refused_graphs(wanted: str, *, on_cpu: bool) -> GraphChoice | None:
    """The choice that needs no trial. wanted: auto, on or off (settings.keep_graphs)."""
    if wanted == "off":
        return GraphChoice(None, "as set")
    if wanted == "auto" and on_cpu:
        return GraphChoice(None, "a CPU's step is not bound by the host's Python")
    return None


class Ways(Protocol):
    """Both ways of running a decode step, tokens (B, 1) to logits (B, 1, V), and the way back."""

    @property
    def num_kept(self) -> int:
        """Steps that were run by kept graphs."""
        ...

    def kept(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array: ...

    def built(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array: ...

    def cut(self, batch: Sequence[Any], counts: Sequence[int]) -> None:
        """Finish what is pending, and take so many tokens off each row's end."""
        ...


class OwnWays:
    """Of a model that this process has all of."""

    def __init__(self, model: Any, graphs: KeptGraphs) -> None:
        self._model, self._graphs = model, graphs

    @property
    def num_kept(self) -> int:
        return self._graphs.num_run

    def kept(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        return self._graphs.forward(tokens, batch)

    def built(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        logits: mx.array = self._model(tokens, cache=batch)
        return logits

    def cut(self, batch: Sequence[Any], counts: Sequence[int]) -> None:
        for cache in batch:
            cache.evaluate()
            cache.trim_rows(counts)


class FewerLaunches(OwnWays):
    """Graphs with fewer launches as the kept ones, beside those of the model as mlx-lm has it."""

    def __init__(self, model: Any, fewer: KeptGraphs, graphs: KeptGraphs) -> None:
        super().__init__(model, fewer)
        self._usual = graphs

    def built(self, tokens: mx.array, batch: Sequence[Any]) -> mx.array:
        return self._usual.forward(tokens, batch)


class Tried(NamedTuple):
    """Whether kept graphs are to be used, and why."""

    is_better: bool
    reason: str


def try_graphs(model: Any, batch: Sequence[Any], num_rows: int, wanted: str) -> GraphChoice:
    """By a trial on a batch that holds `num_rows` conversations, which are afterwards as they were before.

    Raises what the model raises.
    """
    graphs = KeptGraphs(model)
    tried = try_ways(OwnWays(model, graphs), batch, num_rows, wanted)
    if not tried.is_better:
        return GraphChoice(None, tried.reason)
    switch = switch_of(model)
    if switch is None:
        return GraphChoice(graphs, tried.reason)
    fewer = KeptGraphs(model, around=switch.turned_on)
    found = _try_fewer(FewerLaunches(model, fewer, graphs), batch, num_rows)
    layers = "layers of fewer launches" if found.is_better else "layers as mlx-lm has them, with fewer launches"
    return GraphChoice(fewer if found.is_better else graphs, f"{tried.reason}; {layers} {found.reason}")


def _try_fewer(ways: FewerLaunches, batch: Sequence[Any], num_rows: int) -> Tried:
    """As `try_ways`; what raises is not used, and the conversations are as they were before."""
    before = [batch[0].length_of(row) for row in range(num_rows)]
    try:
        return try_ways(ways, batch, num_rows, "auto")
    except Exception as exc:  # a compiler's or driver's: the graphs that work are kept
        log.warning("graphs of fewer launches cannot be used", exc_info=True)
        ways.cut(batch, [batch[0].length_of(row) - length for row, length in enumerate(before)])
        return Tried(False, f"it failed: {' '.join(str(exc).split())[:300]}")


def try_ways(ways: Ways, batch: Sequence[Any], num_rows: int, wanted: str) -> Tried:
    """As `try_graphs`, of steps that are run in these ways."""
    if not all(isinstance(cache, BatchRows) for cache in batch):
        return Tried(False, "not all layers of this model are compressed")
    if trial_room(batch, num_rows) < TRIAL_STEPS:
        return Tried(False, "there was no room to try it")
    _steps(ways, ways.kept, batch, num_rows, STEPS_BEFORE + 2)  # traced, and compiled
    if not ways.num_kept:
        return Tried(False, "this model's steps cannot be described by arrays alone")
    times: dict[bool, list[float]] = {True: [], False: []}
    logits: dict[bool, mx.array] = {}
    for _ in range(ROUNDS):
        for is_kept, forward in ((True, ways.kept), (False, ways.built)):
            seconds, logits[is_kept] = _steps(ways, forward, batch, num_rows, NUM_STEPS)
            times[is_kept].append(seconds)
    expected = logits[False].astype(mx.float32)
    largest: Any = mx.abs(logits[True].astype(mx.float32) - expected).max() / mx.std(expected)
    error = float(largest.item())
    kept_s, built_s = (statistics.median(times[is_kept]) for is_kept in (True, False))
    figures = f"a step of {num_rows} rows takes {kept_s * 1e3:.1f} ms instead of {built_s * 1e3:.1f}"
    if not error <= TOLERANCE:
        return Tried(False, f"their logits differ by {error:.3f} of the spread")
    if wanted == "auto" and kept_s > MARGIN * built_s:
        return Tried(False, figures)
    return Tried(True, figures)


def trial_room(batch: Sequence[Any], num_rows: int) -> int:
    """Tokens that each of the first `num_rows` conversations can take and be cut back from.

    Of caches that are not tried it is all that a trial needs.
    """
    if not all(isinstance(cache, BatchRows) for cache in batch):
        return TRIAL_STEPS
    return min((cache.exact_room(row) for cache in batch for row in range(num_rows)), default=TRIAL_STEPS)


def _steps(
    ways: Ways,
    forward: Callable[[mx.array, Sequence[Any]], mx.array],
    batch: Sequence[Any],
    num_rows: int,
    num_steps: int,
) -> tuple[float, mx.array]:
    """Median seconds of a greedy step, the next one handed over before the last is read; and the last one's logits."""
    tokens = mx.zeros((num_rows, 1), mx.uint32)
    mx.eval(tokens)
    stamps = [time.perf_counter()]
    for _ in range(num_steps):
        logits = forward(tokens, batch)
        following = mx.argmax(logits[:, -1:], axis=-1)
        mx.async_eval(following)  # type: ignore[no-untyped-call]
        mx.eval(tokens)
        stamps.append(time.perf_counter())
        tokens = following
    mx.eval(logits)
    ways.cut(batch, [num_steps] * num_rows)
    return statistics.median(b - a for a, b in pairwise(stamps)), logits
