"""Decoder layers on a GPU whose decode steps take three quarters of the launches, each of which the host pays for.

Two changes to layers as mlx-lm has them (Llama, Mistral, Qwen2, Qwen3 and their like), neither of which touches what is
computed:

- A residual is added and the sum normalised in one launch (turboquant_kv/backends/gpu/norm_kernel.py), at both ends of
  the MLP. The norm that follows, the next layer's or the model's last, finds its result there.
- Queries and keys of one token, joined as they come from their projections (projections.py), are rotated in one launch.

Layers are known by their structure, believed when their steps give what mlx-lm's give, and kept when those are faster.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import mlx.nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turboquant_kv.backends.gpu.norm_kernel import NormKernels, NormShape
from turboquant_kv.cache.seam import scaled_dot_product_attention
from turboserve.engine.fused_draw import device_dialect
from turboserve.engine.projections import JoinedProjections, ProjectionPart

nn: Any = mlx.nn  # whose stubs say too little
Module = Any  # one of its modules
log = logging.getLogger(__name__)

MOST_ROWS = 512  # of a step; a pass over prompts is not bound by launches
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "rope"}
_TRIED = (3, 2)  # conversations of the steps that are compared, and tokens that they hold
_TIMED_ROWS, _STEPS, _ROUNDS = 8, 6, 5  # of the steps that are timed
_MARGIN = 0.97  # of the usual way's time: less is not worth another way
# Of the results' size. One operation rounds where MLX's two do; the square root is not MLX's own.
_TOLERANCE = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class FusedLayers:
    """How many of a model's layers were changed."""

    num_fused: int
    num_rotated: int  # of them, whose queries and keys are rotated together
    reason: str

    def __str__(self) -> str:
        if not self.num_fused:
            return f"as mlx-lm has them ({self.reason})"
        rotated = f", {self.num_rotated} rotating queries and keys together" if self.num_rotated else ""
        return f"{self.num_fused} add and normalise in one launch{rotated} ({self.reason})"


class Switch:
    """Whether the layers of one model take their new ways."""

    def __init__(self) -> None:
        self.is_on = True


class Handed:
    """What a norm will be asked for next, computed by the addition before it. One thread only."""

    def __init__(self) -> None:
        self._rows: mx.array | None = None
        self._normed: mx.array | None = None

    def put(self, rows: mx.array, normed: mx.array) -> None:
        self._rows, self._normed = rows, normed

    def take(self, rows: mx.array) -> mx.array | None:
        """The norm of these very rows, once."""
        if self._rows is not rows:
            return None
        found, self._rows, self._normed = self._normed, None, None
        return found


class Additions:
    """A layer's two additions, each with the norm behind it."""

    def __init__(self, kernels: NormKernels, switch: Switch, inner: Module, following: Module) -> None:
        """inner: the layer's norm between its halves; following: the one behind the layer, with a Handed of its own."""
        self._kernels, self._switch = kernels, switch
        self._inner, self._following = inner, following

    def takes(self, x: mx.array) -> bool:
        """Whether a step's rows (B, T, W) are few, and of the norms' type."""
        is_short = self._switch.is_on and x.ndim == 3 and x.shape[0] * x.shape[1] <= MOST_ROWS
        return is_short and x.dtype == self._inner.weight.dtype == self._following.weight.dtype

    def middle(self, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        """x + y, and its norm."""
        return self._add(x, y, self._inner)

    def last(self, x: mx.array, y: mx.array) -> mx.array:
        """x + y; whoever asks the following norm for it finds it computed."""
        total, normed = self._add(x, y, self._following)
        self._following._handed.put(total, normed)
        return total

    def _add(self, x: mx.array, y: mx.array, norm: Module) -> tuple[mx.array, mx.array]:
        if y.dtype != x.dtype:
            total = x + y
            return total, norm(total)
        return self._kernels.add(x, y, norm.weight, norm.eps)


# --- the classes that layers, norms and attention get: their own with another call


@lru_cache(maxsize=32)
def _layer_class(cls: Any) -> Any:
    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not self._additions.takes(x):
            return cast(mx.array, cls.__call__(self, x, mask, cache))
        total, normed = self._additions.middle(x, self.self_attn(self.input_layernorm(x), mask, cache))
        return cast(mx.array, self._additions.last(total, self.mlp(normed)))

    return _with_call(cls, call)


@lru_cache(maxsize=32)
def _norm_class(cls: Any) -> Any:
    def call(self: Any, x: mx.array) -> mx.array:
        found = self._handed.take(x)
        return cast(mx.array, cls.__call__(self, x)) if found is None else found

    return _with_call(cls, call)


@lru_cache(maxsize=32)
def _attention_class(cls: Any) -> Any:
    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if cache is None or x.ndim != 3 or x.shape[1] != 1 or not self._switch.is_on:
            return cast(mx.array, cls.__call__(self, x, mask, cache))
        num_rows, num_turned = x.shape[0], self.n_heads + self.n_kv_heads
        product = self._joined.linear(x)
        dim = product.shape[-1] // (num_turned + self.n_kv_heads)
        turned = product[..., : num_turned * dim].reshape(num_rows, num_turned, 1, dim)
        turned = self.rope(turned, offset=cache.offset)
        values = product[..., num_turned * dim :].reshape(num_rows, self.n_kv_heads, 1, dim)
        queries = turned[:, : self.n_heads]
        keys, values = cache.update_and_fetch(turned[:, self.n_heads :], values)
        out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return cast(mx.array, self.o_proj(out.reshape(num_rows, 1, self.n_heads * dim)))

    return _with_call(cls, call)


def _with_call(cls: Any, call: Any) -> Any:
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__})


# --- which layers


def choose_fused_layers(model: Module, setting: str) -> FusedLayers:
    """Change a model's layers where its steps are faster by it, on this device. setting: of `projections`."""
    dialect = device_dialect()
    if setting == "off":
        return FusedLayers(0, 0, "as set")
    if dialect is None:
        return FusedLayers(0, 0, "a CPU's step is not bound by launches")
    return fuse_where_it_pays(model, NormKernels(dialect), always=setting == "on")


def fuse_where_it_pays(model: Module, kernels: NormKernels, *, always: bool = False) -> FusedLayers:
    """As `choose_fused_layers`, with these kernels. always: whether being right is enough."""
    layers = list(getattr(model, "layers", None) or ())
    last_norm = getattr(getattr(model, "model", None), "norm", None)
    if not layers or not _has_kernel(last_norm) or not all(map(_has_structure, layers)):
        return FusedLayers(0, 0, "another structure")
    switch = Switch()
    changed = _Changed()
    num_rotated = _change(layers, last_norm, kernels, switch, changed)
    try:
        wrong = _what_is_wrong(layers, switch)
        times = None if wrong else _times(model, switch)
    except Exception as exc:  # a compiler's or driver's: the model works without
        wrong, times = f"a kernel failed: {' '.join(str(exc).split())[:300]}", None
    mx.clear_cache()
    if times is None:
        log.warning("decoder layers stay as mlx-lm has them: %s", wrong)
        changed.undo()
        return FusedLayers(0, 0, wrong)
    fused_s, usual_s = times
    figures = f"a step of {_TIMED_ROWS} rows takes {fused_s * 1e3:.1f} ms instead of {usual_s * 1e3:.1f}"
    if not always and fused_s > _MARGIN * usual_s:
        changed.undo()
        return FusedLayers(0, 0, figures)
    switch.is_on = True
    return FusedLayers(len(layers), num_rotated, figures)


class _Changed:
    """Modules whose class was changed."""

    def __init__(self) -> None:
        self._classes: list[tuple[Module, type[Any]]] = []

    def change(self, module: Module, changed: Callable[[Any], Any], **attributes: object) -> None:
        """changed: from its class to the new one. attributes: no arrays, which would be parameters."""
        cls: Any = type(module)
        self._classes.append((module, cls))
        for name, value in attributes.items():
            setattr(module, name, value)
        module.__class__ = changed(cls)

    def undo(self) -> None:
        for module, cls in self._classes:
            module.__class__ = cls


def _change(
    layers: Sequence[Module], last_norm: Module, kernels: NormKernels, switch: Switch, changed: _Changed
) -> int:
    """Change all layers and their norms; returns how many rotate queries and keys together."""
    num_rotated = 0
    following = [*(layer.input_layernorm for layer in layers[1:]), last_norm]
    for layer, norm in zip(layers, following, strict=True):
        additions = Additions(kernels, switch, layer.post_attention_layernorm, norm)
        changed.change(norm, _norm_class, _handed=Handed())
        changed.change(layer, _layer_class, _additions=additions)
        joined = _joined_of(layer.self_attn)
        if joined is not None:
            attention = layer.self_attn
            changed.change(attention, _attention_class, _joined=joined, _switch=switch)
            num_rotated += 1
    return num_rotated


def _has_structure(layer: Any) -> bool:
    """Whether a layer's modules are those of a plain decoder layer; what it does with them is tried."""
    parts = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if not isinstance(layer, nn.Module) or set(layer.children()) != parts:
        return False
    return _has_kernel(layer.input_layernorm) and _has_kernel(layer.post_attention_layernorm)


def _has_kernel(norm: Any) -> bool:
    return type(norm) is nn.RMSNorm and NormKernels.has_kernel(NormShape(norm.weight.size, norm.weight.dtype, norm.eps))


def _joined_of(attention: Any) -> JoinedProjections | None:
    """What computes queries, keys and values together, if nothing but a rotation stands between it and the cache."""
    if set(attention.children()) != _ATTENTION:
        return None
    if not all(hasattr(attention, name) for name in ("n_heads", "n_kv_heads", "scale")):
        return None
    parts = [attention[name] for name in ("q_proj", "k_proj", "v_proj")]
    if any(type(part) is not ProjectionPart for part in parts):
        return None
    joined: JoinedProjections = parts[0].joined
    widths = [attention.n_heads, attention.n_kv_heads, attention.n_kv_heads]
    return joined if joined.has_parts(parts) and joined.is_split_as(widths) else None


# --- the trial


def _what_is_wrong(layers: Sequence[Module], switch: Switch) -> str:
    """How a layer's steps differ from mlx-lm's by more than rounding; "" if none does."""
    for i, layer in enumerate(layers):
        norm = layer._additions._following
        dtype, width = norm.weight.dtype, norm.weight.size
        found: dict[bool, list[mx.array]] = {}
        for switch.is_on in (False, True):
            cache = KVCache()
            held = mx.random.normal((_TRIED[0], _TRIED[1], width), key=mx.random.key(2 * i)).astype(dtype)
            outputs = [layer(held, "causal", cache)]
            for step in range(2):
                x = mx.random.normal((_TRIED[0], 1, width), key=mx.random.key(2 * i + 1 + step)).astype(dtype)
                outputs.append(layer(x, None, cache))
            found[switch.is_on] = [rows for out in outputs for rows in (out, norm(out))]
            mx.eval(found[switch.is_on])
        for usual, fused in zip(found[False], found[True], strict=True):
            wanted = usual.astype(mx.float32)
            error: Any = mx.linalg.norm(fused.astype(mx.float32) - wanted) / mx.linalg.norm(wanted)
            if not error.item() <= _TOLERANCE[dtype]:  # nor where it is no number
                return f"layer {i} differs from mlx-lm's own by {error.item():.4f} of its results"
    return ""


def _times(model: Module, switch: Switch) -> tuple[float, float]:
    """Median seconds of a step, by the new ways and by mlx-lm's; one is handed over before the last is read."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for i in range(_ROUNDS + 1):
        for switch.is_on in (True, False):
            cache = make_prompt_cache(model)
            tokens = mx.zeros((_TIMED_ROWS, 1), mx.uint32)
            stamps = []
            for _ in range(_STEPS):
                following = mx.argmax(model(tokens, cache=cache)[:, -1:], axis=-1)
                mx.async_eval(following)  # type: ignore[no-untyped-call]
                mx.eval(tokens)
                stamps.append(time.perf_counter())
                tokens = following
            mx.eval(tokens)
            if i:  # the first round compiles
                seconds[switch.is_on].append(statistics.median(b - a for a, b in pairwise(stamps)))
    return statistics.median(seconds[True]), statistics.median(seconds[False])
