"""Whether a GPU's fused kernels may serve a model: they are compiled, judged by their results, and timed.

Runs layers of the model's geometry and format with random contents, through the same caches that models see: once on
NumPy, whose results are right by the tests of this project, once on the fused kernels, once on MLX operations, which
serve where the kernels may not. Owns what is asked of the kernels; when it is asked, and what becomes of the answer,
is backend_choice.py's business.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import Backend, CanonicalPages, LayerShape, Means
from turboquant_kv.backends.numpy_ops.backend import NumpyBackend
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, LayerSource, TurboQuantKVCache
from turboquant_kv.cache.layer_contents import LayerContents, contents_of, restore
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import BLOCK_TOKENS

# Relative errors of attention over the same pages, as the tests of the device's kernels allow: products of halves.
TOLERANCE = {mx.float32: 2e-3, mx.float16: 4e-3, mx.bfloat16: 1e-2}
# Over pages that each side encoded itself: where rounding decides, a coordinate gets the neighbour of its code.
CODES_TOLERANCE = 2e-2
# In the random pages that decode is judged on. NumPy computes the same; longer ones are compared while they are timed.
JUDGED_TOKENS = 512
TAIL_TOKENS = 8
FEW_TOKENS = 3  # of a step that is no prefill; each number has a kernel of its own, and one is compiled for the trial

Outcome = Literal["faster", "slower", "wrong", "failed"]


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of layer: geometry, format and heads. `means` are one such layer's.

    num_layers: how many the model has, their share in the times; a case of none is judged and not timed. is_capped:
    whether attention scores have a cap.
    """

    shape: LayerShape
    fmt: KVFormat
    num_q_heads: int
    means: Means | None = None
    num_layers: int = 1
    is_capped: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What is timed: decode steps of `num_layers` layers after `lengths` tokens, `num_rounds` times on either side."""

    lengths: tuple[int, ...] = (1024, 8192)
    num_layers: int = 4  # some share what a step prepares once, as a model's layers do
    num_steps: int = 2  # between two waits for the device
    num_rounds: int = 7
    most_s: float = 0.4  # of one case and length; a round is finished, and there is at least one


class Timing(NamedTuple):
    """Seconds of one layer's decode step after `num_tokens`, on fused kernels and on MLX operations."""

    num_tokens: int
    fused_s: float
    ops_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial found, and what follows from it."""

    fused: str  # the kernels on trial: "gpu-metal"
    ops: str  # the backend that serves where they may not
    outcome: Outcome
    detail: str = ""  # of kernels that failed or are wrong: how
    error: float | None = None  # the largest relative error of those results that were judged
    timings: tuple[Timing, ...] = ()

    @property
    def is_fallback(self) -> bool:
        return self.outcome != "faster"

    @property
    def taken(self) -> str:
        """The backend that serves."""
        return self.ops if self.is_fallback else self.fused

    @property
    def line(self) -> str:
        """The verdict with its reason and figures, for people."""
        if not self.is_fallback:
            return f"{self.fused}, tried and faster than MLX operations: {self._figures}"
        reason = {
            "failed": f"its kernels do not run ({self.detail})",
            "wrong": f"its results are wrong ({self.detail})",
        }.get(self.outcome, f"it is slower here ({self._figures})")
        return f"{self.taken} instead of {self.fused}: {reason}"

    @property
    def _figures(self) -> str:
        parts = [] if self.error is None else [f"results within {self.error:.1g} of the reference"]
        parts += [
            f"a layer's decode step {t.fused_s * 1e6:,.0f} us against {t.ops_s * 1e6:,.0f} at {t.num_tokens:,} tokens"
            for t in self.timings
        ]
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Verdict:
        """Inverse of to_dict. Raises KeyError, TypeError or ValueError for anything else."""
        timings = tuple(Timing(int(n), float(fused_s), float(ops_s)) for n, fused_s, ops_s in saved["timings"])
        if saved["outcome"] not in ("faster", "slower", "wrong", "failed"):
            raise ValueError(f"{saved['outcome']!r} is no outcome of a trial")
        return cls(**{**saved, "timings": timings})


class WrongResultsError(RuntimeError):
    """A kernel computes something else than the reference."""


def try_fused(
    cases: Sequence[Case],
    new_fused: Callable[[], Backend],
    ops: Backend,
    *,
    name: str = "gpu",
    plan: Plan | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Verdict:
    """Judge and time fused kernels for these layers. Raises nothing that they raise: that is a verdict.

    name: of the kernels, until `new_fused` gives their backend. They are taken where results are right in every case
    and steps are faster than MLX operations', by the geometric mean over the plan's lengths.
    """
    plan = plan or Plan()
    try:
        fused = new_fused()
        name = fused.name
        judged = [judge(case, fused) for case in cases]
        error = max(found.error for found in judged)
        timings = _timings(
            [found.history for found in judged if found.history.case.num_layers], fused, ops, plan, clock
        )
    except WrongResultsError as exc:
        return Verdict(name, ops.name, "wrong", str(exc))
    except Exception as exc:  # whatever a compiler or a driver throws
        return Verdict(name, ops.name, "failed", f"{type(exc).__name__}: {' '.join(str(exc).split())}"[:300])
    if np.prod([t.fused_s / t.ops_s for t in timings]) < 1:
        return Verdict(name, ops.name, "faster", error=error, timings=timings)
    return Verdict(name, ops.name, "slower", error=error, timings=timings)


class Judged(NamedTuple):
    """The largest relative error of a case's results, and contents of which histories of any length can be made."""

    error: float
    history: _RandomHistory


def judge(case: Case, fused: Backend, *, is_rehearsal: bool = False) -> Judged:
    """A layer's attention on fused kernels beside NumPy's. Raises WrongResultsError where it differs too much.

    is_rehearsal: whatever comes out is right, for kernels that are to be launched and no more.

    First of a conversation that each side encodes itself: a prompt in two chunks, then few tokens, then one. Then over
    the same random pages: one query row, several, and a ragged batch.
    """
    drawn = _Drawn(case, np.random.default_rng(0))
    pools = [_pool(case, backend, 1) for backend in (NumpyBackend(), fused)]
    pair = [TurboQuantKVCache(LayerSource.of_pool(pool, 0)) for pool in pools]
    worst, page = 0.0, case.fmt.page_tokens
    of_codes, strict = (np.inf, np.inf) if is_rehearsal else (CODES_TOLERANCE, TOLERANCE[case.shape.dtype])
    for num_tokens in (case.fmt.sink_tokens + page + page // 2, page + 9, FEW_TOKENS, 1):
        what = f"a step of {num_tokens} tokens after {pair[0].offset}"
        worst = max(worst, _compare(what, pair, drawn, num_tokens, of_codes))
    assert pair[0].sequence is not None
    history = _RandomHistory(drawn, contents_of(pair[0].sequence))
    contents = history.of_length(JUDGED_TOKENS), history.of_length(JUDGED_TOKENS // 2)
    (known, other), (tried, other_tried) = ([_layers(pool, one)[0] for one in contents] for pool in pools)
    worst = max(worst, _compare("one query row", [known, tried], drawn, 1, strict))
    worst = max(worst, _compare("few query rows", [known, tried], drawn, FEW_TOKENS, strict))
    batches = [TurboQuantKVCache.merge(rows) for rows in ([known, other], [tried, other_tried])]
    return Judged(max(worst, _compare("two rows of a batch", batches, drawn, 1, strict)), history)


def rehearse(case: Case, fused: Backend, row_counts: Sequence[int] = ()) -> None:
    """Launch what a trial of the case launches, and steps of so many tokens, whatever comes out."""
    history = judge(case, fused, is_rehearsal=True).history
    for num_rows in row_counts:
        (cache,) = _layers(_pool(case, fused, 1), history.of_length(JUDGED_TOKENS))
        mx.eval(_attend(cache, history.drawn.tokens(cache.size(), num_rows), history.drawn))


def _compare(what: str, pair: Sequence[Any], drawn: _Drawn, num_tokens: int, tolerance: float) -> float:
    """The relative error of the second cache's attention, both fed the same tokens."""
    num_rows = len(pair[0].sequences) if isinstance(pair[0], BatchTurboQuantKVCache) else 1
    tokens = drawn.tokens(pair[0].size(), num_tokens, num_rows)
    want, got = (_attend(cache, tokens, drawn) for cache in pair)
    error = _check(what, got, want, tolerance)
    for cache in pair:
        cache.evaluate()
    return error


def _check(what: str, got: mx.array, want: mx.array, tolerance: float) -> float:
    """The relative error. Raises WrongResultsError where it is too large."""
    known = _floats(want)
    error = float(np.linalg.norm(_floats(got) - known) / np.linalg.norm(known))
    if not error <= tolerance:  # NaN is wrong as well
        raise WrongResultsError(f"{what}: off by {error:.2g}, allowed is {tolerance:g}")
    return error


def _timings(
    histories: Sequence[_RandomHistory], fused: Backend, ops: Backend, plan: Plan, clock: Callable[[], float]
) -> tuple[Timing, ...]:
    """Of a layer on average, each case as often as the model has it."""
    all_layers = sum(history.case.num_layers for history in histories)
    timings = []
    for num_tokens in plan.lengths:
        sums = [0.0, 0.0]
        for history in histories:
            for side, seconds in enumerate(_step_seconds(history, (fused, ops), num_tokens, plan, clock)):
                sums[side] += seconds * history.case.num_layers / all_layers
        timings.append(Timing(num_tokens, *sums))
    return tuple(timings)


def _step_seconds(
    history: _RandomHistory, backends: Sequence[Backend], num_tokens: int, plan: Plan, clock: Callable[[], float]
) -> list[float]:
    """Median seconds of a layer's decode step on each backend, in turns. Raises WrongResultsError where they differ."""
    drawn, contents = history.drawn, history.of_length(num_tokens)
    sides = [_layers(_pool(history.case, backend, plan.num_layers), contents) for backend in backends]
    tokens = drawn.tokens(num_tokens, 1)

    def run(caches: Sequence[TurboQuantKVCache]) -> mx.array:
        outputs = [_attend(cache, tokens, drawn) for _ in range(plan.num_steps) for cache in caches]
        mx.eval(outputs)
        for cache in caches:
            cache.evaluate()
        return outputs[0]

    got, want = (run(caches) for caches in sides)  # also compiles
    _check(f"{num_tokens} tokens beside MLX operations", got, want, TOLERANCE[history.case.shape.dtype])
    seconds: list[list[float]] = [[] for _ in sides]
    began = clock()
    for _ in range(plan.num_rounds):
        for found, caches in zip(seconds, sides, strict=True):
            start = clock()
            run(caches)
            found.append((clock() - start) / (plan.num_steps * plan.num_layers))
        if clock() - began > plan.most_s:
            break
    return [statistics.median(found) for found in seconds]


class _Drawn:
    """Random tokens of a layer: keys and values with the layer's means, as its model's have them.

    What stores see of keys and queries is the same whether they are balanced or not.
    """

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case, self.rng = case, rng
        longest, factors = 0.0, None
        if case.means is not None:
            longest = float(np.linalg.norm(case.means.k, axis=1).max())
            factors = case.means.key_factors
        self._factors = np.ones((case.shape.num_kv_heads, 1), np.float32) if factors is None else factors
        # Scores get a deviation of about 1, however long the mean is: a softmax of one key would hide all others.
        self.scale = 1 / float(np.sqrt(case.shape.k_dim + longest**2))
        self.cap = 1.0 if case.is_capped else 0.0  # one that such scores reach, whatever the model's

    def tokens(self, start: int, num_tokens: int, num_rows: int = 1) -> tuple[mx.array, mx.array, mx.array]:
        """The model's keys (B, H, n, D), values (B, H, n, Dv) and queries (B, Hq, n, D) of the tokens at `start`."""
        k, v, q = self._as_stored(start, num_tokens, num_rows)
        k /= self._factors[:, None]
        q *= np.repeat(self._factors, q.shape[1] // k.shape[1], axis=0)[:, None]
        keys, values, queries = (mx.array(x).astype(self.case.shape.dtype) for x in (k, v, q))
        mx.eval(keys, values, queries)
        return keys, values, queries

    def rows(self, start: int, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Keys (H, n, D) and values (H, n, Dv) of the tokens at `start` as stores have them."""
        k, v = (mx.array(x[0]).astype(self.case.shape.dtype) for x in self._as_stored(start, num_tokens)[:2])
        mx.eval(k, v)
        return k, v

    def _as_stored(self, start: int, num_tokens: int, num_rows: int = 1) -> tuple[Any, Any, Any]:
        """Keys, values and queries as stores see them, float32."""
        shape, means = self.case.shape, self.case.means
        k = self._normal(num_rows, shape.num_kv_heads, num_tokens, shape.k_dim)
        v = self._normal(num_rows, shape.num_kv_heads, num_tokens, shape.v_dim)
        if means is not None:
            first = start // BLOCK_TOKENS
            blocks = means.k_blocks(first * BLOCK_TOKENS, (start + num_tokens) // BLOCK_TOKENS + 1 - first)
            rows = np.repeat(blocks, BLOCK_TOKENS, axis=1)
            k = k + rows[:, start - first * BLOCK_TOKENS :][:, :num_tokens]
            v = v + means.v[:, None]
        q = self._normal(num_rows, self.case.num_q_heads, num_tokens, shape.k_dim)
        return k, v, q

    def _normal(self, *shape: int) -> Any:
        return self.rng.standard_normal(shape, dtype=np.float32)


class _RandomHistory:
    """Conversations of any length, made of what a short one holds: vectors of its pages in random order."""

    def __init__(self, drawn: _Drawn, short: LayerContents) -> None:
        self.drawn, self.case, self._short = drawn, drawn.case, short

    def of_length(self, num_tokens: int) -> LayerContents:
        """About `num_tokens`, less than a page more or less."""
        fmt, shape, pages = self.case.fmt, self.case.shape, self._short.pages
        num_pages = max(1, (num_tokens - fmt.sink_tokens - TAIL_TOKENS) // fmt.page_tokens)
        lead = num_pages, shape.num_kv_heads, fmt.page_tokens

        def shuffled(codes: Any, scales: Any) -> tuple[Any, Any]:
            chosen = self.drawn.rng.integers(0, scales.size, lead)
            return codes.reshape(-1, codes.shape[-1])[chosen], scales.reshape(-1)[chosen]

        keys, values = shuffled(pages.k_codes, pages.k_scales), shuffled(pages.v_codes, pages.v_scales)
        tail = self.drawn.rows(fmt.page_start(num_pages), TAIL_TOKENS)
        return LayerContents(shape, self._short.sink, CanonicalPages(*keys, *values), tail)


def _pool(case: Case, backend: Backend, num_layers: int) -> PagePool:
    return PagePool(backend, [case.shape] * num_layers, case.fmt, [case.means] * num_layers)


def _layers(pool: PagePool, contents: LayerContents) -> list[TurboQuantKVCache]:
    """One conversation in all layers of a pool, which hold the same."""
    layers = range(len(pool.shapes))
    sequence = restore(pool, dict.fromkeys(layers, contents))
    return [TurboQuantKVCache(LayerSource.of_pool(pool, i), sequence.of_layer(i)) for i in layers]


def _attend(cache: Any, tokens: tuple[mx.array, mx.array, mx.array], drawn: _Drawn) -> mx.array:
    keys, values, queries = tokens
    cache.update_and_fetch(keys, values)
    mask = None if queries.shape[2] == 1 else "causal"
    out: mx.array = cache.attend(queries, scale=drawn.scale, mask=mask, sinks=None, cap=drawn.cap)
    return out


def _floats(x: mx.array) -> Any:
    return np.array(x.astype(mx.float32))
