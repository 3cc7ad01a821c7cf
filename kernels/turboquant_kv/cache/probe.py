"""What a model's layers keep, learnt by running a few tokens through it once.

Shared by all formats of one model. Owns the question whether the model attends through the seam;
what is done with the answer is runtime.py's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.cache import seam as attention
from turboquant_kv.cache.mixed_batch import PlainRows
from turboquant_kv.cache.protocol import LayerInput, UnsupportedModelError

# A chunk with a causal mask, then single tokens: an update that nobody attends over shows at the next one.
_CHUNKS = ([0, 1], [2], [1])
# Both runs compute the same attention on the same exact values; half-precision models differ by rounding only.
_TOLERANCE = 0.02

UNBOUNDED = 1 << 40  # tokens; a plain cache in a list of caches has no ring's limit


@dataclass(frozen=True, slots=True)
class StateBytes:
    """What a layer keeps that is no plain KV cache: a ring of its latest tokens, a state of one length, or both."""

    fixed_bytes: int = 0
    token_bytes: int = 0
    most_tokens: int = 0  # of the ring

    def bytes_for(self, num_tokens: int) -> int:
        """The most it takes once that many tokens were fed; a ring grows in steps until it is full.

        Until the step after it, a chunk of a prompt stays in a ring on top of that.
        """
        step: int = RotatingKVCache.step
        return self.fixed_bytes + self.token_bytes * min(num_tokens + step - 1, self.most_tokens)


@dataclass(frozen=True, slots=True)
class ModelLayers:
    """Each layer's cache class, geometry of plain KV caches, and what is known of other caches' bytes."""

    kinds: tuple[type, ...]
    shapes: tuple[LayerShape | None, ...]
    states: tuple[StateBytes, ...]  # all zero for plain KV caches
    unsupported: str | None  # why the caches that attend for themselves cannot serve this model, or None
    query_heads: tuple[int, ...] = ()  # of each layer; 0 where it is not a plain KV cache
    capped: tuple[bool, ...] = ()  # whether each layer's attention scores have a cap; False where it is unknown


def probe_layers(model: Any) -> ModelLayers:
    """Run a handful of tokens twice: through mlx-lm's caches, and through rows that attend for themselves."""
    attention.install()
    caches = make_prompt_cache(model)
    expected = _run(model, caches)
    kinds = tuple(type(cache) for cache in caches)
    shapes = tuple(shape_of(c) if type(c) is KVCache and not c.empty() else None for c in caches)
    states = tuple(_state_of(c) if shape is None else StateBytes() for c, shape in zip(caches, shapes, strict=True))
    watched = [_WatchedRows([c]) if type(c) is KVCache else c for c in make_prompt_cache(model)]
    unsupported = _why_unsupported(model, watched, expected)
    query_heads = tuple(c.num_query_heads if isinstance(c, _WatchedRows) else 0 for c in watched)
    capped = tuple(isinstance(c, _WatchedRows) and c.is_capped for c in watched)
    return ModelLayers(kinds, shapes, states, unsupported, query_heads, capped=capped)


class _WatchedRows(PlainRows):
    """Remembers what only queries tell."""

    num_query_heads = 0
    is_capped = False

    def _attend(self, step: LayerInput) -> mx.array:
        self.num_query_heads = step.queries.shape[1]
        self.is_capped = step.cap > 0
        return super()._attend(step)


def _why_unsupported(model: Any, caches: list[Any], expected: np.ndarray[Any, Any]) -> str | None:
    try:
        got = _run(model, caches)
    except UnsupportedModelError as exc:
        return str(exc)
    except Exception as exc:  # whatever it is: this model needs more of its caches than the common verbs
        return f"this model uses its KV cache in a way of its own ({exc!r}); serve it with --kv-format f16"
    error = np.linalg.norm(np.nan_to_num(got - expected))
    if error <= _TOLERANCE * np.linalg.norm(np.nan_to_num(expected)):
        return None
    return (
        "this model does not attend over its keys and values as they are cached (latent attention, for one), "
        "so they cannot be compressed; serve it with --kv-format f16"
    )


def _run(model: Any, caches: list[Any]) -> np.ndarray[Any, Any]:
    """Last logits (vocab,) after all chunks."""
    for chunk in _CHUNKS:
        logits = model(mx.array([chunk]), cache=caches)
        mx.eval(logits)
    return np.array(logits[0, -1].astype(mx.float32))


def _state_of(cache: Any) -> StateBytes:
    """From a cache that holds the probe's few tokens."""
    if isinstance(cache, CacheList):
        parts = [_state_of(c) for c in cache.caches]
        most = max((p.most_tokens for p in parts), default=0)  # from above: the longest ring for all
        return StateBytes(sum(p.fixed_bytes for p in parts), sum(p.token_bytes for p in parts), most)
    if cache.empty():
        return StateBytes()
    if isinstance(cache, RotatingKVCache):
        held = cache.keys.shape[2]
        return StateBytes(token_bytes=int(cache.keys.nbytes + cache.values.nbytes) // held, most_tokens=cache.max_size)
    if isinstance(cache, KVCache):  # inside a list
        shape = shape_of(cache)
        return StateBytes(token_bytes=shape.raw_token_bytes, most_tokens=UNBOUNDED)
    return StateBytes(fixed_bytes=int(cache.nbytes))


def shape_of(cache: Any) -> LayerShape:
    """Geometry of a plain cache that holds something."""
    return LayerShape(cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3], cache.keys.dtype)
