"""Linear layers of a model on a CPU, multiplied by the native kernels straight from the weights as they are stored.

Expanding weights to float32 takes up to eight times their memory and, in a decode step, as much of its bandwidth; MLX's
own products of quantised and 16-bit weights are many times slower on a CPU. Layers that the kernels cannot take (other
classes, shapes or kinds of quantisation) are left to weights.expand.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np

from turboquant_kv.backends.native.backend import isa_choice, load_kernels
from turboquant_kv.backends.native.linear import BITS, GROUPS, MXFP4, UNIT, NativeWeights, Quantised

nn: Any = mlx.nn  # whose stubs say too little
Module = Any  # one of its modules
log = logging.getLogger(__name__)

_TRIED_ROWS = 3
_MOST_ERROR = 1e-3  # between a product and MLX's own, of the results' size: that of inputs of 16 bits is a tenth of it


@dataclass(frozen=True, slots=True)
class NativeLinears:
    """Which layers of a model the kernels multiply."""

    kinds: dict[str, int]  # "4-bit": number of layers
    num_bytes: int
    level: str

    def __str__(self) -> str:
        counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(self.kinds.items()))
        return f"multiplied as stored: {counts} (cpu-native/{self.level})"


class NativeLayer(nn.Module):  # type: ignore[misc]
    """A layer whose arrays the kernels hold. They are no parameters: nothing else may convert them."""

    def __init__(self, layer: Module) -> None:
        super().__init__()
        self._held = {name: value for name, value in layer.items() if isinstance(value, mx.array)}
        self._quantised = _quantised_of(layer)
        self.weights = _weights_of(layer)
        self.kind = _kind(layer), self.weights.num_out, self.weights.num_in

    @property
    def num_bytes(self) -> int:
        """Of all its arrays, and of what the kernels hold beside them."""
        return sum(int(a.nbytes) for a in self._held.values()) + self.weights.own_bytes


class NativeLinear(NativeLayer):
    """A linear layer multiplied by the kernels."""

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in) to (..., out) float32."""
        return self.weights.multiply(x)


class NativeEmbedding(NativeLayer):
    """A table of embeddings whose output side, where a model uses it as such, is multiplied by the kernels."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """tokens (...) to their rows, (..., width) float32."""
        return self.weights.look_up(tokens)

    def as_linear(self, x: mx.array) -> mx.array:
        """x (..., width) to (..., rows of the table) float32."""
        return self.weights.multiply(x)


def native_candidates(model: Module) -> list[Module]:
    """The model's layers that the kernels take."""
    return [child for _, _, child in _replaceable(model)]


def install_native_linears(model: Module) -> NativeLinears | None:
    """Replace a model's linear layers in place; None, and nothing is changed, where there are none to replace.

    One layer of each kind is compared with MLX's own product first. A model that then cannot compute a token (it looks
    into its layers, say) gets its own layers back.
    """
    kernels, _ = load_kernels()
    if kernels is None:
        return None
    found = list(_replaceable(model))
    if not found:
        return None
    for linear in {_kind(child): child for _, _, child in found}.values():
        if not _is_right(linear):
            log.warning("native linear layers: %s differs from MLX's own product and is left to MLX", _kind(linear))
            found = [(parent, name, child) for parent, name, child in found if _kind(child) != _kind(linear)]
    kinds, num_bytes = Counter[str](), 0
    for parent, name, child in found:
        native = NativeEmbedding(child) if _is_embedding(child) else NativeLinear(child)
        num_bytes += native.num_bytes
        kinds[_kind(child).split(",")[0]] += 1
        setattr(parent, name, native)
    try:
        mx.eval(model(mx.array([[0]])))
    except Exception as exc:  # a model's own code, which may expect any attribute of a layer
        log.warning("native linear layers: the model does not work with them (%s) and keeps MLX's", exc)
        for parent, name, child in found:
            setattr(parent, name, child)
        return None
    return NativeLinears(dict(kinds), num_bytes, isa_choice() or kernels.isa_levels()[0]) if kinds else None


def native_bytes(model: Module) -> int:
    """Of weights that are no parameters because the kernels hold them."""
    modules = (module for _, module in model.named_modules())
    return sum(module.num_bytes for module in modules if isinstance(module, NativeLayer))


def _replaceable(model: Module) -> Iterator[tuple[Module, str, Module]]:
    for _, parent in list(model.named_modules()):
        for name, child in list(parent.items()):
            if _can_replace(child):
                yield parent, name, child


def _can_replace(child: Any) -> bool:
    kind = type(child)
    if kind in (nn.QuantizedLinear, nn.QuantizedEmbedding):
        mode, bits_and_group = getattr(child, "mode", "affine"), (child.bits, child.group_size)
        is_known = mode == "affine" and child.bits in BITS and child.group_size in GROUPS
        is_known = is_known or (mode == "mxfp4" and bits_and_group == MXFP4)
        width = child.weight.shape[-1] * 32 // child.bits
        return is_known and child.weight.ndim == 2 and width % UNIT == 0 and width % child.group_size == 0
    if kind in (nn.Linear, nn.Embedding):
        weight = child.weight
        return weight.dtype in (mx.float16, mx.bfloat16) and weight.ndim == 2 and weight.shape[1] % UNIT == 0
    return False


def _is_embedding(child: Module) -> bool:
    return type(child) in (nn.Embedding, nn.QuantizedEmbedding)


def _quantised_of(child: Module) -> Quantised | None:
    if "scales" not in child:
        return None
    return Quantised(child.scales, child.get("biases"), child.bits, child.group_size)


def _weights_of(child: Module) -> NativeWeights:
    return NativeWeights(child.weight, _quantised_of(child), child.get("bias"))


def _kind(child: Module) -> str:
    if "scales" in child and child.get("biases") is None:
        return "mxfp4"
    if "scales" in child:
        return f"{child.bits}-bit, groups of {child.group_size}, {child.scales.dtype}"
    return str(child.weight.dtype).removeprefix("mlx.core.")


def _is_right(child: Module) -> bool:
    """Whether the kernels' product is MLX's own, but for rounding."""
    weight, quantised = child.weight, _quantised_of(child)
    if quantised is not None:
        weight = quantised.dense(weight)
    x = mx.random.normal((_TRIED_ROWS, weight.shape[1]), key=mx.random.key(0))
    wanted = x @ weight.astype(mx.float32).T
    if "bias" in child:
        wanted = wanted + child.bias.astype(mx.float32)
    got = _weights_of(child).multiply(x)
    error = np.array(mx.linalg.norm(got - wanted) / mx.linalg.norm(wanted))
    return bool(error < _MOST_ERROR)  # not for NaN
