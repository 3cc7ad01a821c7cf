"""A model's layers divided among the ranks of a group: mlx-lm's tensor parallel models, as the rest of the engine knows
layers.

mlx-lm says which layer is cut how (`Model.shard`) and leaves classes of its own in the model. Here these become MLX's
ordinary layers again, a sum over all ranks behind those that have one: whatever is known of ordinary layers (joined
projections, native products, float32 weights on CPUs) then holds for a rank's part as well. Owns what can be divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn

from turboserve.errors import StartupError

nn: Any = mlx.nn  # whose stubs say too little
Module = Any  # one of its modules
Group = Any  # mx.distributed.Group

HEADS = ("num_attention_heads", "num_key_value_heads")
_PLAIN = {
    nn.AllToShardedLinear: nn.Linear,
    nn.QuantizedAllToShardedLinear: nn.QuantizedLinear,
    nn.ShardedToAllLinear: nn.Linear,
    nn.QuantizedShardedToAllLinear: nn.QuantizedLinear,
}
_SUMMED = (nn.ShardedToAllLinear, nn.QuantizedShardedToAllLinear)


class SummedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer of which each rank has some inputs: the sum of all ranks' products, and then the bias."""

    def __init__(self, linear: Module, bias: mx.array | None, group: Group) -> None:
        """linear: over this rank's inputs, without a bias; bias (out,), the same on every rank, or None."""
        super().__init__()
        self.linear = linear
        if bias is not None:
            self.bias = bias
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., in / ranks) to (..., out), the same on every rank."""
        y = mx.distributed.all_sum(self.linear(x), group=self._group)
        return y + self["bias"] if "bias" in self else y


def shard(model: Module, config: dict[str, Any], group: Group) -> None:
    """Keep this rank's part of the layers that mlx-lm divides, in place; weights stay lazy.

    config: the model's. Raises StartupError for a model that cannot be divided by so many ranks.
    """
    num_ranks, kind = int(group.size()), config.get("model_type", "?")
    if not hasattr(model, "shard"):
        raise StartupError(
            f"--distributed: mlx-lm cannot divide models of type {kind}: serve it on one machine, or choose another."
        )
    for name in HEADS:
        count = _of_text(config, name)
        if isinstance(count, int) and count % num_ranks:
            raise StartupError(
                f"--distributed: {count} {name.replace('_', ' ').removeprefix('num ')} cannot be divided among "
                f"{num_ranks} ranks: start a number of ranks that divides {count}."
            )
    try:
        model.shard(group)
    except (ValueError, AttributeError, TypeError) as exc:  # widths or groups of quantisation that do not divide
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise StartupError(
            f"--distributed: this model cannot be divided among {num_ranks} ranks ({reason}): start fewer."
        ) from exc
    _as_plain(model, group)


def count_heads(config: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """The configuration with a rank's share of the heads, for whoever computes KV bytes from it."""
    if num_ranks == 1:
        return config
    own = {name: config[name] // num_ranks for name in HEADS if isinstance(config.get(name), int)}
    text = config.get("text_config")
    if isinstance(text, dict):
        own["text_config"] = count_heads(text, num_ranks)
    if "head_dim" not in config and {"hidden_size", HEADS[0]} <= config.keys():
        own["head_dim"] = config["hidden_size"] // config[HEADS[0]]  # the quotient of both, which must not change
    return {**config, **own}


def _of_text(config: dict[str, Any], name: str) -> Any:
    value = config.get(name)
    return value if value is not None else (config.get("text_config") or {}).get(name)


def _as_plain(model: Module, group: Group) -> None:
    for parent, name, child in list(_sharded(model)):
        plain = _plain(child)
        if isinstance(child, _SUMMED):
            bias = plain.pop("bias", None)
            plain = SummedLinear(plain, bias, group)
        if isinstance(parent, list):
            parent[int(name)] = plain
        else:
            setattr(parent, name, plain)


def _sharded(model: Module) -> Iterator[tuple[Any, str, Module]]:
    for _, parent in model.named_modules():
        for name, child in parent.items():
            if type(child) in _PLAIN:
                yield parent, name, child
            elif isinstance(child, list):
                yield from ((child, str(i), one) for i, one in enumerate(child) if type(one) in _PLAIN)


def _plain(layer: Module) -> Module:
    """MLX's ordinary layer of the same arrays."""
    kind: Any = _PLAIN[type(layer)]
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name in ("group_size", "bits", "mode"):
        if hasattr(layer, name):
            setattr(made, name, getattr(layer, name))
    for name, array in layer.items():
        if isinstance(array, mx.array):
            made[name] = array
    return made
