"""What one compressed layer holds of one conversation, as arrays, and back, checked on the way in.

The one form in which compressed layers leave: prompt cache files of mlx-lm (`save_state`) and stores of whole
conversations (serialise.py) put the same arrays into their containers. Pages are in the canonical layout, so what one
backend writes another reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from turboquant_kv.backends.base import CanonicalPages, ExactRows, LayerShape, Means
from turboquant_kv.cache import windows
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.sequence import LayerSequence, PagedSequence
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary


class LayerContents(NamedTuple):
    """Exact ends as MLX arrays (H, n, D) and (H, n, Dv) in the model's dtype, n may be 0, and the pages between."""

    shape: LayerShape
    sink: tuple[mx.array, mx.array]
    pages: CanonicalPages
    tail: tuple[mx.array, mx.array]
    forgotten: int = 0  # tokens before this position are gone, and their pages with them (windows.py)

    @property
    def num_sink(self) -> int:
        return int(self.sink[0].shape[1])

    @property
    def num_tail(self) -> int:
        return int(self.tail[0].shape[1])

    def num_tokens(self, fmt: KVFormat) -> int:
        """Tokens in all."""
        num_pages = windows.first_page(fmt, self.forgotten) + self.pages.num_pages
        num_sink = fmt.sink_tokens if self._has_lost_sink(fmt) else self.num_sink
        return num_sink + num_pages * fmt.page_tokens + self.num_tail

    def _has_lost_sink(self, fmt: KVFormat) -> bool:
        return self.forgotten >= fmt.sink_tokens and self.forgotten > 0

    def check(self, fmt: KVFormat, num_tokens: int) -> None:
        """Raises ValueError unless sink, pages and tail are those of a conversation of this length."""
        shape = self.shape
        for (k, v), n in ((self.sink, self.num_sink), (self.tail, self.num_tail)):
            if k.shape != (shape.num_kv_heads, n, shape.k_dim) or v.shape != (shape.num_kv_heads, n, shape.v_dim):
                raise ValueError(f"exact rows are {k.shape} and {v.shape}, the layer is {shape}")
            if k.dtype != shape.dtype or v.dtype != shape.dtype:
                raise ValueError(f"exact rows are {k.dtype} and {v.dtype}, the layer is {shape}")
        self.pages.check(shape, fmt)
        num_sink = 0 if self._has_lost_sink(fmt) else min(num_tokens, fmt.sink_tokens)
        is_whole = self.num_sink == num_sink and self.num_tail <= fmt.page_tokens and self.forgotten <= num_tokens
        if not is_whole or self.num_tokens(fmt) != num_tokens:
            raise ValueError(
                f"{self.num_sink} first, {self.num_tail} last exact tokens and {self.pages.num_pages} pages do not "
                f"make {num_tokens} tokens"
            )


def contents_of(sequence: LayerSequence) -> LayerContents:
    """Copies of pages, and exact rows as the backend hands them to MLX."""
    pool = sequence.pool
    shape = pool.shapes[sequence.layer]

    def exact(rows: ExactRows | None) -> tuple[mx.array, mx.array]:
        if rows is None:
            k, v = (mx.zeros((shape.num_kv_heads, 0, d), shape.dtype) for d in (shape.k_dim, shape.v_dim))
        else:
            k, v = (pool.backend.to_mlx(x, shape.dtype) for x in (rows.k, rows.v))
        return k, v

    sink, tail = sequence.exact_ends()
    return LayerContents(shape, exact(sink), sequence.pages(), exact(tail), sequence.forgotten)


def restore(pool: PagePool, layers: Mapping[int, LayerContents]) -> PagedSequence:
    """A conversation of the pool with these contents of its layers, inverse of `contents_of`.

    Raises ValueError when layers contradict the pool or each other.
    """
    lengths = {contents.num_tokens(pool.fmt) for contents in layers.values()}
    if len(lengths) != 1:
        raise ValueError("the layers of a saved cache hold different numbers of tokens")
    num_tokens = lengths.pop()
    for layer, contents in layers.items():
        if contents.shape != pool.shapes[layer]:
            raise ValueError(f"a saved layer has the geometry {contents.shape}, the model's {pool.shapes[layer]}")
        contents.check(pool.layer_formats[layer], num_tokens)
    forgotten = {contents.forgotten for contents in layers.values()}
    if len(forgotten) != 1 or max(forgotten) > (max(0, num_tokens - pool.window + 1) if pool.window else 0):
        raise ValueError("the layers of a saved cache have forgotten what the model still sees")
    sequence = PagedSequence(pool, layers)
    page_ids = pool.allocate(next(iter(layers.values())).pages.num_pages)
    try:
        if len(page_ids):
            for layer, contents in layers.items():
                pool.stores[layer].write(page_ids, contents.pages)
        ends = {layer: (_rows(pool, c.sink), _rows(pool, c.tail)) for layer, c in layers.items()}
    except BaseException:
        pool.free(page_ids)
        raise
    sequence.fill(page_ids, ends, forgotten.pop())
    return sequence


def _rows(pool: PagePool, exact: tuple[mx.array, mx.array]) -> ExactRows | None:
    k, v = exact
    return ExactRows(pool.backend.from_mlx(k), pool.backend.from_mlx(v)) if k.shape[1] else None


# --- mlx-lm's prompt cache files: one tree per layer, of arrays and one string


def save_state(fmt: KVFormat, sequence: LayerSequence | None) -> tuple[Any, ...]:
    """(header JSON, sink keys, sink values, four page arrays, tail keys, tail values[, means of keys, of values])."""
    if sequence is None or not len(sequence):
        return (json.dumps({"format": fmt.to_dict()}),)
    contents, pool = contents_of(sequence), sequence.pool
    shape, pages, means = contents.shape, contents.pages, pool.means[sequence.layer]
    header = {
        "format": fmt.to_dict(),
        "shape": [shape.num_kv_heads, shape.k_dim, shape.v_dim],
        "tail_start": sequence.tail_start,
        "dtype": str(shape.dtype).removeprefix("mlx.core."),
    }
    if pool.window:
        header |= {"window": pool.window, "forgotten": sequence.forgotten}
    if means is not None and means.rotary is not None:
        header["rotary"] = means.rotary.to_dict()
    if means is not None and means.key_factors is not None:
        header["key_factors"] = means.key_factors.tolist()
    codes = [mx.array(a) for a in (pages.k_codes, pages.k_scales, pages.v_codes, pages.v_scales)]
    more = [mx.array(means.k), mx.array(means.v)] if means is not None else []
    return (json.dumps(header), *contents.sink, *codes, *contents.tail, *more)


def format_and_means(states: Sequence[Sequence[Any]]) -> tuple[KVFormat, Means | None]:
    """Of rows of one batch, as `save_state` gave them."""
    full = next((state for state in states if len(state) > 9), None)
    means = None
    if full is not None:
        header = json.loads(full[0])
        turn, factors = header.get("rotary"), header.get("key_factors")
        rotary = None if turn is None else Rotary.from_dict(turn)
        key_factors = None if factors is None else np.array(factors, np.float32)
        means = Means(np.array(full[9]), np.array(full[10]), rotary, key_factors)
    return KVFormat.from_dict(json.loads(states[0][0])["format"]), means


def load_state(fmt: KVFormat, state: Sequence[Any]) -> LayerContents | None:
    """Inverse of save_state; None for an empty cache. Raises ValueError when the arrays contradict their header."""
    header = json.loads(state[0])
    if KVFormat.from_dict(header["format"]) != fmt:
        raise ValueError("saved rows of one batch have different formats")
    if len(state) == 1:
        return None
    dtype = getattr(mx, header["dtype"])
    num_kv_heads, k_dim, v_dim = header["shape"]
    shape = LayerShape(num_kv_heads, k_dim, v_dim, dtype)

    def exact(k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        if k.size and (k.dtype != dtype or v.dtype != dtype):
            raise ValueError(f"exact rows are {k.dtype}, the header says {dtype}")
        if not k.size:  # of whatever shape: files keep no empty dimensions
            k, v = (mx.zeros((shape.num_kv_heads, 0, d), dtype) for d in (shape.k_dim, shape.v_dim))
        return k, v

    contents = LayerContents(
        shape,
        exact(state[1], state[2]),
        CanonicalPages(*(np.array(a) for a in state[3:7])),
        exact(state[7], state[8]),
        _forgotten(header),
    )
    contents.check(fmt, header["tail_start"] + contents.num_tail)
    return contents


def saved_window(states: Sequence[Sequence[Any]]) -> int:
    """Of rows of one batch, as `save_state` gave them; 0: none. Raises ValueError when they differ."""
    found = {json.loads(state[0]).get("window", 0) for state in states if len(state) > 1}
    if len(found) > 1 or not all(type(window) is int and window >= 0 for window in found):
        raise ValueError("saved rows of one batch have different sliding windows")
    return int(found.pop()) if found else 0


def _forgotten(header: Mapping[str, Any]) -> int:
    forgotten = header.get("forgotten", 0)
    if type(forgotten) is not int or forgotten < 0:
        raise ValueError(f"a saved cache has forgotten {forgotten!r} tokens")
    return forgotten
