"""Decoder layers on a GPU whose kept graphs have a quarter fewer launches, each of which the host pays for in a step.

Two changes to layers as mlx-lm has them (Llama, Mistral, Qwen2, Qwen3 and their like), neither of which touches what is
computed:

- A residual is added and the sum normalised in one launch (turboquant_kv/backends/gpu/norm_kernel.py), at both ends of
  the MLP. The norm that follows, the next layer's or the model's last, finds its result there.
- Queries and keys of one token, joined as they come from their projections (projections.py), are rotated in one launch.

Layers are known by their structure, and believed when their steps give what mlx-lm's give. They take their new ways
only while a graph is traced that is to be kept (turboquant_kv/cache/kept_graphs.py), and graph_choice.py finds out
whether that one is faster: where Python builds each step anew, calling our kernel costs it more than the two
operations do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn
from mlx_lm.models.cache import KVCache

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
# Of the results' size. One operation rounds where MLX's two do; the square root is not MLX's own.
_TOLERANCE = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class FusedLayers:
    """How many of a model's layers can be traced with fewer launches."""

    num_fused: int
    num_rotated: int  # of them, whose queries and keys are rotated together
    reason: str = ""  # why there are none

    def __str__(self) -> str:
        if not self.num_fused:
            return f"as mlx-lm has them ({self.reason})"
        rotated = f", {self.num_rotated} rotating queries and keys together" if self.num_rotated else ""
        return f"{self.num_fused} can add and normalise in one launch{rotated}"


class Switch:
    """Whether the layers of one model take their new ways."""

    def __init__(self) -> None:
        self.is_on = False

    @contextmanager
    def turned_on(self) -> Iterator[None]:
        """While a graph is traced. One thread only."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


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
        self._kernels, self.switch = kernels, switch
        self._inner, self._following = inner, following

    def takes(self, x: mx.array) -> bool:
        """Whether a step's rows (B, T, W) are few, and of the norms' type."""
        is_short = self.switch.is_on and x.ndim == 3 and x.shape[0] * x.shape[1] <= MOST_ROWS
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


def prepare_fused_layers(model: Module, setting: str) -> FusedLayers:
    """Change a model's layers so that graphs of their steps can have fewer launches. setting: of `projections`."""
    dialect = device_dialect()
    if setting == "off":
        return FusedLayers(0, 0, "as set")
    if dialect is None:
        return FusedLayers(0, 0, "a CPU's step is not bound by launches")
    return fuse(model, NormKernels(dialect))


def fuse(model: Module, kernels: NormKernels) -> FusedLayers:
    """As `prepare_fused_layers`, with these kernels. Layers that err or fail are as they were afterwards."""
    layers = list(getattr(model, "layers", None) or ())
    last_norm = getattr(getattr(model, "model", None), "norm", None)
    if not layers or not _has_kernel(last_norm) or not all(map(_has_structure, layers)):
        return FusedLayers(0, 0, "another structure")
    switch, changed = Switch(), _Changed()
    num_rotated = _change(layers, last_norm, kernels, switch, changed)
    try:
        wrong = _what_is_wrong(layers, switch)
    except Exception as exc:  # a compiler's or driver's: the model works without
        wrong = f"a kernel failed: {' '.join(str(exc).split())[:300]}"
    if wrong:
        log.warning("decoder layers stay as mlx-lm has them: %s", wrong)
        changed.undo()
        return FusedLayers(0, 0, wrong)
    return FusedLayers(len(layers), num_rotated)


def switch_of(model: Module) -> Switch | None:
    """What turns on the new ways of a model's layers, if they have any."""
    layer = next(iter(getattr(model, "layers", None) or ()), None)
    additions = getattr(layer, "_additions", None)
    return additions.switch if isinstance(additions, Additions) else None


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
            if "_additions" in vars(module):
                del module._additions


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
        found: dict[bool, list[mx.array]] = {}
        for is_on in (False, True):
            with switch.turned_on() if is_on else nullcontext():
                found[is_on] = _steps_of(layer, norm, seed=2 * i)
            mx.eval(found[is_on])
        for usual, fused in zip(found[False], found[True], strict=True):
            wanted = usual.astype(mx.float32)
            error: Any = mx.linalg.norm(fused.astype(mx.float32) - wanted) / mx.linalg.norm(wanted)
            if not error.item() <= _TOLERANCE[norm.weight.dtype]:  # nor where it is no number
                return f"layer {i} differs from mlx-lm's own by {error.item():.4f} of its results"
    return ""


def _steps_of(layer: Module, norm: Module, seed: int) -> list[mx.array]:
    """What a layer, and the norm behind it, make of random rows: of a few tokens, then of one after the other."""
    dtype, width = norm.weight.dtype, norm.weight.size
    cache, found = KVCache(), []
    for i, (num_tokens, mask) in enumerate(((_TRIED[1], "causal"), (1, None), (1, None))):
        x = mx.random.normal((_TRIED[0], num_tokens, width), key=mx.random.key(seed + i)).astype(dtype)
        out = layer(x, mask, cache)
        found += [out, norm(out)]
    return found
