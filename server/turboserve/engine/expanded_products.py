"""Prompts on a GPU multiplied by quantised weights that are expanded for the time of one product.

MLX's product of quantised weights is made for the few rows of decode steps. A prompt's rows are many: there it can pay
to write the weights out in the activations' type, once for all rows, and leave the product to the device's library.
Whether it does depends on device, shape, kind and number of rows, so each kind of layer is timed both ways when a model
is loaded. The values that are multiplied are the same; sums are added in another order.

Expanded weights exist at once for no more than three products, and those of the last layer: MLX frees an array when the
device is done with what reads it, and left alone the host hands over many products ahead.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn

from turboserve.engine.device import gpu_memory_bytes, on_cpu
from turboserve.engine.projections import ProjectionPart

nn: Any = mlx.nn  # whose stubs say too little
Module = Any  # one of its modules
log = logging.getLogger(__name__)

ROW_COUNTS = (2048, 1024, 512, 256)  # of a pass over prompts; tried from the most, until one does not pay
PRODUCTS_UNDER_WAY = 2  # before the one that is built
_MEMORY_SHARE = 50  # a layer's expanded weights take no more than the device's memory by this
_MARGIN = 0.9  # of the usual way's time: less is not worth more memory
_CHAIN, _ROUNDS = 4, 3  # products of a timed chain, and chains of each way, in turns
_TOLERANCE = 0.01  # of the outputs' norm; 16-bit types differ by a few thousandths


class Pace:
    """How many products are handed over and not done. One thread only."""

    def __init__(self) -> None:
        self._under_way: deque[mx.array] = deque()

    def hand_over(self, product: mx.array) -> None:
        """Have the device begin, and wait for products long before. Raises what MLX raises."""
        mark = product[..., -1:, :1].sum()  # all that is kept of a product
        mx.async_eval(product, mark)  # type: ignore[no-untyped-call]
        self._under_way.append(mark)
        if len(self._under_way) > PRODUCTS_UNDER_WAY:
            mx.eval(self._under_way.popleft())


class ExpandingLinear(nn.QuantizedLinear):  # type: ignore[misc]
    """A quantised linear layer that expands its weights where a pass over prompts has so many rows."""

    def __init__(self, linear: Module, least_rows: int, pace: Pace | None) -> None:
        """linear: whose arrays it takes over. least_rows: from which it expands. pace: None to hand nothing over."""
        nn.Module.__init__(self)
        for name in ("group_size", "bits", "mode"):
            setattr(self, name, getattr(linear, name))
        for name, array in linear.items():
            self[name] = array
        self.least_rows, self._pace = least_rows, pace

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) to (..., out). Steps of one token a row (B, 1, in) never expand."""
        is_prompt = x.ndim > 2 and x.shape[-2] > 1
        if not is_prompt or x.size < self.least_rows * x.shape[-1]:
            product: mx.array = super().__call__(x)
            return product
        product = _expanded(self, x)
        if self._pace is not None:
            self._pace.hand_over(product)
        return product


def _expanded(linear: Module, x: mx.array) -> mx.array:
    weight = mx.dequantize(
        linear["weight"],
        scales=linear["scales"],
        biases=linear.get("biases"),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
        dtype=x.dtype,
    )
    return mx.addmm(linear["bias"], x, weight.T) if "bias" in linear else x @ weight.T


@dataclass(frozen=True, slots=True)
class ExpandedTrial:
    """What one kind of layer was found to do."""

    kind: str  # "4-bit 5120x27648"
    least_rows: int  # from which it expands; 0: never
    speeds: tuple[float, float]  # multiplications and additions a second, at the most rows: stored and expanded
    reason: str = ""  # why it never does, where that is no matter of speed

    def __str__(self) -> str:
        if self.reason:
            return f"{self.kind} as stored ({self.reason})"
        stored, expanded = (speed / 1e12 for speed in self.speeds)
        how = f"expanded from {self.least_rows} rows" if self.least_rows else "as stored"
        return f"{self.kind} {how} ({stored:.1f}/{expanded:.1f})"


@dataclass(frozen=True, slots=True)
class ExpandedProducts:
    """How a model's prompts are multiplied. reason: why nothing was tried, or empty."""

    trials: tuple[ExpandedTrial, ...]
    reason: str = ""

    def __str__(self) -> str:
        if not self.trials:
            return f"by MLX ({self.reason})"
        return f"{'; '.join(map(str, self.trials))}: stored/expanded, TFLOP/s at {ROW_COUNTS[0]} rows"

    @property
    def choices(self) -> tuple[str, ...]:
        """What was chosen where there was a choice, without what was measured: other choices round otherwise."""
        return tuple(f"{trial.kind} expanded from {trial.least_rows}" for trial in self.trials if trial.least_rows)


Judge = Callable[[float, float], bool]
"""Whether a product is worth expanding for, by its seconds with expanded weights and with stored ones."""


def choose_expanded_products(model: Module, setting: str) -> ExpandedProducts:
    """Let a model's quantised layers expand where that pays. setting: of `projections`."""
    if setting == "off":
        return ExpandedProducts((), "as set")
    if on_cpu():
        return ExpandedProducts((), "on a CPU")
    return expand_where_it_pays(model, gpu_memory_bytes() // _MEMORY_SHARE, _is_worth_it)


def expand_where_it_pays(model: Module, most_bytes: int, is_worth_it: Judge) -> ExpandedProducts:
    """As `choose_expanded_products`, on any device. most_bytes: of a layer's expanded weights."""
    trials: dict[object, ExpandedTrial] = {}
    for parent, name, linear, pace in list(_quantised_linears(model)):
        key = linear.weight.shape, linear.scales.dtype, linear.bits, linear.group_size, linear.mode, "bias" in linear
        if key not in trials:
            trials[key] = _tried(linear, most_bytes, is_worth_it)
        if trials[key].least_rows:
            expanding = ExpandingLinear(linear, trials[key].least_rows, pace)
            setattr(parent, name, expanding)
            if isinstance(parent, ProjectionPart):
                parent.joined.linear = expanding
    mx.clear_cache()  # expanded weights are not to be kept for arrays of their size
    return ExpandedProducts(tuple(trials.values()), "" if trials else "no quantised layers")


def _quantised_linears(model: Module) -> Iterator[tuple[Module, str, Module, Pace | None]]:
    """Those of MLX's own class in the model's layers, with their parents, their names, and the pace that they keep.

    The head reads no prompts. Of the last layer a prompt needs keys and values alone: MLX computes no more of it while
    nobody hands over the rest.
    """
    layers, pace = list(getattr(model, "layers", ())), Pace()
    for layer in layers:
        for _, parent in layer.named_modules():
            for name, child in parent.items():
                if type(child) is nn.QuantizedLinear:
                    yield parent, name, child, None if layer is layers[-1] else pace


def _tried(linear: Module, most_bytes: int, is_worth_it: Judge) -> ExpandedTrial:
    """One kind's trial; a device that cannot expand multiplies by the weights as stored, and the log says why."""
    out, width = linear.weight.shape[0], linear.weight.shape[1] * 32 // linear.bits
    kind = f"{linear.bits}-bit {width}x{out}"
    try:
        return _try(linear, kind, out, width, most_bytes, is_worth_it)
    except Exception as exc:  # a compiler's, a driver's, or no memory: the model works without
        reason = f"the trial failed: {' '.join(str(exc).split())[:300]}"
        log.warning("%s weights are not expanded for prompts: %s", kind, reason)
        return ExpandedTrial(kind, 0, (0.0, 0.0), reason)


def _try(linear: Module, kind: str, out: int, width: int, most_bytes: int, is_worth_it: Judge) -> ExpandedTrial:
    dtype = linear.scales.dtype
    if not mx.issubdtype(dtype, mx.floating):  # scales of some quantisations are bytes
        dtype = mx.bfloat16
    if out * width * dtype.size > most_bytes:
        return ExpandedTrial(kind, 0, (0.0, 0.0), f"its weights are more than {most_bytes >> 20} MiB")
    least, speeds = 0, (0.0, 0.0)
    for num_rows in ROW_COUNTS:
        x = mx.random.normal((1, num_rows, width)).astype(dtype)
        stored_s, expanded_s, error = _times(linear, x)
        if num_rows == ROW_COUNTS[0]:
            speeds = 2.0 * num_rows * width * out / stored_s, 2.0 * num_rows * width * out / expanded_s
        if not error <= _TOLERANCE:
            return ExpandedTrial(kind, 0, speeds, f"products differ by {error:.3f} of their norm")
        if not is_worth_it(expanded_s, stored_s):
            break
        least = num_rows
    return ExpandedTrial(kind, least, speeds)


def _times(linear: Module, x: mx.array) -> tuple[float, float, float]:
    """Seconds of a product as stored and expanded, and by how much they differ, as a share of the norm."""
    ways: tuple[Callable[[mx.array], mx.array], ...] = (linear, lambda x: _expanded(linear, x))
    found = [way(x).astype(mx.float32) for way in ways]
    error: Any = mx.linalg.norm((found[1] - found[0]).flatten()) / mx.linalg.norm(found[0].flatten())
    error_value = float(error.item())
    del found
    times: tuple[list[float], ...] = ([], [])
    for i in range(_ROUNDS + 1):
        for way, seconds in zip(ways, times, strict=True):
            began_s = time.perf_counter()
            for _ in range(_CHAIN):
                product = way(x)
                mx.async_eval(product)  # type: ignore[no-untyped-call]
            mx.eval(product)
            if i:  # the first one compiles
                seconds.append((time.perf_counter() - began_s) / _CHAIN)
    return statistics.median(times[0]), statistics.median(times[1]), error_value


def _is_worth_it(expanded_s: float, stored_s: float) -> bool:
    return expanded_s < _MARGIN * stored_s
