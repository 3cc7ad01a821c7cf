"""Decoder layers of a model on a CPU, whose norms, projections, rotation and MLP native kernels compute in two calls.

Between its products a decode step of a small model is tens of operations a layer on a few thousand numbers, and each of
them, and each wait for a product, costs MLX more than the numbers do. Layers are known by their structure (what Llama,
Mistral, Qwen2 and Qwen3 have in common) and believed only when they give what mlx-lm's own layer gives. Attention stays
whatever the cache says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import KVCache
from mlx_lm.models.rope_utils import Llama3RoPE, SuScaledRoPE, YarnRoPE

from turboquant_kv.backends.native.block import BlockShape, NativeBlock, Norms
from turboquant_kv.cache.layer_cache import CompressedCache
from turboquant_kv.cache.seam import scaled_dot_product_attention
from turboserve.engine.native_linears import NativeLinear

nn: Any = mlx.nn  # whose stubs say too little
Module = Any  # one of its modules
Floats = npt.NDArray[np.float32]
log = logging.getLogger(__name__)

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_FAR = 1000  # a position at which it shows which dims turn together
_TRIED = ((2, 3, 0), (2, 1, 5))  # sequences, tokens and position of the steps that are compared
_BY_POSITION = (nn.RoPE, Llama3RoPE, SuScaledRoPE, YarnRoPE)  # a position turns alike, whatever stands around it
_SPAN, _MOST_SPANS = 64, 256  # positions that are asked for together, and how many such spans are kept: 4 MiB at D = 64
_MOST_ERROR = 1e-3  # of the results' size; the products' own is a tenth of it


@dataclass(frozen=True, slots=True)
class NativeBlocks:
    """How many of a model's layers the kernels compute."""

    num_native: int
    num_layers: int
    reason: str  # why the others are left to mlx-lm
    has_steps: bool = False  # whether a step of one token a row is one call (native_model.py)

    def __str__(self) -> str:
        if not self.num_native:
            return f"by mlx-lm ({self.reason})"
        rest = f"; {self.reason}" if self.num_native < self.num_layers else ""
        steps = ", a token's step in one call" if self.has_steps else ""
        return f"{self.num_native} of {self.num_layers} by the CPU kernels, around attention{rest}{steps}"


class LayerCall:
    """What a decoder layer computes with; `turns` is shared by the layers that turn alike."""

    def __init__(self, block: NativeBlock, turns: Turns, scale: float) -> None:
        self.block, self.turns, self.scale = block, turns, scale

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """As mlx-lm's layers: x (B, T, W) float32 to (B, T, W)."""
        rows: Floats = np.ascontiguousarray(np.asarray(x))
        q, k, v = self.block.inputs(rows, self.turns.of(cache.offset, x.shape[1]))
        if isinstance(cache, CompressedCache):
            attended = cache.attend_floats(q, k, v, scale=self.scale, mask=mask)
            if attended is not None:
                return mx.array(self.block.outputs(rows, attended))
        queries = mx.array(q)
        keys, values = cache.update_and_fetch(mx.array(k), mx.array(v))
        out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return mx.array(self.block.outputs(rows, np.asarray(out)))


class Turns:
    """What a rope module does at the positions of a step, asked once for all layers. One thread only."""

    def __init__(self, rope: Module, dim: int, num_pairs: int, *, is_interleaved: bool) -> None:
        """dim: of a head; the pairs as BlockShape has them."""
        self._rope = rope
        probe = np.ones(dim, np.float32)
        probe[(np.arange(num_pairs) * 2 + 1) if is_interleaved else np.arange(num_pairs, 2 * num_pairs)] = 0
        self._probe = mx.array(probe)
        self._latest: tuple[tuple[int | bytes, int], Floats] | None = None  # of which step, and the answer
        self._spans: dict[int, Floats] = {}

    def of(self, offset: int | mx.array, num_tokens: int) -> Floats:
        """(1 or B, T, D) for tokens from these positions on: one number, or (B,) of them."""
        # By value: caches may move an array of positions in place. Looking at one that is computed takes a microsecond.
        where = (np.array(offset).tobytes() if isinstance(offset, mx.array) else offset), num_tokens
        if self._latest is not None and self._latest[0] == where:
            return self._latest[1]
        batch = offset.size if isinstance(offset, mx.array) else 1
        turned = self._rope(mx.broadcast_to(self._probe, (batch, 1, num_tokens, self._probe.size)), offset=offset)
        turn: Floats = np.array(turned.astype(mx.float32))[:, 0]
        self._latest = where, turn
        return turn

    def rows(self, positions: Sequence[int]) -> Floats:
        """(B, D) for one token at each of these positions."""
        if type(self._rope) not in _BY_POSITION:
            offset = positions[0] if len(positions) == 1 else mx.array(list(positions), dtype=mx.int32)
            return self.of(offset, 1)[:, 0]
        found = [self._span(position // _SPAN)[position % _SPAN] for position in positions]
        return found[0][None] if len(found) == 1 else np.stack(found)

    def _span(self, number: int) -> Floats:
        """(_SPAN, D) for the positions from number * _SPAN on; the latest spans are kept."""
        span = self._spans.pop(number, None)
        if span is None:
            span = self.of(number * _SPAN, _SPAN)[0]
            if len(self._spans) >= _MOST_SPANS:
                del self._spans[next(iter(self._spans))]
        self._spans[number] = span  # the last one to be given up
        return span


def install_native_blocks(model: Module) -> NativeBlocks:
    """Let the kernels compute those of a model's layers that they can, linear layers of which are native already.

    A layer of each kind is compared with mlx-lm's own first, at several positions, alone and beside another row.
    """
    layers = list(getattr(model, "layers", None) or ())
    known: dict[Any, bool] = {}
    turns: dict[Any, Turns] = {}
    found = []
    reason = "linear layers or a structure that the kernels do not take"
    for layer in layers:
        native = _native(layer, turns) if _has_structure(layer) else None
        if native is None:
            continue
        kind = _kind(layer)
        if kind not in known:
            known[kind] = _is_right(layer, native)
            if not known[kind]:
                reason = f"{type(layer).__name__} differs from mlx-lm's own"
                log.warning("native decoder layers: %s and is left to it", reason)
        if known[kind]:
            found.append((layer, native))
    for layer, native in found:
        layer._native = native
        cls: Any = type(layer)
        layer.__class__ = _native_class(cls)
    return NativeBlocks(len(found), len(layers), reason)


@lru_cache(maxsize=32)
def _native_class(cls: type[Any]) -> type[Any]:
    """A layer's class whose call goes to the kernels where they can take it."""

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if cache is None or x.ndim != 3 or x.dtype != mx.float32:
            return cast(mx.array, cls.__call__(self, x, mask, cache))
        return cast(mx.array, self._native(x, mask, cache))

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _has_structure(layer: Any) -> bool:
    """Whether a layer's modules are those of a plain decoder layer; what it does with them, `_is_right` finds out."""
    if not isinstance(layer, nn.Module) or set(layer.children()) != _PARTS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if set(attention.children()) - {"q_norm", "k_norm"} != {*_PROJECTIONS, "rope"} or set(mlp.children()) != {*_GATED}:
        return False
    linears = [attention[name] for name in _PROJECTIONS] + [mlp[name] for name in _GATED]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *(attention[n] for n in _head_norms(attention))]
    has_numbers = all(hasattr(attention, name) for name in ("n_heads", "n_kv_heads", "scale"))
    return has_numbers and all(type(m) is NativeLinear for m in linears) and all(type(m) is nn.RMSNorm for m in norms)


def _head_norms(attention: Module) -> list[str]:
    return [name for name in ("q_norm", "k_norm") if name in attention]


def _native(layer: Module, turns: dict[Any, Turns]) -> LayerCall | None:
    """None for a rotation that is none of pairs, or shapes that do not fit."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention[name].weights for name in _PROJECTIONS] + [mlp[name].weights for name in _GATED]
    dim, v_dim = linears[0].num_out // attention.n_heads, linears[2].num_out // attention.n_kv_heads
    pairs = _pairs(attention.rope, dim)
    if pairs is None:
        return None
    shape = BlockShape(attention.n_heads, attention.n_kv_heads, dim, v_dim, *pairs)

    def norm(module: Module) -> tuple[mx.array, float]:
        return module.weight, float(module.eps)

    head_norms = {name: norm(attention[name]) for name in _head_norms(attention)}
    norms = Norms(
        norm(layer.input_layernorm),
        norm(layer.post_attention_layernorm),
        head_norms.get("q_norm"),
        head_norms.get("k_norm"),
    )
    try:
        block = NativeBlock(linears, norms, shape)
    except ValueError as exc:
        log.info("native decoder layers: %s", exc)
        return None
    key = (_rope_kind(attention.rope), dim)
    if key not in turns:
        turns[key] = Turns(attention.rope, dim, pairs[0], is_interleaved=pairs[1])
    return LayerCall(block, turns[key], float(attention.scale))


def _pairs(rope: Module, dim: int) -> tuple[int, bool] | None:
    """How many pairs of dims turn, and whether they are neighbours; None where it is not the first dims that do."""
    turned = np.array(rope(mx.eye(dim)[None, :, None], offset=_FAR))[0, :, 0]
    reached = np.abs(turned - np.diag(np.diag(turned))) > 0
    num_pairs = int(reached.sum()) // 2
    for is_interleaved in (False, True):
        j = np.arange(num_pairs)
        first, second = (2 * j, 2 * j + 1) if is_interleaved else (j, j + num_pairs)
        expected = np.zeros((dim, dim), bool)
        if num_pairs and int(second[-1]) >= dim:
            return None
        expected[first, second] = expected[second, first] = True
        if np.array_equal(reached, expected):
            return num_pairs, is_interleaved
    return None


def _rope_kind(rope: Module) -> Any:
    """Equal for modules that turn alike."""
    numbers = tuple(
        sorted((name, value) for name, value in vars(rope).items() if isinstance(value, (int, float, bool)))
    )
    arrays = tuple((name, np.array(value).tobytes()) for name, value in rope.items() if isinstance(value, mx.array))
    held = tuple((n, np.array(v).tobytes()) for n, v in vars(rope).items() if isinstance(v, mx.array))
    return type(rope), numbers, arrays, held


def _kind(layer: Module) -> Any:
    """Equal for layers of which one is tried for all."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention[name].kind for name in _PROJECTIONS] + [mlp[name].kind for name in _GATED]
    numbers = attention.n_heads, attention.n_kv_heads, float(attention.scale), tuple(_head_norms(attention))
    return type(layer), type(attention), type(mlp), tuple(linears), numbers, _rope_kind(attention.rope)


def _is_right(layer: Module, native: LayerCall) -> bool:
    """Whether the kernels give what the layer itself gives, step after step over one cache."""
    width = layer.input_layernorm.weight.size
    own, ours = KVCache(), KVCache()
    for i, (batch, num_tokens, _) in enumerate(_TRIED):
        x = mx.random.normal((batch, num_tokens, width), key=mx.random.key(i))
        mask = "causal" if num_tokens > 1 else None
        wanted, got = layer(x, mask, own), native(x, mask, ours)
        if not bool(mx.linalg.norm(got - wanted) <= _MOST_ERROR * mx.linalg.norm(wanted)):  # not for NaN
            return False
    return True
