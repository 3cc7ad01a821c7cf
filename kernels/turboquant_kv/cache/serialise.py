"""Caches of every kind as a JSON-able header and NumPy arrays, and back, bit by bit.

For stores that must not touch MLX: pages leave in the canonical layout, bfloat16 as its bits in uint16.
Nothing is executed on the way in, and whatever contradicts the header, the runtime or itself is a
ValueError. Where headers and arrays are kept is the caller's business.

    header  {"version", "format": KVFormat.to_dict() or null, "layers": [...], "arrays": [...]}
    arrays  in the order in which the layers name them, each described by {"dtype", "shape", "cut"};
            cut [axis, items]: these many items along that axis hold CHUNK_TOKENS tokens, so that equal
            beginnings of conversations have equal pieces
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList

from turboquant_kv.backends.base import CanonicalPages, ExactRows, LayerShape
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.plain_states import CHUNK_TOKENS, PLAIN_CODECS, Array, Exported, count, from_mlx, take
from turboquant_kv.cache.sequence import LayerSequence
from turboquant_kv.codec.format import KVFormat

VERSION = 1
Header = dict[str, Any]


def export_caches(caches: Sequence[Any]) -> tuple[Header, list[Array]]:
    """Header and copied arrays of one conversation's caches. Raises ValueError for a class without a known state."""
    exported: list[Exported] = []
    layers = [_export_layer(cache, exported) for cache in caches]
    fmt = next((c.source.fmt for c in caches if isinstance(c, TurboQuantKVCache)), None)
    described = [{"dtype": e.dtype, "shape": list(e.array.shape), "cut": e.cut} for e in exported]
    saved_format = None if fmt is None else fmt.to_dict()
    header = {"version": VERSION, "format": saved_format, "layers": layers, "arrays": described}
    return header, [e.array for e in exported]


def import_caches(header: Mapping[str, Any], arrays: Sequence[Array], empty: Sequence[Any]) -> list[Any]:
    """Inverse of export_caches into `empty`, new caches of the runtime that will use them.

    Raises ValueError for anything inconsistent: another version, format or model, damaged shapes.
    """
    try:
        return _import_caches(header, arrays, empty)
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as exc:
        raise ValueError(f"a saved cache's header cannot be understood: {exc!r}") from exc


def _import_caches(header: Mapping[str, Any], arrays: Sequence[Array], empty: Sequence[Any]) -> list[Any]:
    if header["version"] != VERSION:
        raise ValueError(f"a cache saved by version {header['version']!r} of this format, expected {VERSION}")
    fmt = next((c.source.fmt for c in empty if isinstance(c, TurboQuantKVCache)), None)
    saved = None if header["format"] is None else KVFormat.from_dict(header["format"])
    if saved != fmt:
        raise ValueError(f"a cache saved as {saved}, wanted as {fmt}")
    if len(header["layers"]) != len(empty):
        raise ValueError(f"a cache of {len(header['layers'])} layers, the model has {len(empty)}")
    queue = _checked(header["arrays"], arrays)
    caches = [_import_layer(layer, fresh, queue) for layer, fresh in zip(header["layers"], empty, strict=True)]
    if next(queue, None) is not None:
        raise ValueError("a saved cache has more arrays than its layers name")
    return caches


def _checked(described: Sequence[Mapping[str, Any]], arrays: Sequence[Array]) -> Iterator[mx.array]:
    """The arrays as MLX arrays, each compared with its description first."""
    if len(described) != len(arrays):
        raise ValueError(f"{len(described)} arrays are described, {len(arrays)} given")
    for entry, array in zip(described, arrays, strict=True):
        if tuple(entry["shape"]) != array.shape or _numpy_name(entry["dtype"]) != array.dtype.name:
            raise ValueError(f"an array is {array.dtype}{array.shape}, its description says {dict(entry)}")
    return (_to_mlx(array, entry["dtype"]) for entry, array in zip(described, arrays, strict=True))


def _numpy_name(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def _to_mlx(array: Array, dtype: str) -> mx.array:
    x = mx.array(array)
    return x.view(mx.bfloat16) if dtype == "bfloat16" else x


def _export_layer(cache: Any, out: list[Exported]) -> dict[str, Any]:
    if isinstance(cache, TurboQuantKVCache):
        return _export_compressed(cache, out)
    if isinstance(cache, CacheList):
        return {"kind": "CacheList", "caches": [_export_layer(c, out) for c in cache.caches]}
    codec = PLAIN_CODECS.get(type(cache))
    if codec is None:
        raise ValueError(f"caches of class {type(cache).__name__} cannot be saved")
    return {"kind": type(cache).__name__, **codec.export(cache, out)}


def _import_layer(layer: Mapping[str, Any], fresh: Any, arrays: Iterator[mx.array]) -> Any:
    kind = "compressed" if isinstance(fresh, TurboQuantKVCache) else type(fresh).__name__
    if layer["kind"] != kind:
        raise ValueError(f"a saved layer is {layer['kind']!r}, the model's is {kind!r}")
    if isinstance(fresh, TurboQuantKVCache):
        return _import_compressed(layer, fresh, arrays)
    if isinstance(fresh, CacheList):
        if len(layer["caches"]) != len(fresh.caches):
            raise ValueError("a saved layer holds another number of caches than the model's")
        parts = zip(layer["caches"], fresh.caches, strict=True)
        return CacheList(*(_import_layer(part, empty, arrays) for part, empty in parts))
    codec = PLAIN_CODECS.get(type(fresh))
    if codec is None:
        raise ValueError(f"caches of class {kind} cannot be loaded")
    codec.load(layer, fresh, arrays)
    return fresh


# Compressed layers: sink keys, sink values, four page arrays, tail keys, tail values.


def _export_compressed(cache: TurboQuantKVCache, out: list[Exported]) -> dict[str, Any]:
    sequence = cache.sequence
    if sequence is None:
        return {"kind": "compressed", "tokens": 0}
    pool = sequence.pool
    sink, pages, tail = sequence.save()

    def exact(rows: ExactRows | None) -> list[Exported]:
        if rows is None:
            return [from_mlx(mx.zeros((pool.shape.num_kv_heads, 0, d), pool.shape.dtype)) for d in dims]
        return [from_mlx(pool.backend.to_mlx(x, pool.shape.dtype)) for x in (rows.k, rows.v)]

    dims = pool.shape.k_dim, pool.shape.v_dim
    cut = [0, max(1, CHUNK_TOKENS // pool.fmt.page_tokens)]
    codes = (pages.k_codes, pages.k_scales, pages.v_codes, pages.v_scales)
    out += [*exact(sink), *(Exported(np.array(a), a.dtype.name, cut) for a in codes), *exact(tail)]
    return {"kind": "compressed", "tokens": len(sequence)}


def _import_compressed(
    layer: Mapping[str, Any], fresh: TurboQuantKVCache, arrays: Iterator[mx.array]
) -> TurboQuantKVCache:
    num_tokens = count(layer["tokens"], 1 << 40)
    if num_tokens == 0:
        return fresh
    sink_k, sink_v, *codes, tail_k, tail_v = (take(arrays) for _ in range(8))
    shape = LayerShape(sink_k.shape[0], sink_k.shape[2], sink_v.shape[2], sink_k.dtype)
    if fresh.source.pool is not None and fresh.source.pool.shape != shape:
        raise ValueError(f"a saved layer has the geometry {shape}, the model's {fresh.source.pool.shape}")
    _check_exact(fresh.source.fmt, shape, num_tokens, (sink_k, sink_v), (tail_k, tail_v), codes[0].shape[0])
    sequence = LayerSequence(fresh.source.get(shape))
    backend = sequence.pool.backend

    def exact(k: mx.array, v: mx.array, start: int) -> ExactRows | None:
        return ExactRows(start, backend.from_mlx(k), backend.from_mlx(v)) if k.shape[1] else None

    pages = CanonicalPages(*(np.array(c) for c in codes))
    sequence.load(exact(sink_k, sink_v, 0), pages, exact(tail_k, tail_v, num_tokens - tail_k.shape[1]))
    return TurboQuantKVCache(fresh.source, sequence)


def _check_exact(
    fmt: KVFormat,
    shape: LayerShape,
    num_tokens: int,
    sink: tuple[mx.array, mx.array],
    tail: tuple[mx.array, mx.array],
    num_pages: int,
) -> None:
    """Raises ValueError unless sink, pages and tail are those of a conversation of this length."""
    num_sink, num_tail = sink[0].shape[1], tail[0].shape[1]
    for (k, v), n in ((sink, num_sink), (tail, num_tail)):
        if k.shape != (shape.num_kv_heads, n, shape.k_dim) or v.shape != (shape.num_kv_heads, n, shape.v_dim):
            raise ValueError(f"exact rows are {k.shape} and {v.shape}, the layer is {shape}")
        if k.dtype != shape.dtype or v.dtype != shape.dtype:
            raise ValueError(f"exact rows are {k.dtype} and {v.dtype}, the layer is {shape}")
    held = num_sink + num_pages * fmt.page_tokens + num_tail
    if num_sink != min(num_tokens, fmt.sink_tokens) or num_tail > fmt.page_tokens or held != num_tokens:
        raise ValueError(
            f"{num_sink} first, {num_tail} last exact tokens and {num_pages} pages do not make {num_tokens} tokens"
        )
