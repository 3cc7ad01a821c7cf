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

from turboquant_kv.backends.base import CanonicalPages, LayerShape
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.layer_contents import LayerContents, contents_of, restore
from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.plain_states import CHUNK_TOKENS, PLAIN_CODECS, Array, Exported, count, from_mlx, take
from turboquant_kv.codec.format import KVFormat

VERSION = 1
Header = dict[str, Any]


def export_caches(caches: Sequence[Any]) -> tuple[Header, list[Array]]:
    """Header and copied arrays of one conversation's caches. Raises ValueError for a class without a known state."""
    exported: list[Exported] = []
    layers = [_export_layer(cache, exported) for cache in caches]
    fmt = next((c.source.fmt for c in leaves(caches) if isinstance(c, TurboQuantKVCache)), None)
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
    fmt = next((c.source.fmt for c in leaves(empty) if isinstance(c, TurboQuantKVCache)), None)
    saved = None if header["format"] is None else KVFormat.from_dict(header["format"])
    if saved != fmt:
        raise ValueError(f"a cache saved as {saved}, wanted as {fmt}")
    if len(header["layers"]) != len(empty):
        raise ValueError(f"a cache of {len(header['layers'])} layers, the model has {len(empty)}")
    queue = _checked(header["arrays"], arrays)
    saved_parts = [part for layer, fresh in zip(header["layers"], empty, strict=True) for part in _parts(layer, fresh)]
    caches, contents = leaves(empty), dict[int, LayerContents | None]()
    for i, (layer, fresh) in enumerate(zip(saved_parts, list(caches), strict=True)):
        if isinstance(fresh, TurboQuantKVCache):
            _check_kind(layer, "compressed")
            contents[i] = _import_compressed(layer, fresh, queue)
        else:
            caches[i] = _import_layer(layer, fresh, queue)
    if next(queue, None) is not None:
        raise ValueError("a saved cache has more arrays than its layers name")
    return with_leaves(empty, _join_layers(caches, contents))


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


def _check_kind(layer: Mapping[str, Any], kind: str) -> None:
    if layer["kind"] != kind:
        raise ValueError(f"a saved layer is {layer['kind']!r}, the model's is {kind!r}")


def _parts(layer: Mapping[str, Any], fresh: Any) -> list[Mapping[str, Any]]:
    """A saved layer's caches one by one, as `leaves` has those of `fresh`."""
    if not isinstance(fresh, CacheList):
        return [layer]
    _check_kind(layer, "CacheList")
    if len(layer["caches"]) != len(fresh.caches):
        raise ValueError("a saved layer holds another number of caches than the model's")
    return [part for saved, empty in zip(layer["caches"], fresh.caches, strict=True) for part in _parts(saved, empty)]


def _import_layer(layer: Mapping[str, Any], fresh: Any, arrays: Iterator[mx.array]) -> Any:
    """One of mlx-lm's own caches."""
    kind = type(fresh).__name__
    _check_kind(layer, kind)
    codec = PLAIN_CODECS.get(type(fresh))
    if codec is None:
        raise ValueError(f"caches of class {kind} cannot be loaded")
    codec.load(layer, fresh, arrays)
    return fresh


# Compressed layers: sink keys, sink values, four page arrays, tail keys, tail values.


def _export_compressed(cache: TurboQuantKVCache, out: list[Exported]) -> dict[str, Any]:
    sequence = cache.sequence
    if sequence is None or not len(sequence):
        return {"kind": "compressed", "tokens": 0}
    contents = contents_of(sequence)
    pages = contents.pages
    cut = [0, max(1, CHUNK_TOKENS // sequence.pool.fmt.page_tokens)]
    codes = (pages.k_codes, pages.k_scales, pages.v_codes, pages.v_scales)
    out += [from_mlx(x) for x in contents.sink]
    out += [Exported(np.array(a), a.dtype.name, cut) for a in codes]
    out += [from_mlx(x) for x in contents.tail]
    header = {"kind": "compressed", "tokens": len(sequence)}
    return {**header, "forgotten": sequence.forgotten} if sequence.pool.window else header


def _import_compressed(
    layer: Mapping[str, Any], fresh: TurboQuantKVCache, arrays: Iterator[mx.array]
) -> LayerContents | None:
    num_tokens = count(layer["tokens"], 1 << 40)
    if num_tokens == 0:
        return None
    sink_k, sink_v, *codes, tail_k, tail_v = (take(arrays) for _ in range(8))
    shape = LayerShape(sink_k.shape[0], sink_k.shape[2], sink_v.shape[2], sink_k.dtype)
    if fresh.source.shape not in (None, shape):
        raise ValueError(f"a saved layer has the geometry {shape}, the model's {fresh.source.shape}")
    pages = CanonicalPages(*(np.array(c) for c in codes))
    forgotten = count(layer.get("forgotten", 0), num_tokens)
    contents = LayerContents(shape, (sink_k, sink_v), pages, (tail_k, tail_v), forgotten)
    contents.check(fresh.source.layer_fmt, num_tokens)
    return contents


def _join_layers(caches: list[Any], contents: Mapping[int, LayerContents | None]) -> list[Any]:
    """The compressed layers' caches: those of one pool become one conversation. contents: by place in `caches`."""
    by_pool: dict[int, list[int]] = {}
    for i, of_layer in contents.items():
        source = caches[i].source
        if of_layer is not None:
            source.get(of_layer.shape)
        by_pool.setdefault(id(source.pool), []).append(i)
    joined = list(caches)
    made: list[TurboQuantKVCache] = []
    try:
        for places in by_pool.values():
            held = {i: of_layer for i in places if (of_layer := contents[i]) is not None}
            if not held:
                continue
            if len(held) != len(places):
                raise ValueError("the layers of a saved cache hold different numbers of tokens")
            sources = {i: caches[i].source for i in places}
            sequence = restore(sources[places[0]].pool, {sources[i].layer: c for i, c in held.items()})
            for i in places:
                joined[i] = TurboQuantKVCache(sources[i], sequence.of_layer(sources[i].layer))
                made.append(joined[i])
    except BaseException:  # pages of one pool must not stay when another's contents are refused
        for cache in made:
            cache.release()
        raise
    return joined
