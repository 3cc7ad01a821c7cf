"""A model's first layers as a model of its own: kernels depend on what a layer is like, not on how many there are.

Weights are the model's own, read as lazily as ever, so that types and quantisation are the same without a thought.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from turboquant_kv.cache.leaves import layer_numbers, leaves

LEAST_LAYERS = 2  # what lies between two layers is compiled as well


class UncuttableError(RuntimeError):
    """A model whose layers are not where mlx-lm's models have them."""


def cut_layers(model: Any) -> int:
    """Leave a lazily loaded model as few layers as have all kinds of them, the first ones; how many.

    Raises UncuttableError.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers:
        raise UncuttableError(f"{type(model).__name__} has no list of layers")
    total = len(layers)
    num_layers = min(total, max(LEAST_LAYERS, _num_needed(_kinds(model, layers))))
    holders = list(_holders(model, total))
    if not holders:
        raise UncuttableError(f"{type(model).__name__} keeps its layers where nobody looks")
    for holder, name in holders:
        holder[name] = holder[name][:num_layers]
    _tell(model, total, num_layers)
    return num_layers


def _kinds(model: Any, layers: Sequence[Any]) -> list[object]:
    """What makes layers differ, of each."""
    caches = make_prompt_cache(model)
    by_layer: dict[int, list[object]] = {}
    for cache, number in zip(leaves(caches), layer_numbers(caches), strict=True):
        by_layer.setdefault(number, []).append((type(cache).__name__, getattr(cache, "max_size", None)))
    return [repr((_kind(layer), by_layer.get(i))) for i, layer in enumerate(layers)]


def _kind(layer: Any) -> object:
    flat: Any = tree_flatten(layer.parameters())
    flags = [
        (name, type(module).__name__, sorted((k, v) for k, v in vars(module).items() if isinstance(v, bool)))
        for name, module in layer.named_modules()
    ]
    return sorted((name, a.shape, str(a.dtype)) for name, a in flat), sorted(flags, key=repr)


def _num_needed(kinds: Sequence[object]) -> int:
    """The least beginning that has all kinds."""
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def _holders(model: Any, total: int) -> Iterator[tuple[Any, str]]:
    """Modules with a list of all layers, and its name."""
    for _, module in model.named_modules():
        for name, value in list(module.items()):
            if isinstance(value, list) and len(value) == total and all(hasattr(one, "named_modules") for one in value):
                yield module, name


def _tell(model: Any, total: int, num_layers: int) -> None:
    """Let configurations say so too: caches are made by them."""
    for _, module in model.named_modules():
        for told in (module, *(getattr(module, name, None) for name in ("args", "config"))):
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
                if told is not None and getattr(told, name, None) == total:
                    setattr(told, name, num_layers)


def miniature_bytes(model: Any) -> int:
    """Of all parameters that the model has left."""
    flat: Any = tree_flatten(model.parameters())
    return sum(int(array.nbytes) for _, array in flat if isinstance(array, mx.array))
