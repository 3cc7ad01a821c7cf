"""Which layers' keys need a larger codec than a format gives them, found by putting the model's own keys through it.

A few models have layers whose keys no 4-bit code holds: what is left of a bias of k_proj many times as long as the keys
themselves (Qwen2.5's first layer) after its mean was taken off, block by block. Such a layer spoils the whole model,
and its perplexity over a short text need not show it far from the beginning. So each layer is measured by itself, near
the beginning and far from it, and one that is over the limit gets the next larger key codec; one that no codec brings
under the limit stays uncompressed.

The figure of a layer is its attention's divergence: the mean of KL(softmax(s) || softmax(s')) in nats over heads and
queries, where s' are the scores with all but the sink's keys seen through the codec. Owns that figure and the choice;
where it is kept is calibration.py's business.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from turboquant_kv.backends.base import Means, narrower
from turboquant_kv.backends.numpy_ops.backend import KIT
from turboquant_kv.backends.plain_attention import plain_attention
from turboquant_kv.backends.portable.kernels import kernels_for
from turboquant_kv.cache import seam
from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.padding import widened_rows
from turboquant_kv.cache.probe import window_of_ring
from turboquant_kv.cache.protocol import AttendingCache, LayerInput
from turboquant_kv.codec.format import KVFormat, stored_dim
from turboquant_kv.codec.registry import codec_named
from turboquant_kv.codec.rotary import BLOCK_TOKENS, Rotary
from turboquant_kv.codec.rotation import rotation_matrix

# Key codecs by name, and what a layer over the limit gets instead.
LARGER = {"2": "3", "3": "4", "4": "8", "2t": "3t", "3t": "4t", "4t": "8"}
KEY_CODECS = ("2", "2t", "3", "3t", "4", "4t", "8")
# Attention scores do not change when all positions move, codes of turned keys do: the same text at these offsets.
OFFSETS = (0, 8192, 32768)
NUM_TOKENS = 256
NUM_QUERIES = 192  # recorded: the last ones
NUM_MEASURED_QUERIES = 64  # of those, the last ones again
SKIPPED_TOKENS = 32  # they stay exact
# Healthy layers of SmolLM2-135M and Qwen2.5-Coder-0.5B measure .01 to .16 at 4 bits and up to .5 at 3, within three
# times their model's median; Qwen2.5's first layer measured 18 and 39 with a mean that does not turn, 0.17 at 8 bits.
LIMIT_NATS = 0.25
LIMIT_OVER_MEDIAN = 4.0

Floats = npt.NDArray[np.float32]
Divergences = Mapping[int, Mapping[str, float]]
"""Of each layer, by key codec."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one layer was given: keys (H, T, D) from position `offset` on, queries (Hq, R, D) of the last."""

    offset: int
    keys: Floats
    queries: Floats
    scale: float
    cap: float = 0.0  # of scores, as LayerInput has it
    window: int = 0  # keys that a query sees, its own included; 0: all before it

    def last(self, num_queries: int) -> Recorded:
        """The same with fewer queries."""
        return replace(self, queries=self.queries[:, -num_queries:])

    def moved(self, rotary: Rotary, offset: int) -> Recorded:
        """What a layer whose keys and queries turn so would have been given from `offset` on."""

        def turned(x: Floats, first: int) -> Floats:
            positions = first + np.arange(x.shape[1])
            by = offset - self.offset
            return rotary.turned(rotary.turned_back(x, positions), positions + by).astype(np.float32)

        last = self.offset + self.keys.shape[1] - self.queries.shape[1]
        keys, queries = turned(self.keys, self.offset), turned(self.queries, last)
        return replace(self, offset=offset, keys=keys, queries=queries)

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.keys).all() and np.isfinite(self.queries).all())

    @property
    def grouped_queries(self) -> Floats:
        """(H, rows, D): of each KV head, the queries of its group one head after the other."""
        return self.queries.reshape(len(self.keys), -1, self.keys.shape[2])

    @property
    def query_positions(self) -> npt.NDArray[np.int64]:
        """(rows,): which of the keys is each query's own."""
        num_tokens, num_rows = self.keys.shape[1], self.queries.shape[1]
        return np.tile(np.arange(num_tokens - num_rows, num_tokens), len(self.queries) // len(self.keys))

    @property
    def hidden(self) -> npt.NDArray[np.bool_]:
        """(rows, T): the keys that a query does not see, those after it and those that left its window."""
        distance = self.query_positions[:, None] - np.arange(self.keys.shape[1])
        return (distance < 0) | (distance >= (self.window or self.keys.shape[1]))

    @property
    def scores(self) -> Floats:
        """(H, rows, T): of all keys, hidden ones as well."""
        return np.asarray(np.float32(self.scale) * self.grouped_queries @ self.keys.swapaxes(1, 2), np.float32)

    @property
    def logits(self) -> Floats:
        """The scores, capped if they are: what softmax gets."""
        return self.capped(self.scores)

    def capped(self, scores: Floats) -> Floats:
        return self.cap * np.tanh(scores / self.cap) if self.cap else scores


def mean_rows(means: Means, given: Recorded, first: int) -> Floats:
    """(H, T - first, D): what a store takes off the recorded keys from the `first` one on."""
    num_tokens = given.keys.shape[1] - first
    blocks = means.k_blocks(given.offset + first, -(-num_tokens // BLOCK_TOKENS))
    return np.repeat(blocks, BLOCK_TOKENS, axis=1)[:, :num_tokens]


def record(
    model: Any, tokens: Sequence[int], layers: Sequence[int], offset: int, num_tokens: int = NUM_TOKENS
) -> dict[int, Recorded]:
    """Run the model over the first of the tokens, which stands at `offset`, and more; what the named layers were given.

    Layers that do not attend through the seam are left out.
    """
    seam.install()
    empty = make_prompt_cache(model)
    caches: list[Any] = [
        _Recorder(offset, window_of_ring(cache)) if i in layers and type(cache) in (KVCache, RotatingKVCache) else cache
        for i, cache in enumerate(leaves(empty))
    ]
    model(mx.array([list(tokens[:num_tokens])]), cache=with_leaves(empty, caches))
    found = {}
    for i, cache in enumerate(caches):
        if isinstance(cache, _Recorder):
            cache.evaluate()
            if cache.recorded is not None:
                found[i] = _as_recorded(cache.recorded, offset, cache.window)
            cache.release()
    return found


def measure(recorded: Sequence[Mapping[int, Recorded]], means: Mapping[int, Means]) -> dict[int, dict[str, float]]:
    """The worst divergence over the recordings of each layer that `means` names, by key codec."""
    worst: dict[int, dict[str, float]] = {}
    for at_offset in recorded:
        for layer, given in at_offset.items():
            if layer not in means:
                continue
            of_layer = worst.setdefault(layer, dict.fromkeys(KEY_CODECS, 0.0))
            for codec, divergence in _divergences(given, means[layer]).items():
                of_layer[codec] = max(of_layer[codec], divergence)
    return worst


def raised(fmt: KVFormat, measured: Divergences) -> dict[int, KVFormat | None]:
    """Formats of the layers that need a larger key codec than `fmt` has; None: to be left uncompressed.

    All others keep it.
    """
    formats: dict[int, KVFormat | None] = {}
    for layer, of_layer in measured.items():
        codec: str | None = fmt.keys.name
        while codec is not None and codec in of_layer and of_layer[codec] > limit(measured, codec):
            codec = LARGER.get(codec)
        if codec != fmt.keys.name:
            formats[layer] = None if codec is None else fmt.with_(k_bits=codec)
    return formats


def limit(measured: Divergences, codec: str) -> float:
    """What a layer may have with this key codec: an absolute bound, wider where the whole model is above it."""
    return max(LIMIT_NATS, LIMIT_OVER_MEDIAN * statistics.median_low(of_layer[codec] for of_layer in measured.values()))


class _Recorder(AttendingCache):
    """One layer's exact attention over one chunk whose first token stands at `offset`."""

    def __init__(self, offset: int, window: int) -> None:
        """window: keys that a query sees, its own included; 0: all before it."""
        self.offset, self.window = offset, window
        self.recorded: LayerInput | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._hold(keys, values)
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str:
        """As mlx-lm asks for it; an array is (N, N), for this chunk is all that there is."""
        window = narrower(self.window, window_size)
        if not return_array and not 0 < window < N:
            return "causal"
        mask: mx.array = create_causal_mask(N, window_size=window or None)
        return mask

    def _attend(self, step: LayerInput) -> mx.array:
        self.recorded = step
        num_tokens, mask = step.keys.shape[2], step.array_mask
        return plain_attention(
            *(step.queries, step.keys, step.values),
            scale=step.scale,
            mask=self.make_mask(num_tokens) if mask is None else mask[..., -num_tokens:],
            sinks=step.sinks,
            cap=step.cap,
        )

    def pending_arrays(self) -> list[Any]:
        return [] if self.recorded is None else [self.recorded.queries, self.recorded.keys]

    def release(self) -> None:
        self.recorded = None


def _as_recorded(step: LayerInput, offset: int, window: int) -> Recorded:
    keys, queries = (np.array(x[0].astype(mx.float32)) for x in (step.keys, step.queries[:, :, -NUM_QUERIES:]))
    return Recorded(offset, keys, queries, step.scale, step.cap, window)


def _divergences(given: Recorded, means: Means) -> dict[str, float]:
    """Of one layer at one offset, by key codec."""
    given = given.last(NUM_MEASURED_QUERIES)
    dim, hidden = stored_dim(given.keys.shape[2]), given.hidden
    exact = given.scores
    expected = _log_softmax(given.capped(exact), hidden)
    weights = np.exp(expected)
    factors = np.float32(1) if means.key_factors is None else means.key_factors[:, None]
    mean = mean_rows(means, given, SKIPPED_TOKENS)
    rotation = rotation_matrix(dim, KVFormat().rotation_seed, "k")
    rotated = widened_rows(given.keys[:, SKIPPED_TOKENS:] * factors - mean, dim) @ rotation.T
    queries = np.float32(given.scale) * given.grouped_queries / factors
    turned, centre = widened_rows(queries, dim) @ rotation.T, queries @ mean.swapaxes(1, 2)
    found = {}
    for name in KEY_CODECS:
        kernels = kernels_for(KIT, codec_named(name))
        codes, scales = kernels.encode(rotated)
        seen = exact.copy()
        decoded = kernels.decode(codes, dim) * scales.astype(np.float32)[..., None]
        seen[..., SKIPPED_TOKENS:] = turned @ decoded.swapaxes(1, 2) + centre
        difference = np.where(hidden, 0.0, weights * (expected - _log_softmax(given.capped(seen), hidden)))
        found[name] = float(np.float32(difference.sum(axis=-1).mean()))  # as the calibration file keeps it
    return found


def _log_softmax(logits: npt.NDArray[np.floating[Any]], hidden: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    shown = np.where(hidden, -1e30, logits.astype(np.float64))
    shifted = shown - shown.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
