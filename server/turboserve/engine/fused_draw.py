"""Drawing tokens on a GPU: one kernel for all rows (turboquant_kv/backends/gpu/draw_kernel.py), after a trial.

The same draw as the operations of sampling.py and weighted_draw.py: the kernel's 2^x may differ from MLX's in its last
place, which hardly any draw shows. A device is tried once per vocabulary and type of logits, by the first draw, which
is the warm-up's. A kernel that does not compile, draws other tokens or is slower leaves it to operations, and the log
says so.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from turboquant_kv.backends.gpu.draw_kernel import MOST_ROWS, DrawKernels, DrawShape, draw_array
from turboquant_kv.backends.gpu.source import Dialect
from turboserve.engine.weighted_draw import draw_weighted
from turboserve.messages import SamplingParams

log = logging.getLogger(__name__)

TRIAL_ROWS = 32
TRIAL_ROUNDS = 5
MOST_DIFFERENT = 1  # of the trial's rows: a token on the edge of a cut may fall on either side


class Verdict(NamedTuple):
    """What draws from logits of one shape, and why."""

    kernels: DrawKernels | None
    reason: str


def device_dialect() -> Dialect | None:
    """Of the device that draws; None where that is a CPU."""
    if mx.default_device() == mx.Device(mx.cpu):
        return None
    return "metal" if mx.metal.is_available() else "cuda"


@cache
def device_kernels(dialect: Dialect) -> DrawKernels:
    return DrawKernels(dialect)


_verdicts: dict[tuple[Dialect, DrawShape], Verdict] = {}
_tries = True


def verdict_for(vocab_len: int, dtype: mx.Dtype) -> Verdict:
    """What draws from such logits on this device: on a GPU by a trial, which the first call makes."""
    dialect, shape = device_dialect(), DrawShape(vocab_len, dtype)
    if dialect is None:
        return Verdict(None, "a CPU draws")
    if (dialect, shape) not in _verdicts:
        found = _verdicts[dialect, shape] = _tried(device_kernels(dialect), shape)
        if found.kernels is None:
            log.warning("tokens of a vocabulary of %d are drawn by MLX operations: %s", vocab_len, found.reason)
    return _verdicts[dialect, shape]


@contextmanager
def untried_draws() -> Iterator[None]:
    """Within it this process draws by operations and tries nothing."""
    global _tries
    before, _tries = _tries, False
    try:
        yield
    finally:
        _tries = before


def draws_line() -> str:
    """For start-up lines and statistics: what draws on this device."""
    if device_dialect() is None:
        return "on the CPU"
    lines = {f"{'one kernel' if v.kernels is not None else 'MLX operations'} ({v.reason})" for v in _verdicts.values()}
    return "; ".join(sorted(lines)) or "not tried yet"


def _tried(kernels: DrawKernels, shape: DrawShape) -> Verdict:
    if not kernels.has_kernel(shape):
        return Verdict(None, f"there is no kernel for {shape.dtype} logits of {shape.vocab_len} tokens")
    try:
        return _compared(kernels, shape)
    except Exception as exc:  # a compiler's or driver's: requests are answered without the kernel
        return Verdict(None, f"the kernel failed: {' '.join(str(exc).split())[:300]}")


def _compared(kernels: DrawKernels, shape: DrawShape) -> Verdict:
    """Random rows, drawn in all ways by both."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(0, 3, (TRIAL_ROWS, shape.vocab_len)).astype(np.float32)
    logits = mx.array(drawn).astype(shape.dtype)
    params = [
        SamplingParams(temperature=(0.0, 1.0, 0.7)[i % 3], top_p=(1.0, 0.95, 0.5)[i // 3 % 3], min_p=0.05 * (i % 2))
        for i in range(TRIAL_ROWS)
    ]
    numbers = rng.integers(0, 1 << 32, TRIAL_ROWS, np.uint32)
    rows = FusedDraw(kernels, params, 1e-6)
    octaves, log2_min_p, top_p = (mx.array(rows.params[:, i : i + 1]) for i in range(3))

    def by_kernel() -> list[mx.array]:
        return list(rows.draw(logits, numbers))

    def by_operations() -> list[mx.array]:
        floats = logits.astype(mx.float32)
        best = mx.argmax(floats, axis=-1, keepdims=True)
        best_logit = mx.take_along_axis(floats, best, axis=-1)
        number = mx.array(numbers[:, None])
        tokens = draw_weighted(floats, best_logit, number, mx.maximum(octaves, 1e-6), log2_min_p, top_p)
        is_broken = (mx.sum(floats != floats, axis=-1) > 0) | ~(mx.abs(best_logit[:, 0]) < float("inf"))
        return [mx.where(octaves > 0, tokens, best.astype(mx.uint32))[:, 0], is_broken]

    (tokens, broken), (expected, _) = ([np.array(x) for x in draw()] for draw in (by_kernel, by_operations))
    num_different = int((tokens != expected).sum())
    if num_different > MOST_DIFFERENT or broken.any():
        return Verdict(None, f"the kernel drew {num_different} of {TRIAL_ROWS} tokens wrong")
    kernel_s, operations_s = _times(by_kernel, by_operations)
    figures = f"{TRIAL_ROWS} rows in {kernel_s * 1e3:.2f} ms, by MLX operations in {operations_s * 1e3:.2f}"
    return Verdict(kernels if kernel_s < operations_s else None, figures)


def _times(*draws: Callable[[], list[mx.array]]) -> list[float]:
    """Median seconds of each, in turns."""
    seconds: list[list[float]] = [[] for _ in draws]
    for _ in range(TRIAL_ROUNDS):
        for draw, found in zip(draws, seconds, strict=True):
            began = time.perf_counter()
            mx.eval(*draw())
            found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


class FusedDraw:
    """Parameters of a batch's rows as the kernel takes them; top-k is not among them."""

    def __init__(self, kernels: DrawKernels, params: Sequence[SamplingParams], min_temperature: float) -> None:
        """A temperature of 0 takes the likeliest token; others are min_temperature at least."""
        self._kernels = kernels
        self.params = np.array(
            [
                (
                    math.log2(math.e) / max(p.temperature, min_temperature) if p.temperature > 0 else 0.0,
                    math.log2(p.min_p) if p.min_p > 0 else -math.inf,
                    min(p.top_p, 1.0),
                )
                for p in params
            ],
            np.float32,
        )
        """(R, 3), of DrawKernels.draw."""
        self._array = draw_array(self.params)

    def draw(self, logits: mx.array, numbers: npt.NDArray[np.uint32]) -> tuple[mx.array, mx.array]:
        """Tokens (R,) uint32 from adjusted logits (R, V) and random numbers (R,), and which (R,) mean nothing."""
        return self._kernels.draw(logits, self._array, draw_array(numbers))


def fused_draw(params: Sequence[SamplingParams], logits: mx.array, min_temperature: float) -> FusedDraw | None:
    """For rows of these parameters, whatever their top-k; None where operations draw."""
    if not _tries or len(params) > MOST_ROWS or device_dialect() is None:
        return None
    kernels = verdict_for(logits.shape[-1], logits.dtype).kernels
    return None if kernels is None else FusedDraw(kernels, params, min_temperature)
