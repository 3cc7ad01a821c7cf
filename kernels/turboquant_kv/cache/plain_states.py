"""The state of mlx-lm's own caches as numbers for a header and arrays, and back, checked on the way in.

Covers uncompressed attention, sliding windows, chunks and recurrent state of one conversation; how the
pieces are put together, and compressed layers, are serialise.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache

# A thousand tokens of a small model are about a megabyte: large enough for a file, small enough to share.
CHUNK_TOKENS = 1024

Array = npt.NDArray[Any]


class Exported(NamedTuple):
    array: Array
    dtype: str
    cut: list[int] | None


def from_mlx(x: mx.array, cut: list[int] | None = None) -> Exported:
    dtype = str(x.dtype).removeprefix("mlx.core.")
    bits = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
    return Exported(np.array(bits), dtype, cut)


def take(arrays: Iterator[mx.array]) -> mx.array:
    array = next(arrays, None)
    if array is None:
        raise ValueError("a saved cache has fewer arrays than its layers name")
    return array


def count(value: Any, most: int) -> int:
    """A whole number from a header, 0 <= n <= most."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"a saved cache's header holds {value!r} where a number up to {most} belongs")
    return value


def _check_pair(cache: Any, keys: mx.array, values: mx.array, most: int) -> None:
    """Raises ValueError unless keys and values (1, H, T, D) belong together."""
    if keys.ndim != 4 or keys.shape[0] != 1 or keys.shape[:3] != values.shape[:3] or not 0 < keys.shape[2] <= most:
        raise ValueError(f"{type(cache).__name__}: keys {keys.shape} and values {values.shape} do not belong together")
    if keys.dtype != values.dtype:
        raise ValueError(f"{type(cache).__name__}: keys are {keys.dtype}, values {values.dtype}")


def _export_plain(cache: KVCache, out: list[Exported]) -> dict[str, Any]:
    if cache.offset:
        out += [from_mlx(x, [2, CHUNK_TOKENS]) for x in cache.keys_and_values()]
    return {"offset": int(cache.offset)}


def _load_plain(layer: Mapping[str, Any], cache: KVCache, arrays: Iterator[mx.array]) -> None:
    num_tokens = count(layer["offset"], 1 << 40)
    if num_tokens == 0:
        return
    keys, values = take(arrays), take(arrays)
    _check_pair(cache, keys, values, num_tokens)
    if keys.shape[2] != num_tokens:
        raise ValueError(f"a saved cache holds {keys.shape[2]} tokens, its header says {num_tokens}")
    cache.update_and_fetch(keys, values)  # rounds the buffer up as decoding does, so that bytes stay as planned
    mx.eval(cache.keys, cache.values)


def _export_ring(cache: RotatingKVCache, out: list[Exported]) -> dict[str, Any]:
    if cache.keys is not None:
        out += [from_mlx(cache.keys), from_mlx(cache.values)]
    numbers = {"offset": cache.offset, "keep": cache.keep, "max_size": cache.max_size, "index": cache._idx}
    return {name: int(value) for name, value in numbers.items()}


def _load_ring(layer: Mapping[str, Any], cache: RotatingKVCache, arrays: Iterator[mx.array]) -> None:
    if layer["max_size"] != cache.max_size:
        raise ValueError(f"a saved window of {layer['max_size']} tokens, the model's has {cache.max_size}")
    offset = count(layer["offset"], 1 << 40)
    keep = count(layer["keep"], cache.max_size)
    if offset == 0:
        return
    keys, values = take(arrays), take(arrays)
    _check_pair(cache, keys, values, 1 << 40)
    cache.keys, cache.values, cache.offset, cache.keep = keys, values, offset, keep
    cache._idx = count(layer["index"], keys.shape[2])


def _export_state(cache: ArraysCache, out: list[Exported]) -> dict[str, Any]:
    if cache.left_padding is not None or cache.lengths is not None:
        raise ValueError("recurrent state cannot be saved in the middle of a padded prompt")
    out += [from_mlx(c) for c in cache.cache if c is not None]
    return {"present": [c is not None for c in cache.cache]}


def _load_state(layer: Mapping[str, Any], cache: ArraysCache, arrays: Iterator[mx.array]) -> None:
    if len(layer["present"]) != len(cache.cache):
        raise ValueError("a saved recurrent state has another number of parts than the model's")
    parts = [take(arrays) if is_present else None for is_present in layer["present"]]
    if any(part is not None and (part.ndim < 1 or part.shape[0] != 1) for part in parts):
        raise ValueError("a saved recurrent state is not one conversation's")
    cache.cache = parts


def _export_chunked(cache: ChunkedKVCache, out: list[Exported]) -> dict[str, Any]:
    if cache.keys is not None:
        out += [from_mlx(x) for x in cache.keys_and_values()]
    numbers = {"offset": cache.offset, "chunk_size": cache.chunk_size, "start": cache.start_position}
    return {name: int(value) for name, value in numbers.items()}


def _load_chunked(layer: Mapping[str, Any], cache: ChunkedKVCache, arrays: Iterator[mx.array]) -> None:
    if layer["chunk_size"] != cache.chunk_size:
        raise ValueError(f"a saved chunk of {layer['chunk_size']} tokens, the model's has {cache.chunk_size}")
    offset = count(layer["offset"], 1 << 40)
    start = count(layer["start"], offset)
    if offset == 0:
        return
    keys, values = take(arrays), take(arrays)
    _check_pair(cache, keys, values, offset - start)
    if keys.shape[2] != offset - start:
        raise ValueError(f"a saved chunk holds {keys.shape[2]} tokens, its header says {offset - start}")
    cache.keys, cache.values, cache.offset, cache.start_position = keys, values, offset, start


class _Codec(NamedTuple):
    export: Callable[[Any, list[Exported]], dict[str, Any]]
    load: Callable[[Mapping[str, Any], Any, Iterator[mx.array]], None]


PLAIN_CODECS: dict[type, _Codec] = {
    KVCache: _Codec(_export_plain, _load_plain),
    RotatingKVCache: _Codec(_export_ring, _load_ring),
    ArraysCache: _Codec(_export_state, _load_state),
    ChunkedKVCache: _Codec(_export_chunked, _load_chunked),
}
