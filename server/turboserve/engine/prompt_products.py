"""Which way a CPU multiplies prompts by weights as stored: by the kernels' integers, or as floats by OpenBLAS.

A prompt's rows are many, so that it can pay to widen weights to float32, a strip at a time, and leave the product to
OpenBLAS. Whether it does depends on CPU, shape, kind and number of rows, so each kind of layer is timed both ways when
a model is loaded, a fifth of a second in all. Steps of one token a row always take the kernels' own product, whose bits
do not depend on the rows of others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from turboquant_kv import blas
from turboquant_kv.backends.native.linear import NativeWeights
from turboserve.engine.native_linears import NativeLinear

ROW_COUNTS = (64, 256)  # 256: a prompt's usual chunk
_MOST_S = 0.2  # of all trials, about: each kind has its share
_MOST_ROUNDS = 4
_WORK = 1 << 27  # multiplications of a timed product, about: two milliseconds of a core
_OUTPUTS = (64, 256)  # of a timed product, at least and at most
_MARGIN = 0.95  # of the own kernel's time: less is not worth another arithmetic


@dataclass(frozen=True, slots=True)
class ProductTrial:
    """What one kind of layer was found to do, in multiplications and additions per nanosecond of one core."""

    kind: str  # "4-bit 1536x576"
    own: tuple[float, ...]  # for each of ROW_COUNTS
    blas: tuple[float, ...]
    dense_from: int  # rows of a sequence from which on OpenBLAS multiplies; 0: never

    def __str__(self) -> str:
        how = f"OpenBLAS from {self.dense_from} rows" if self.dense_from else "own kernel"
        pairs = zip(ROW_COUNTS, self.own, self.blas, strict=True)
        figures = ", ".join(f"{own:.0f}/{other:.0f} at {rows}" for rows, own, other in pairs)
        return f"{self.kind} {how} ({figures})"


@dataclass(frozen=True, slots=True)
class PromptProducts:
    """How a model's prompts are multiplied. `reason` says why nothing was tried, or is empty."""

    trials: tuple[ProductTrial, ...]
    reason: str = ""

    def __str__(self) -> str:
        if not self.trials:
            return f"own kernel ({self.reason})"
        return f"{'; '.join(map(str, self.trials))}: own kernel/OpenBLAS, GFLOP/s a core, by rows"


def choose_prompt_products(model: Any, setting: str) -> PromptProducts:
    """Decide how each of a model's native layers multiplies sequences of many rows. setting: of `projections`."""
    kinds: dict[tuple[str, int, int], list[NativeWeights]] = {}
    for _, module in model.named_modules():
        if isinstance(module, NativeLinear):
            kinds.setdefault(module.kind, []).append(module.weights)
    if not kinds:
        return PromptProducts((), "no layers are multiplied as stored")
    if setting == "off":
        return PromptProducts((), "as set")
    if not blas.product_address():
        return PromptProducts((), f"OpenBLAS is missing: {blas.status().reason}")
    trials = []
    for (stored, num_out, num_in), all_weights in kinds.items():
        trial = try_products(f"{stored.split(',')[0]} {num_out}x{num_in}", all_weights[0], _MOST_S / len(kinds))
        for weights in all_weights:
            weights.set_dense_from(trial.dense_from)
        trials.append(trial)
    return PromptProducts(tuple(trials))


def try_products(kind: str, weights: NativeWeights, most_s: float) -> ProductTrial:
    """Time both ways on a part of a layer's outputs, in turn; the fastest call of each counts.

    It takes longer than most_s only where one round of a shape does.
    """
    own, other = [], []
    for num_rows in ROW_COUNTS:
        least_s = _least_seconds(weights, num_rows, most_s * num_rows / sum(ROW_COUNTS))
        work = 2e-9 * num_rows * weights.num_in * _num_tried(weights, num_rows)
        own.append(work / least_s[False])
        other.append(work / least_s[True])
    return ProductTrial(kind, tuple(own), tuple(other), _first_winning(own, other))


def _least_seconds(weights: NativeWeights, num_rows: int, most_s: float) -> dict[bool, float]:
    """By whether OpenBLAS multiplied."""
    x = np.random.default_rng(0).standard_normal((num_rows, weights.num_in), np.float32)
    num_out, least_s = _num_tried(weights, num_rows), {False: np.inf, True: np.inf}
    until_s = time.perf_counter() + most_s
    for i in range(_MOST_ROUNDS):
        for by_blas in (False, True):
            began_s = time.perf_counter()
            weights.trial(x, num_out, by_blas)
            least_s[by_blas] = min(least_s[by_blas], time.perf_counter() - began_s)
        if time.perf_counter() > until_s and i:
            break
    return least_s


def _num_tried(weights: NativeWeights, num_rows: int) -> int:
    least, most = _OUTPUTS
    return min(weights.num_out, max(least, min(most, _WORK // (num_rows * weights.num_in))))


def _first_winning(own: Iterable[float], other: Iterable[float]) -> int:
    """The number of rows from which on OpenBLAS is faster at every number that was tried; 0: none."""
    first = 0
    for num_rows, ours, theirs in zip(ROW_COUNTS, own, other, strict=True):
        is_faster = _MARGIN * theirs > ours
        first = (first or num_rows) if is_faster else 0
    return first
