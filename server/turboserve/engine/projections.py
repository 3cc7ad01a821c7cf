"""Linear layers arranged for decode steps on a GPU, where a small model's step is bound by launches and not by bytes.

Two changes, neither of which touches what is computed:

- Projections of one input (queries, keys and values; gate and up) become one product over joined weights. Models call
  them one after another with the same array; the first call computes all, the others take their part.
- A step of several rows multiplies row by row in one launch (a batch of matrix-vector products). MLX gives such a step
  to a library whose call costs the host three times as much as a launch of its own, and which rounds a row differently
  in another batch; row by row each row's products are the same in any batch.

Whether either pays depends on device and shapes, so both are timed at start-up on the model's own shapes
(`choose_projections`), and what does not pay is left as mlx-lm made it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn

nn: Any = mlx.nn  # whose stubs say too little
Module = Any  # one of its modules
# Names of a module's children that models call with one and the same input.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ROW_COUNTS = (2, 8, 32, 64)  # at which rows one by one are tried
_CHAIN = 24  # products of a timed chain: launches, not waiting, are what is compared
_ROUNDS = 5
_MARGIN = 0.95  # of the usual way's time: less is not worth another arrangement


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What was done to a model's linear layers."""

    num_joined: int  # groups of projections that are one product now
    most_rows: int  # of a step that multiplies row by row; 0: none does
    reason: str

    def __str__(self) -> str:
        parts = []
        if self.num_joined:
            parts.append(f"{self.num_joined} groups joined")
        if self.most_rows:
            parts.append(f"steps of up to {self.most_rows} rows multiply row by row")
        return f"{', '.join(parts) or 'as loaded'} ({self.reason})"

    @property
    def choices(self) -> tuple[str, ...]:
        """What was chosen where there was a choice, without what was measured: other choices round otherwise."""
        return (
            (f"{self.num_joined} joined, by rows up to {self.most_rows}",) if self.num_joined or self.most_rows else ()
        )


class RowLinear(nn.Module):  # type: ignore[misc]
    """A linear layer whose decode steps of up to `most_rows` rows multiply row by row, in one launch."""

    def __init__(self, weight: mx.array, bias: mx.array | None, most_rows: int) -> None:
        """weight (out, in), bias (out,) or None."""
        super().__init__()
        self.weight = weight
        if bias is not None:
            self.bias = bias
        self.most_rows = most_rows

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) to (..., out)."""
        weight = self["weight"]
        if x.ndim == 3 and x.shape[1] == 1 and x.shape[0] <= self.most_rows:
            num_rows, _, width = x.shape
            y = mx.matmul(weight, x.reshape(num_rows, width, 1)).reshape(num_rows, 1, weight.shape[0])
            return y + self["bias"] if "bias" in self else y
        return mx.addmm(self["bias"], x, weight.T) if "bias" in self else x @ weight.T


class JoinedProjections:
    """Several projections of one input as one product. One thread only."""

    def __init__(self, linear: Module, widths: Sequence[int]) -> None:
        """linear: over the joined weights; widths: of the parts, in their order."""
        self.linear, self.num_parts = linear, len(widths)
        self._ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
        self._input: mx.array | None = None
        self._parts: list[mx.array] = []
        self._missing: set[int] = set()

    def part(self, x: mx.array, index: int) -> mx.array:
        """The part of the product of x. What is computed is kept until each part was taken once."""
        if self._input is not x or index not in self._missing:
            self._input, self._parts = x, list(mx.split(self.linear(x), self._ends, axis=-1))
            self._missing = set(range(self.num_parts))
        taken = self._parts[index]
        self._missing.discard(index)
        if not self._missing:
            self.forget()
        return taken

    def is_split_as(self, shares: Sequence[int]) -> bool:
        """Whether the parts' widths are in these proportions."""
        ends, total = [0, *self._ends, _width(self.linear)], sum(shares)
        return all((b - a) * total == ends[-1] * share for (a, b), share in zip(pairwise(ends), shares, strict=True))

    def has_parts(self, modules: Sequence[ProjectionPart]) -> bool:
        """Whether these are all of its parts, in order."""
        own = [module._index for module in modules if module.joined is self]
        return own == list(range(self.num_parts)) and len(own) == len(modules)

    def apart(self) -> list[Module]:
        """The projections by themselves again."""
        arrays = {name: mx.split(self.linear[name], self._ends) for name in _array_names(self.linear)}
        return [_like(self.linear, {name: parts[i] for name, parts in arrays.items()}) for i in range(self.num_parts)]

    @property
    def is_holding(self) -> bool:
        """Whether parts of the latest product were never asked for."""
        return bool(self._missing)

    def forget(self) -> None:
        """Keep no activations alive."""
        self._input, self._parts, self._missing = None, [], set()


class ProjectionPart(nn.Module):  # type: ignore[misc]
    """One of several joined projections. The first of them owns the weights, as the model's parameters."""

    def __init__(self, joined: JoinedProjections, index: int) -> None:
        super().__init__()
        self.joined, self._index = joined, index
        if index == 0:
            self.linear = joined.linear

    def __call__(self, x: mx.array) -> mx.array:
        return self.joined.part(x, self._index)


def arrange_projections(model: Module, *, join: bool, most_rows: Callable[[Module], int], reason: str) -> Arrangement:
    """Rearrange a model's linear layers in place; weights are evaluated, so that no copy outlives its layer.

    most_rows: of a step that is to multiply row by row, for a linear layer; 0 for none. reason: for the record. Layers
    of other classes than MLX's own (adapters, for one) stay. Groups that the model does not ask for all parts of are
    taken apart again.
    """
    groups = _join(model) if join else []
    unasked = _unasked(model, groups)
    for parent, names, joined in unasked:
        for name, linear in zip(names, joined.apart(), strict=True):
            setattr(parent, name, linear)
    most = 0
    for parent, name, linear in list(_plain_linears(model)):
        rows = most_rows(linear)
        if rows:
            most = max(most, rows)
            by_rows = RowLinear(linear.weight, linear.get("bias"), rows)
            setattr(parent, name, by_rows)
            if isinstance(parent, ProjectionPart):
                parent.joined.linear = by_rows
    return Arrangement(len(groups) - len(unasked), most, reason)


Group = tuple[Module, tuple[str, ...], JoinedProjections]  # the parent, its children's names, and what they are now


def _join(model: Module) -> list[Group]:
    groups = []
    for parent, names in _joinable(model):
        joined = _joined([parent[name] for name in names])
        mx.eval(joined.linear.parameters())  # at once: the others' memory is given back layer by layer
        for i, name in enumerate(names):
            setattr(parent, name, ProjectionPart(joined, i))
        groups.append((parent, names, joined))
    return groups


def _joinable(model: Module) -> list[tuple[Module, tuple[str, ...]]]:
    """Modules with the names of those of their children that can be joined."""
    parents = [module for _, module in model.named_modules()]
    return [(parent, names) for parent in parents for names in JOINED if _can_join([parent.get(n) for n in names])]


def _can_join(linears: Sequence[Any]) -> bool:
    """Whether these are linear layers of MLX's own that differ in nothing but their number of outputs."""
    first = linears[0]
    if any(type(linear) not in (nn.Linear, nn.QuantizedLinear) for linear in linears):
        return False

    def kind(linear: Any) -> object:
        arrays = sorted((name, str(a.dtype), a.shape[1:]) for name, a in linear.items() if isinstance(a, mx.array))
        return type(linear), arrays, [getattr(linear, name, None) for name in ("bits", "group_size", "mode")]

    return all(kind(linear) == kind(first) for linear in linears)


def _width(linear: Module) -> int:
    return int(linear["weight"].shape[0])


def _joined(linears: Sequence[Module]) -> JoinedProjections:
    arrays = {name: mx.concatenate([linear[name] for linear in linears]) for name in _array_names(linears[0])}
    return JoinedProjections(_like(linears[0], arrays), [_width(linear) for linear in linears])


def _array_names(linear: Module) -> list[str]:
    return [name for name, value in linear.items() if isinstance(value, mx.array)]


def _like(linear: Module, arrays: Mapping[str, mx.array]) -> Module:
    """A layer of the same kind with these arrays."""
    kind: Any = type(linear)
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name in ("group_size", "bits", "mode"):
        if hasattr(linear, name):
            setattr(made, name, getattr(linear, name))
    for name, array in arrays.items():
        made[name] = array
    return made


def _unasked(model: Module, groups: Sequence[Group]) -> list[Group]:
    """Groups of which one pass of a token does not ask for all parts."""
    if not groups:
        return []
    mx.eval(model(mx.array([[0]])))
    found = [(parent, names, joined) for parent, names, joined in groups if joined.is_holding]
    for _, _, joined in found:
        joined.forget()
    return found


def _plain_linears(model: Module) -> Iterator[tuple[Module, str, Module]]:
    for _, parent in model.named_modules():
        for name, child in parent.items():
            if type(child) is nn.Linear:
                yield parent, name, child


def choose_projections(model: Module, wanted: str, agree: Callable[[bool], bool] = bool) -> Arrangement:
    """Arrange the model as it is faster on this device. wanted: auto, on or off (settings.projections).

    agree: from this rank's verdict on joining to that of all ranks, whose passes have to be the same.
    """
    if wanted == "off":
        return Arrangement(0, 0, "as set")
    if mx.default_device().type == mx.DeviceType.cpu:
        if wanted == "auto":
            return Arrangement(0, 0, "a CPU's step is not bound by launches")
        return arrange_projections(model, join=True, most_rows=lambda _: 0, reason="as set")
    known: dict[tuple[tuple[int, ...], mx.Dtype], int] = {}

    def most_rows(linear: Module) -> int:
        kind = linear.weight.shape, linear.weight.dtype
        if kind not in known:
            out, width = linear.weight.shape
            known[kind] = most_rows_by_trial(out, width, linear.weight.dtype)
        return known[kind]

    join = wanted == "on" or agree(joining_pays(model))
    reason = "joined as set, rows by trial" if wanted == "on" else "by trial"
    return arrange_projections(model, join=join, most_rows=most_rows, reason=reason)


def most_rows_by_trial(out: int, width: int, dtype: mx.Dtype) -> int:
    """Up to how many rows a step is faster row by row, with weights (out, width); 0 if with none."""
    weight = mx.random.normal((out, width)).astype(dtype)
    by_rows, usual = RowLinear(weight, None, max(ROW_COUNTS)), RowLinear(weight, None, 0)
    best = 0
    for num_rows in ROW_COUNTS:
        x = mx.random.normal((num_rows, 1, width)).astype(dtype)
        mx.eval(x, weight)
        if not _is_faster(partial(by_rows, x), partial(usual, x)):
            break
        best = num_rows
    return best


def joining_pays(model: Module) -> bool:
    """Whether one product is faster than the first group's several, in a step of eight rows."""
    found = _joinable(model)
    if not found:
        return False
    parent, names = found[0]
    linears = [parent[name] for name in names]
    joined = _joined(linears)
    x = _input_of(linears[0], num_rows=8)
    mx.eval(joined.linear.parameters(), x)
    return _is_faster(
        lambda: [joined.part(x, i) for i in range(joined.num_parts)],
        lambda: [linear(x) for linear in linears],
    )


def _input_of(linear: Any, num_rows: int) -> mx.array:
    """A step's input (num_rows, 1, in) of random numbers."""
    is_quantised = isinstance(linear, nn.QuantizedLinear)
    width = linear.weight.shape[1]
    if is_quantised:
        width = width * 32 // linear.bits
    dtype = linear.scales.dtype if is_quantised else linear.weight.dtype
    if not mx.issubdtype(dtype, mx.floating):  # scales of some quantisations are bytes
        dtype = mx.float16
    return mx.random.normal((num_rows, 1, width)).astype(dtype)


def _is_faster(tried: Callable[[], Any], usual: Callable[[], Any]) -> bool:
    """By the clock, of chains in turn: launches and arithmetic, whichever is the bound."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(_ROUNDS + 1):
        for is_tried, make in ((True, tried), (False, usual)):
            began_s = time.perf_counter()
            mx.eval([make() for _ in range(_CHAIN)])
            if i:  # the first round compiles
                times[is_tried].append(time.perf_counter() - began_s)
    return statistics.median(times[True]) < _MARGIN * statistics.median(times[False])
