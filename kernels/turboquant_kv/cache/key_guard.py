"""Which layers' keys need more bits than a format gives them, found by putting the model's own keys through the codec.

A few models have layers whose keys no 4-bit code holds: a bias of k_proj many times as long as the keys themselves
(Qwen2.5's first layer) turns with position under RoPE, so that no constant mean takes it off. Such a layer spoils the
whole model, and its perplexity over a short text need not show it far from the beginning. So each layer is measured by
itself, near the beginning and far from it, and one that is over the limit gets the next larger key codec.

The figure of a layer is its attention's divergence: the mean of KL(softmax(s) || softmax(s')) in nats over heads and
queries, where s' are the scores with all but the sink's keys seen through the codec. Owns that figure and the choice;
where it is kept is calibration.py's business.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turboquant_kv.backends.base import Means
from turboquant_kv.cache import seam
from turboquant_kv.cache.protocol import AttendingCache, LayerInput
from turboquant_kv.codec.format import KVFormat, check_head_dim
from turboquant_kv.codec.reference import decode, encode
from turboquant_kv.codec.rotation import rotation_matrix

KEY_BITS = (2, 3, 4, 8)
# Attention scores do not change when all positions move, codes of turned keys do: the same text at these offsets.
OFFSETS = (0, 8192, 32768)
NUM_TOKENS = 256
NUM_QUERIES = 64  # the last ones
SKIPPED_TOKENS = 32  # they stay exact
# Healthy layers of SmolLM2-135M and Qwen2.5-Coder-0.5B measure .01 to .16 at 4 bits and up to .5 at 3, within three
# times their model's median; Qwen2.5's first layer measures 18 and 39, and 0.17 at 8 bits.
LIMIT_NATS = 0.25
LIMIT_OVER_MEDIAN = 4.0

Divergences = Mapping[int, Mapping[int, float]]
"""Of each layer, by key bits."""


def measure(model: Any, tokens: Sequence[int], means: Mapping[int, Means]) -> dict[int, dict[int, float]]:
    """The worst divergence over OFFSETS of each layer that `means` names, by key bits.

    Runs the model over NUM_TOKENS tokens at each offset. Layers whose head dimension has no rotation are left out, and
    so are all where the model does not attend through the seam.
    """
    seam.install()
    worst: dict[int, dict[int, float]] = {}
    for offset in OFFSETS:
        for layer, recorded in _recorded(model, list(tokens[:NUM_TOKENS]), offset, means):
            of_layer = worst.setdefault(layer, dict.fromkeys(KEY_BITS, 0.0))
            for bits in KEY_BITS:
                of_layer[bits] = max(of_layer[bits], _divergence(recorded, bits, means[layer].k))
    return worst


def raised(fmt: KVFormat, measured: Divergences) -> dict[int, KVFormat]:
    """Formats of the layers that need more key bits than `fmt` has; all others keep it."""
    formats = {}
    for layer, of_layer in measured.items():
        bits = fmt.k_bits
        while bits != KEY_BITS[-1] and of_layer[bits] > limit(measured, bits):
            bits = KEY_BITS[KEY_BITS.index(bits) + 1]
        if bits != fmt.k_bits:
            formats[layer] = fmt.with_(k_bits=bits)
    return formats


def limit(measured: Divergences, bits: int) -> float:
    """What a layer may have at these key bits: an absolute bound, wider where the whole model is above it."""
    return max(LIMIT_NATS, LIMIT_OVER_MEDIAN * statistics.median_low(of_layer[bits] for of_layer in measured.values()))


class _Recorder(AttendingCache):
    """One layer's exact attention over one chunk whose first token stands at `offset`."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.recorded: LayerInput | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._hold(keys, values)
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str:
        return "causal"

    def _attend(self, step: LayerInput) -> mx.array:
        self.recorded = step
        out: mx.array = mx.fast.scaled_dot_product_attention(
            step.queries, step.keys, step.values, scale=step.scale, mask="causal", sinks=step.sinks
        )
        return out

    def evaluate(self) -> None:
        if self.recorded is not None:
            mx.eval(self.recorded.queries, self.recorded.keys)

    def release(self) -> None:
        self.recorded = None


def _recorded(
    model: Any, tokens: list[int], offset: int, means: Mapping[int, Means]
) -> Iterator[tuple[int, LayerInput]]:
    """What each measured layer was given."""
    caches: list[Any] = [
        _Recorder(offset) if i in means and type(cache) is KVCache else cache
        for i, cache in enumerate(make_prompt_cache(model))
    ]
    model(mx.array([tokens]), cache=caches)
    for i, cache in enumerate(caches):
        if isinstance(cache, _Recorder):
            cache.evaluate()
            if cache.recorded is not None:
                yield i, cache.recorded
            cache.release()


def _divergence(recorded: LayerInput, bits: int, mean: npt.NDArray[np.float32]) -> float:
    """Of one layer at one offset."""
    keys = np.array(recorded.keys[0].astype(mx.float32), np.float64)  # (H, T, D)
    queries = np.array(recorded.queries[0].astype(mx.float32), np.float64)[:, -NUM_QUERIES:]  # (Hq, R, D)
    num_heads, num_tokens, dim = keys.shape
    check_head_dim(dim)
    fmt = KVFormat(k_bits=bits)
    rotation = rotation_matrix(dim, fmt.rotation_seed, "k")
    seen = decode(encode(keys, fmt.keys, rotation, mean[:, None]), fmt.keys, dim, rotation, mean[:, None])
    seen[:, :SKIPPED_TOKENS] = keys[:, :SKIPPED_TOKENS]
    grouped = recorded.scale * queries.reshape(num_heads, -1, dim)  # (H, G*R, D)
    positions = np.tile(np.arange(num_tokens - queries.shape[1], num_tokens), len(queries) // num_heads)
    hidden = np.arange(num_tokens)[None] > positions[:, None]
    expected, got = (_log_softmax(grouped @ x.swapaxes(1, 2), hidden) for x in (keys, seen))
    difference = np.where(hidden, 0.0, np.exp(expected) * (expected - got))
    return float(np.float32(difference.sum(axis=-1).mean()))  # as the calibration file keeps it


def _log_softmax(scores: npt.NDArray[np.float64], hidden: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    scores = np.where(hidden, -1e30, scores)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
