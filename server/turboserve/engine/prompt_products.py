"""Which way a CPU multiplies prompts by weights as stored: by the kernels' integers, or as floats by OpenBLAS.

A prompt's rows are many, so that it can pay to widen weights to float32, a strip at a time, and leave the product to
OpenBLAS. Whether it does depends on CPU, shape and kind, so each kind of layer is timed both ways when a model is
loaded, a fifth of a second in all. OpenBLAS gets blocks of DENSE_ROWS rows, counted from the first row on, and the
kernels get what is left of a prompt and steps of one token a row: so no row's bits depend on the rows of others, as
long as prompts are read in chunks of whole blocks (`prompt_block`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from turboquant_kv import blas
from turboquant_kv.backends.native.linear import DENSE_ROWS, NativeWeights
from turboserve.engine.native_linears import NativeLinear

NUM_ROWS = 256  # that are tried: a prompt's usual chunk
_MOST_S = 0.2  # of all trials, about: each kind has its share
_MOST_ROUNDS = 4
_WORK = 1 << 27  # multiplications of a timed product, about: two milliseconds of a core
_OUTPUTS = (64, 256)  # of a timed product, at least and at most
_MARGIN = 0.95  # of the own kernel's time: less is not worth another arithmetic


@dataclass(frozen=True, slots=True)
class ProductTrial:
    """What one kind of layer was found to do, in multiplications and additions per nanosecond of one core."""

    kind: str  # "4-bit 1536x576"
    own: float
    blas: float

    @property
    def is_dense(self) -> bool:
        """Whether OpenBLAS multiplies: where it is enough faster to be worth another arithmetic."""
        return _MARGIN * self.blas > self.own

    def __str__(self) -> str:
        return f"{self.kind} {'OpenBLAS' if self.is_dense else 'own kernel'} ({self.own:.0f}/{self.blas:.0f})"


@dataclass(frozen=True, slots=True)
class PromptProducts:
    """How a model's prompts are multiplied. `reason` says why nothing was tried, or is empty."""

    trials: tuple[ProductTrial, ...]
    reason: str = ""

    def __str__(self) -> str:
        if not self.trials:
            return f"own kernel ({self.reason})"
        return f"{'; '.join(map(str, self.trials))}: own kernel/OpenBLAS, GFLOP/s a core"

    @property
    def choices(self) -> tuple[str, ...]:
        """What was chosen where there was a choice, without what was measured: other choices round otherwise."""
        return tuple(f"{trial.kind} by OpenBLAS" for trial in self.trials if trial.is_dense)

    @property
    def prompt_block(self) -> int:
        """Tokens in multiples of which a prompt is read, but for its last chunk, so that company changes no row's bits.

        Prompts that are padded to one length have as many such blocks each.
        """
        return DENSE_ROWS if any(trial.is_dense for trial in self.trials) else 1


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
            weights.set_dense(trial.is_dense)
        trials.append(trial)
    return PromptProducts(tuple(trials))


def try_products(kind: str, weights: NativeWeights, most_s: float) -> ProductTrial:
    """Time both ways on a part of a layer's outputs, in turn; the fastest call of each counts.

    It takes longer than most_s only where one round of a shape does.
    """
    least_s = _least_seconds(weights, most_s)
    work = 2e-9 * NUM_ROWS * weights.num_in * _num_tried(weights)
    return ProductTrial(kind, work / least_s[False], work / least_s[True])


def _least_seconds(weights: NativeWeights, most_s: float) -> dict[bool, float]:
    """By whether OpenBLAS multiplied."""
    x = np.random.default_rng(0).standard_normal((NUM_ROWS, weights.num_in), np.float32)
    num_out, least_s = _num_tried(weights), {False: np.inf, True: np.inf}
    until_s = time.perf_counter() + most_s
    for i in range(_MOST_ROUNDS):
        for by_blas in (False, True):
            began_s = time.perf_counter()
            weights.trial(x, num_out, by_blas)
            least_s[by_blas] = min(least_s[by_blas], time.perf_counter() - began_s)
        if time.perf_counter() > until_s and i:
            break
    return least_s


def _num_tried(weights: NativeWeights) -> int:
    least, most = _OUTPUTS
    return min(weights.num_out, max(least, min(most, _WORK // (NUM_ROWS * weights.num_in))))
