"""What a model's layers keep, learnt by running a few tokens through it once.

Shared by all formats of one model. Owns the question whether the model attends through the seam;
what is done with the answer is runtime.py's business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from turboquant_kv.backends.base import LayerShape, narrower
from turboquant_kv.cache import seam as attention
from turboquant_kv.cache.leaves import layer_numbers, leaves, with_leaves
from turboquant_kv.cache.mixed_batch import PlainRows
from turboquant_kv.cache.protocol import LayerInput, UnsupportedModelError

log = logging.getLogger(__name__)

# A chunk with a causal mask, then single tokens: an update that nobody attends over shows at the next one.
_CHUNKS = ([0, 1], [2], [1])
# Both runs compute the same attention on the same exact values; half-precision models differ by rounding only.
_TOLERANCE = 0.02
_ATTENDED = (KVCache, RotatingKVCache, ChunkedKVCache)  # mlx-lm's caches of keys and values


@dataclass(frozen=True, slots=True)
class StateBytes:
    """What a cache holds that is no plain KV cache: a ring of its latest tokens, or a state of one length."""

    fixed_bytes: int = 0
    token_bytes: int = 0
    most_tokens: int = 0  # of the ring

    def bytes_for(self, num_tokens: int) -> int:
        """The most it takes once that many tokens were fed; a ring grows in steps until it is full.

        Until the step after it, a chunk of a prompt stays in a ring on top of that.
        """
        step: int = RotatingKVCache.step
        return self.fixed_bytes + self.token_bytes * min(num_tokens + step - 1, self.most_tokens)


class WindowedKVCache(KVCache):  # type: ignore[misc]  # mlx-lm has no types
    """All tokens of a layer whose ring keeps the latest alone, masked to what that ring would show."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """As mlx-lm asks for it; columns are absolute positions."""
        return super().make_mask(N, return_array=return_array, window_size=narrower(self.window, window_size))


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding-window layer that could be compressed: geometry, and keys that a query sees, its own included."""

    shape: LayerShape
    num_tokens: int


class Place(NamedTuple):
    """What the model puts into one cache of mlx-lm's own: geometry of keys and values, or parts of a recurrent state.

    Both None: the probe left the cache empty, or it is of a kind that has neither.
    """

    shape: LayerShape | None = None
    parts: tuple[tuple[tuple[int, ...], mx.Dtype] | None, ...] | None = None

    def check(self, cache: Any) -> None:
        """Raises ValueError when a cache that was restored holds what this model never puts there."""
        if isinstance(cache, _ATTENDED) and not cache.empty() and shape_of(cache) != self.shape:
            raise ValueError(f"a saved layer has the geometry {shape_of(cache)}, the model's {self.shape}")
        if isinstance(cache, ArraysCache) and not cache.empty() and _parts_of(cache) != self.parts:
            raise ValueError(f"a saved recurrent state is {_parts_of(cache)}, the model's {self.parts}")


def _place_of(cache: Any) -> Place:
    """Of a cache that holds the probe's few tokens."""
    if cache.empty():
        return Place()
    if isinstance(cache, ArraysCache):
        return Place(parts=_parts_of(cache))
    return Place(shape=shape_of(cache)) if isinstance(cache, _ATTENDED) else Place()


def _parts_of(cache: ArraysCache) -> tuple[tuple[tuple[int, ...], mx.Dtype] | None, ...]:
    return tuple(None if part is None else (part.shape, part.dtype) for part in cache.cache)


@dataclass(frozen=True, slots=True)
class ModelLayers:
    """Each cache's class, geometry of plain KV caches, and what is known of other caches' bytes.

    By place among `leaves` of the model's caches: a layer may keep several in a CacheList.
    """

    kinds: tuple[type, ...]
    shapes: tuple[LayerShape | None, ...]
    states: tuple[StateBytes, ...]  # all zero for plain KV caches
    unsupported: str | None  # why the caches that attend for themselves cannot serve this model, or None
    query_heads: tuple[int, ...] = ()  # 0 where it is not a plain KV cache
    numbers: tuple[int, ...] = ()  # the layer that each cache belongs to
    capped: tuple[bool, ...] = ()  # whether its attention scores have a cap; False where it is unknown
    windows: tuple[Window | None, ...] = ()  # of rings that can be compressed; their states say what mlx-lm's keep
    kv_heads: frozenset[int] = frozenset()  # how many any layer's attention has, rings included
    places: tuple[Place, ...] = ()  # what mlx-lm's own caches hold


def probe_layers(model: Any) -> ModelLayers:
    """Run a handful of tokens twice: through mlx-lm's caches, and through rows that attend for themselves."""
    attention.install()
    layers = make_prompt_cache(model)
    expected = _run(model, layers)
    caches = leaves(layers)
    kinds = tuple(type(cache) for cache in caches)
    shapes = tuple(shape_of(c) if type(c) is KVCache and not c.empty() else None for c in caches)
    states = tuple(_state_of(c) if shape is None else StateBytes() for c, shape in zip(caches, shapes, strict=True))
    windows = tuple(_window_of(c) for c in caches)
    watched, unsupported = _watch(model, _WatchedRows, expected, windows)
    if unsupported is not None and any(windows):  # rings stay mlx-lm's, then
        windows = (None,) * len(caches)
        watched, unsupported = _watch(model, _WatchedRows, expected, windows)
    if unsupported is not None:  # maybe as a conversation by itself; in batches its rows are computed one by one then
        alone, unsupported_alone = _watch(model, _WatchedRow, expected, windows)
        if unsupported_alone is None:
            watched, unsupported = alone, None
    if unsupported is not None:
        unsupported = _why_latent(model, shapes) or unsupported
    query_heads = tuple(c.num_query_heads if isinstance(c, _WatchedRows) else 0 for c in watched)
    capped = tuple(isinstance(c, _WatchedRows) and c.is_capped for c in watched)
    numbers = tuple(layer_numbers(layers))
    kv_heads = frozenset(shape_of(c).num_kv_heads for c in caches if isinstance(c, _ATTENDED) and not c.empty())
    places = tuple(_place_of(cache) for cache in caches)
    return ModelLayers(kinds, shapes, states, unsupported, query_heads, numbers, capped, windows, kv_heads, places)


def window_of_ring(cache: Any) -> int:
    """Keys that a query sees of a ring; 0: it is none, or one that keeps its first tokens for ever, as is mlx-lm's."""
    return int(cache.max_size) if type(cache) is RotatingKVCache and not cache.keep else 0


def _window_of(cache: Any) -> Window | None:
    """Of a ring that holds the probe's few tokens."""
    window = window_of_ring(cache)
    return Window(shape_of(cache), window) if window and not cache.empty() else None


class _WatchedRows(PlainRows):
    """Remembers what only queries tell."""

    num_query_heads = 0
    is_capped = False

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        own: int = getattr(self.rows[0], "window", 0)
        return super().make_mask(N, return_array, narrower(own, window_size) or None)

    def _attend(self, step: LayerInput) -> mx.array:
        self.num_query_heads = step.queries.shape[1]
        self.is_capped = step.cap > 0
        return super()._attend(step)


class _WatchedRow(_WatchedRows):
    """Tells its position as a single conversation's cache does."""

    @property
    def offset(self) -> int:  # type: ignore[override]  # of a batch it is an array
        return self.lengths[0]


def _watch(
    model: Any, watched: type[_WatchedRows], expected: np.ndarray[Any, Any], windows: Sequence[Window | None]
) -> tuple[list[Any], str | None]:
    """Caches that a run has filled, some of them rows that attend for themselves, and why they do not serve it."""
    empty = make_prompt_cache(model)
    caches: list[Any] = []
    for cache, window in zip(leaves(empty), windows, strict=True):
        if window is not None:
            caches.append(watched([WindowedKVCache(window.num_tokens)]))
        else:
            caches.append(watched([cache]) if type(cache) is KVCache else cache)
    return caches, _why_unsupported(model, with_leaves(empty, caches), expected)


def _why_unsupported(model: Any, caches: list[Any], expected: np.ndarray[Any, Any]) -> str | None:
    try:
        got = _run(model, caches)
    except UnsupportedModelError as exc:
        return str(exc)
    except AttributeError as exc:
        return f"this model asks its KV cache for {exc.name}, which a compressed one does not have"
    except Exception as exc:  # whatever it is: this model needs more of its caches than the common verbs
        log.debug("the model cannot use compressed caches", exc_info=True)
        return f"this model uses its KV cache as a compressed one cannot be used ({type(exc).__name__})"
    error = np.linalg.norm(np.nan_to_num(got - expected))
    if error <= _TOLERANCE * np.linalg.norm(np.nan_to_num(expected)):
        return None
    return "this model does not attend over its keys and values as it caches them, so they cannot be compressed"


def _why_latent(model: Any, shapes: Sequence[LayerShape | None]) -> str | None:
    """Of a model with multi-head latent attention: that its caches hold something else than keys and values."""
    parts = (model, getattr(model, "language_model", None))
    ranks = {getattr(getattr(part, "args", None), "kv_lora_rank", None) for part in parts} - {None, 0}
    if not ranks:
        return None
    found = next((s for s in shapes if s is not None and s.num_kv_heads == 1 and s.k_dim in ranks), None)
    size = f", {found.k_dim + found.v_dim} numbers for each token and layer," if found is not None else ""
    return (
        f"this model caches latents{size} from which it computes keys and values (multi-head latent attention), "
        "and there is no compressed format for latents"
    )


def _run(model: Any, caches: list[Any]) -> np.ndarray[Any, Any]:
    """Last logits (vocab,) after all chunks."""
    for chunk in _CHUNKS:
        logits = model(mx.array([chunk]), cache=caches)
        mx.eval(logits)
    return np.array(logits[0, -1].astype(mx.float32))


def _state_of(cache: Any) -> StateBytes:
    """From a cache that holds the probe's few tokens."""
    if cache.empty():
        return StateBytes()
    if isinstance(cache, RotatingKVCache):
        held = cache.keys.shape[2]
        return StateBytes(token_bytes=int(cache.keys.nbytes + cache.values.nbytes) // held, most_tokens=cache.max_size)
    if isinstance(cache, ChunkedKVCache):
        shape, most = shape_of(cache), int(cache.chunk_size) + cache.step
        return StateBytes(token_bytes=shape.raw_token_bytes, most_tokens=most)
    return StateBytes(fixed_bytes=int(cache.nbytes))


def shape_of(cache: Any) -> LayerShape:
    """Geometry of a plain cache that holds something."""
    return LayerShape(cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3], cache.keys.dtype)
