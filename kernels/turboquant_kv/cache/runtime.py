"""KVRuntime: all KV caches of one loaded model.

Decides per layer whether it is compressed, makes caches, and answers what they cost. The server's
cache manager and plain mlx-lm programs use this; nobody else builds caches.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy.typing as npt
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.cache import held as rows
from turboquant_kv.cache import key_guard, windows
from turboquant_kv.cache import mixed_batch as mixed
from turboquant_kv.cache import seam as attention
from turboquant_kv.cache import serialise as exporting
from turboquant_kv.cache.backend_choice import cases_of, choose
from turboquant_kv.cache.batch_probe import Batching, try_batches
from turboquant_kv.cache.batch_verbs import BatchVerbs
from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.cache.layer_cache import LayerSource, TurboQuantKVCache
from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.padding import stored_means, stored_shape
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.probe import ModelLayers, probe_layers
from turboquant_kv.cache.protocol import AttendingCache, UnsupportedModelError
from turboquant_kv.cache.rows_apart import RowsApart
from turboquant_kv.cache.sequence import PagedSequence
from turboquant_kv.cache.trial import Case, Verdict
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.format_name import PLAIN_FORMAT
from turboquant_kv.kv_bytes import KVBytes

__all__ = ["PLAIN_FORMAT", "KVRuntime", "UnsupportedModelError"]


class KVRuntime(BatchVerbs):
    """Caches of one model in one format. fmt None keeps mlx-lm's own caches everywhere."""

    def __init__(
        self,
        model: Any,
        fmt: KVFormat | None,
        *,
        calibration: Calibration | None = None,
        backend: str = "auto",
        layers: ModelLayers | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """Runs a few tokens through the model to learn its layers, unless `layers` already tells.

        On a GPU the backend `auto` tries its fused kernels at once (backend_choice.py); cache_dir: where the verdict is
        remembered.
        Raises UnsupportedFormatError for a head_dim without a rotation, UnsupportedModelError when the
        model does not attend through the seam.
        """
        attention.install()
        self._model, self.fmt = model, fmt
        self.backend_name = "mlx-lm"
        self.verdict: Verdict | None = None  # on the device's fused kernels, where they were tried
        self.cases: list[Case] = []  # the kinds of compressed layers, which kernels are made for
        self.layers = layers if layers is not None else probe_layers(model)
        self.shapes = self.layers.shapes
        self.layer_formats: dict[int, KVFormat] = {}  # of compressed caches, by their place among `leaves`
        self.layers_left_exact: tuple[int, ...] = ()  # plain ones whose keys no codec holds, rings of odd head dims
        self._sources: dict[int, LayerSource] = {}
        self._pools: tuple[PagePool, ...] = ()  # of compressed layers, one for each length of sliding windows
        if fmt is not None:
            self._make_pools(fmt, calibration, backend, cache_dir)
        numbers = self.layers.numbers
        self.layers_compressed = len({numbers[i] for i in self._sources})
        self.layers_uncompressed = len(set(numbers)) - self.layers_compressed

    @property
    def fmt_name(self) -> str:
        """`4/3`, or `f16` when nothing is compressed."""
        return PLAIN_FORMAT if self.fmt is None else self.fmt.name

    @property
    def description(self) -> str:
        """The name, with what deviates from it: `4/4, 1 of 24 layers 8/4`; and what sliding windows gain."""
        others = Counter(fmt.name for fmt in self.layer_formats.values() if fmt != self.fmt)
        if self.layers_left_exact:
            others[PLAIN_FORMAT] = len(self.layers_left_exact)
        num_layers = len(self.layer_formats) + len(self.layers_left_exact)
        parts = [f"{count} of {num_layers} layers {name}" for name, count in sorted(others.items())]
        for window, ratio in self._window_ratios().items():
            count = sum(self._window_of(i) == window for i in self._sources)
            # Pages are longer than short windows.
            share = f"1/{ratio:.1f} of" if ratio >= 1 else f"{1 / ratio:.1f} times"
            parts.append(f"{count} of {num_layers} layers see {window} tokens, in {share} their bytes")
        return ", ".join([self.fmt_name, *parts])

    def _window_ratios(self) -> dict[int, float]:
        """By length of sliding windows: bytes of mlx-lm's rings over those of compressed layers, long conversations."""
        ratios: dict[int, float] = {}
        for window in sorted({self._window_of(i) for i in self._sources} - {0}):
            own = [i for i in self._sources if self._window_of(i) == window]
            stored = [(self.layer_formats[i], shape) for i in own if (shape := self._sources[i].shape) is not None]
            needed = sum(windows.longest_bytes(fmt, shape, window) for fmt, shape in stored)
            ratios[window] = self._raw_token_bytes(own) * window / needed
        return ratios

    def _make_pools(self, fmt: KVFormat, calibration: Calibration | None, backend: str, cache_dir: Path | None) -> None:
        if self.layers.unsupported is not None and any(self.shapes):
            raise UnsupportedModelError(self.layers.unsupported)
        raised = {} if calibration is None else key_guard.raised(fmt, calibration.divergences)
        compressed = self._choose_compressed(fmt, raised)
        known = calibration.layers if calibration is not None else {}
        means = [stored_means(known[i], shape) if i in known else None for i, shape in compressed.items()]
        formats = list(self.layer_formats.values())
        shapes, heads = list(compressed.values()), self.layers.query_heads or (0,) * len(self.shapes)
        capped = self.layers.capped or (False,) * len(self.shapes)
        self.cases = cases_of(shapes, formats, means, [heads[i] for i in compressed], [capped[i] for i in compressed])
        chosen = choose(backend, self.cases, cache_dir)
        self.backend_name, self.verdict = chosen.backend.name, chosen.verdict
        places = list(compressed)
        for window in sorted({self._window_of(i) for i in places}):
            own = [n for n, i in enumerate(places) if self._window_of(i) == window]
            pool = PagePool(
                copy.copy(chosen.backend),  # each knows the step before of its own pool
                *([shapes[n] for n in own], fmt, [means[n] for n in own], [formats[n] for n in own], window),
            )
            self._pools += (pool,)
            for layer, n in enumerate(own):
                self._sources[places[n]] = LayerSource.of_pool(pool, layer, self._dims(places[n]))

    def _choose_compressed(self, fmt: KVFormat, raised: Mapping[int, KVFormat | None]) -> dict[int, LayerShape]:
        """Stored geometry of the caches that are to be compressed. Sets their formats, and which others stay exact.

        Rings that `fmt` cannot store stay mlx-lm's, as long as there is something that it can; raises for other caches.
        """
        compressed: dict[int, LayerShape] = {}
        refused: UnsupportedFormatError | None = None
        for i in range(len(self.shapes)):
            shape, layer_fmt = self._shape_of(i), raised.get(i, fmt)
            if shape is None:
                continue
            try:
                if layer_fmt is not None:
                    compressed[i], self.layer_formats[i] = _stored(shape, layer_fmt), layer_fmt
            except UnsupportedFormatError as error:
                if not self._window_of(i):
                    raise
                refused = error
            if i not in compressed:
                self.layers_left_exact += (i,)
        if refused is not None and not compressed:
            raise refused
        return compressed

    @property
    def is_compressed_throughout(self) -> bool:
        """Whether no layer has a cache that mlx-lm keeps."""
        return len(self._sources) == len(self.shapes)

    def _shape_of(self, place: int) -> LayerShape | None:
        """Geometry of a cache that can be compressed."""
        window = self.layers.windows[place] if self.layers.windows else None
        return self.shapes[place] if window is None else window.shape

    def _window_of(self, place: int) -> int:
        """Keys that queries of a layer see; 0: all before them."""
        window = self.layers.windows[place] if self.layers.windows else None
        return 0 if window is None else window.num_tokens

    def _dims(self, place: int) -> tuple[int, int]:
        shape = self._shape_of(place)
        assert shape is not None
        return shape.k_dim, shape.v_dim

    @cached_property  # asked for every lease of every step
    def token_bytes(self) -> float:
        """Bytes that one more token of a long conversation takes, all layers."""
        compressed = 0
        for i, fmt in self.layer_formats.items():
            shape = self._sources[i].shape
            assert shape is not None
            if self._window_of(i):
                continue  # full, and gives back what it takes
            compressed += fmt.token_bytes(shape.num_kv_heads, shape.k_dim, shape.v_dim)
        plain = sum(s.raw_token_bytes for i, s in enumerate(self.shapes) if s is not None and i not in self._sources)
        return float(compressed + plain)

    @property
    def token_raw_bytes(self) -> float:
        """The same, uncompressed in the model's dtype."""
        return float(sum(s.raw_token_bytes for s in self.shapes if s is not None))

    @property
    def chunk_token_bytes(self) -> float:
        """Bytes of one token of a prompt's chunk while it is being read: exact in every layer, as that stores it."""
        total = 0
        for i, (shape, state) in enumerate(zip(self.shapes, self.layers.states, strict=True)):
            stored = self._sources[i].shape if i in self._sources else shape
            total += state.token_bytes if stored is None else stored.raw_token_bytes
        return float(total)

    @property
    def tail_bytes(self) -> float:
        """Most bytes of one conversation's exact rows behind its pages, in all layers."""
        if self.fmt is None:
            return 0.0
        return float(2 * self.fmt.page_tokens * sum(pool.raw_token_bytes for pool in self._pools))

    def make_cache(self) -> list[Any]:
        """One empty single-conversation cache per layer, or a list of them where the model keeps several."""
        layers = make_prompt_cache(self._model)
        if not self._pools:
            return list(layers)
        caches = leaves(layers)
        conversations = {id(pool): PagedSequence(pool, range(len(pool.shapes))) for pool in self._pools}
        for i, source in self._sources.items():
            caches[i] = TurboQuantKVCache(source, conversations[id(source.pool)].of_layer(source.layer))
        return with_leaves(layers, caches)

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes that a conversation of `num_tokens` allocates, exact windows included.

        Of sliding windows and recurrent states the most they can take; the rest is exact.
        """
        total = sum(s.bytes_for(num_tokens) for i, s in enumerate(self.layers.states) if i not in self._sources)
        for i, shape in enumerate(self.shapes):
            if i in self._sources:
                stored, fmt, window = self._sources[i].shape, self.layer_formats[i], self._window_of(i)
                assert stored is not None
                if window:
                    total += windows.bytes_for(fmt, stored, window, num_tokens)
                else:
                    total += _compressed_bytes(fmt, stored, num_tokens)
            elif shape is not None:
                step = KVCache.step
                total += shape.raw_token_bytes * (-(-num_tokens // step) * step)
        return total

    def measure(self, caches: Sequence[Any]) -> KVBytes:
        """Where the bytes of one conversation are, summed over its arrays."""
        return self._measure([rows.held_alone(cache) for cache in leaves(caches)])

    def measure_row(self, batch: Sequence[Any], index: int) -> KVBytes:
        """The same of one row of a batch, which is not copied; padding between rows is nobody's."""
        return self._measure(rows.held_by_row(batch, index))

    def _measure(self, held_by_all: Sequence[rows.Held]) -> KVBytes:
        compressed = exact = uncompressed = raw = 0
        for i, held in enumerate(held_by_all):
            if held.sequence is not None:
                compressed += held.sequence.compressed_bytes
                exact += held.sequence.exact_bytes
            uncompressed += held.plain_bytes
            is_plain = held.sequence is None and self.shapes[i] is None
            raw += held.plain_bytes if is_plain else self._raw_bytes(i, held.num_tokens)
        tokens = max((held.num_tokens for held in held_by_all), default=0)
        return KVBytes(tokens, compressed, exact, 0, uncompressed, raw)

    def totals(self) -> KVBytes:
        """Of all compressed layers and conversations together: from the pool, shared pages and rows once."""
        if not self._pools:
            return KVBytes()
        places = {id(pool): [i for i, source in self._sources.items() if source.pool is pool] for pool in self._pools}
        return KVBytes(
            tokens=max(pool.num_tokens for pool in self._pools),
            compressed=sum(pool.used_bytes for pool in self._pools),
            exact=sum(pool.exact_bytes for pool in self._pools),
            slack=self.slack_bytes(),
            raw_equivalent=sum(pool.num_tokens * self._raw_token_bytes(places[id(pool)]) for pool in self._pools),
        )

    def _raw_token_bytes(self, places: Sequence[int]) -> int:
        """Bytes of one uncompressed token in some of the caches."""
        return sum(shape.raw_token_bytes for i in places if (shape := self._shape_of(i)) is not None)

    def _raw_bytes(self, place: int, num_tokens: int) -> int:
        """What a cache that can be compressed would take of a conversation, uncompressed: no more than its window."""
        window = self._window_of(place)
        return self._raw_token_bytes([place]) * (min(num_tokens, window) if window else num_tokens)

    def compressed_raw_bytes(self, num_tokens: int) -> int:
        """What that many tokens would take uncompressed, in the layers that are compressed."""
        return sum(self._raw_bytes(i, num_tokens) for i in self._sources)

    def allocated_bytes(self) -> int:
        """Everything the pools hold: pages and exact rows, free ones too."""
        return sum(pool.allocated_bytes for pool in self._pools)

    def unique_bytes(self) -> int:
        """Pages and exact rows in use by the compressed layers; what conversations share counts once."""
        return sum(pool.used_bytes + pool.exact_bytes for pool in self._pools)

    def slack_bytes(self) -> int:
        """Held for pages and exact rows that nobody uses."""
        return sum(pool.slack_bytes for pool in self._pools)

    def trim(self) -> int:
        """Give memory of unused pages and exact rows back, for other formats to use; returns the bytes.

        Takes a copy of the used ones, one layer at a time. Not between a batch's update and its attention.
        """
        return sum(pool.trim() for pool in self._pools)

    def merge_rows(self, singles: Sequence[Sequence[Any]]) -> list[Any]:
        """A batch over these conversations, of whatever formats; their own caches stay as they are."""
        return mixed.merge_rows(singles, padded=self.layers.unsupported is not None)

    def extend_rows(self, batch: list[Any], other: list[Any]) -> list[Any]:
        """The rows of both batches; only the returned caches are valid afterwards."""
        return mixed.extend_rows(batch, other)

    def try_batches(self) -> Batching:
        """Whether rows of this runtime get together what they get alone. Raises what the model raises for one row."""
        return try_batches(self._model, self, self.layers.kv_heads)

    def usable_prefix(self, caches: Sequence[Any], length: int) -> int:
        """Longest n <= length to which a fork of these caches can be cut without loss; 0 if their mix cannot."""
        return rows.usable_prefix([rows.held_alone(cache) for cache in leaves(caches)], length)

    def usable_prefix_row(self, batch: Sequence[Any], index: int, length: int) -> int:
        """The same of one row of a batch."""
        return rows.usable_prefix(rows.held_by_row(batch, index), length)

    def fork(self, caches: Sequence[Any], length: int) -> list[Any]:
        """Caches of the first `length` tokens, sharing pages; `length` must come from usable_prefix."""
        return rows.cut_to([copy.deepcopy(cache) for cache in caches], length)

    def fork_row(self, batch: Sequence[Any], index: int, length: int) -> list[Any]:
        """The same of one row of a batch, which stays as it is; `length` must come from usable_prefix_row.

        Pages are shared; layers that mlx-lm keeps are copied at once, so that the batch's next step may
        still write in place.
        """
        return rows.cut_to([rows.extract(cache, index) for cache in batch], length)

    def import_caches(self, header: Mapping[str, Any], arrays: Sequence[npt.NDArray[Any]]) -> list[Any]:
        """Caches from what `exporting.export_caches` gave. Raises ValueError for anything inconsistent."""
        caches = exporting.import_caches(header, arrays, self.make_cache())
        try:
            for cache, place in zip(leaves(caches), self.layers.places, strict=True):
                place.check(cache)
            if len({rows.num_tokens_of(cache) for cache in leaves(caches)} - {0}) > 1:
                raise ValueError("the layers of a saved cache hold different numbers of tokens")
        except ValueError:
            self.release(caches)
            raise
        return caches

    def release(self, caches: Sequence[Any]) -> None:
        """Give memory back now; idempotent."""
        for cache in leaves(caches):
            if isinstance(cache, (AttendingCache, RowsApart)):
                cache.release()

    def evaluate(self, caches: Sequence[Any]) -> None:
        """Finish all pending work on these caches, so that no lazy graph outlives a step; waits once for all layers."""
        is_ours = (AttendingCache, RowsApart)
        mx.eval([c.pending_arrays() if isinstance(c, is_ours) else c.state for c in leaves(caches)])

    def books(self) -> list[tuple[int, ...]]:
        """Of each pool: pages in use and numbered, exact rows numbered and filled. Equal where all that was done is."""
        return [pool.books for pool in self._pools]

    def check_integrity(self) -> None:
        """Raises PageAccountingError when the pool's books do not agree."""
        for pool in self._pools:
            pool.check_integrity()


def _stored(shape: LayerShape, fmt: KVFormat) -> LayerShape:
    """A cache's geometry in pages of a format. Raises UnsupportedFormatError."""
    stored = stored_shape(shape)
    fmt.check_dims(stored.k_dim, stored.v_dim)
    return stored


def _compressed_bytes(fmt: KVFormat, shape: LayerShape, num_tokens: int) -> int:
    pages = fmt.num_pages(num_tokens) * fmt.page_bytes(shape.num_kv_heads, shape.k_dim, shape.v_dim)
    return pages + fmt.exact_rows(num_tokens) * shape.raw_token_bytes
