"""Tokens drawn by their weights: from logits and one random number a row to a place, in whole numbers.

The operations of sampling.py that work on arrays alone, all of them lazy. Top-p's search is a compiled function on a
GPU, where each operation of its own is a launch that the host pays for; on a CPU, where a compiler would have to be
there, it runs as it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

MASKED = -float("inf")
TIE_OCTAVES = 1 / 256  # top-p's step; 2^13 of them reach 32 octaves below the likeliest, where weights are 0
SEARCH_STEPS = tuple(2**i for i in range(12, -1, -1))


def random_numbers(seeds: npt.NDArray[np.uint64], places: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """One number for each pair of seed and place in the answer, each (B,) uint64: (B,) uint32.

    SplitMix64, a generator with a counter, from a start that is the hashed seed: streams of neighbouring seeds are
    unrelated.
    """
    with np.errstate(over="ignore"):  # wraps on purpose
        state = _mixed(seeds + np.uint64(0x9E3779B97F4A7C15)) + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return (_mixed(state) >> np.uint64(32)).astype(np.uint32)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_weighted(
    logits: mx.array,
    best_logit: mx.array,
    number: mx.array,
    octaves: mx.array,
    log2_min_p: mx.array | None,
    top_p: mx.array | None,
) -> mx.array:
    """Tokens (R, 1) uint32 from logits (R, V), after min-p and top-p where they are given.

    best_logit (R, 1): the largest of each row; number (R, 1) uint32: random; octaves (R, 1): log2(e) / temperature;
    log2_min_p, top_p (R, 1) float32.
    """
    weights = softmax_weights(logits, best_logit, octaves, log2_min_p)
    if top_p is not None:
        weights = within_top_p(mx.default_device() != mx.Device(mx.cpu))(weights, top_p)
    return find(weights, number)


@cache
def within_top_p(compiled: bool) -> Callable[[mx.array, mx.array], mx.array]:
    """A function that zeroes weights (R, V) uint32 outside of top_p (R, 1), compiled for any number of rows or not."""

    def cut(weights: mx.array, top_p: mx.array) -> mx.array:
        return weights * (weights >= top_p_threshold(weights, top_p))

    return mx.compile(cut, shapeless=True) if compiled else cut


def softmax_weights(logits: mx.array, best_logit: mx.array, octaves: mx.array, log2_min_p: mx.array | None) -> mx.array:
    """Softmax at each row's temperature after min-p, (R, N) uint32; a row's sum is between 2^30 and 2^31."""
    below = (logits - best_logit) * octaves
    mass = _exp2(below)
    if log2_min_p is not None:
        mass = mass * (below >= log2_min_p)
    return whole_weights(mass)


def whole_weights(mass: mx.array) -> mx.array:
    """(R, N) float32 of [0, 1], one of each row 1: scaled by a power of two to sums between 2^30 and 2^31, as uint32.

    Sums of float32 can depend on the batch's size. Here that is no more than the power of two, in the rare case that
    a sum is next to one, and hardly any draw.
    """
    total = mx.sum(mass, axis=-1, keepdims=True)
    exponent = (total.view(mx.int32) >> 23) - 127
    scale = ((30 - exponent + 127) << 23).view(mx.float32)
    return (mass * scale + 0.5).astype(mx.uint32)


def top_p_threshold(weights: mx.array, top_p: mx.array) -> mx.array:
    """Smallest weight that top-p keeps, (R, 1) uint32, from weights (R, V) uint32 and top_p (R, 1).

    The largest w = max(weights) / 2^(n / 256) whose row's weights >= w sum up to top_p of the row, within float32's
    rounding of the bounds; at least 1.
    """
    needed = needed_for(weights, top_p)
    most = mx.max(weights, axis=-1, keepdims=True)
    # Kept one step above the largest bound that is low enough, so that the search can also end at the likeliest.
    above = most.astype(mx.float32) * 2**TIE_OCTAVES
    for step in SEARCH_STEPS:
        trial = above * 2 ** (-step * TIE_OCTAVES)
        mass = mx.sum(weights * (weights >= trial.astype(mx.uint32)), axis=-1, keepdims=True)
        above = mx.where(mass < needed, trial, above)
    bound = (above * 2**-TIE_OCTAVES).astype(mx.uint32)
    return mx.maximum(mx.minimum(bound, most), 1)


def needed_for(weights: mx.array, top_p: mx.array) -> mx.array:
    """The sum (R, 1) uint32 at which top-p has enough; at least 1, so the likeliest stays."""
    total = mx.sum(weights, axis=-1, keepdims=True)
    return mx.maximum(mx.minimum((total.astype(mx.float32) * top_p).astype(mx.uint32), total), 1)


def find(weights: mx.array, number: mx.array) -> mx.array:
    """Index (R, 1) uint32 drawn by weights (R, N) uint32 with a random number (R, 1) of 32 bits."""
    running = mx.cumsum(weights, axis=-1)
    total = mx.sum(weights, axis=-1, keepdims=True)
    target = ((number.astype(mx.uint64) * total.astype(mx.uint64)) >> 32).astype(mx.uint32)
    index = mx.sum(running <= target, axis=-1, keepdims=True)
    return mx.minimum(index, weights.shape[-1] - 1).astype(mx.uint32)  # rows of NaN may point anywhere


def likeliest(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Ids (R, k) uint32 and values (R, k) of the k largest of logits (R, V): falling, and of equals the lower id first.

    A token among the k first lies in one of the k first blocks of consecutive ids, ranked by their maxima and then by
    their place: each of those has a token that ranks before all of any later block.
    """
    num_rows, vocab_len = logits.shape
    size = 64 if k <= 64 else 16
    num_blocks = -(-vocab_len // size)
    ids = mx.arange(vocab_len)[None]
    values = logits
    if 4 * k < num_blocks:
        blocks = mx.pad(logits, [(0, 0), (0, num_blocks * size - vocab_len)], constant_values=MASKED)
        blocks = blocks.reshape(num_rows, num_blocks, size)
        chosen = _first(mx.max(blocks, axis=-1), mx.arange(num_blocks)[None], k).astype(mx.int32)
        values = mx.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(num_rows, k * size)
        ids = (chosen[:, :, None] * size + mx.arange(size)).reshape(num_rows, k * size)
    top = mx.minimum(_first(values, ids, k), vocab_len - 1)
    return top, mx.take_along_axis(logits, top, axis=-1)


def _first(values: mx.array, ids: mx.array, k: int) -> mx.array:
    """Ids (R, k) uint32 of the k largest values (R, N), the lower id first of equals; ids are (R, N) or (1, N)."""
    bits = (values + 0.0).view(mx.int32)  # + 0: there are two zeros
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers they rank as the floats do
    keys = (ordered.astype(mx.int64) << 32) + (0x7FFFFFFF - ids).astype(mx.int64)  # unique, so the order is one
    num_out = values.shape[-1] - k
    largest = mx.sort(mx.partition(keys, num_out, axis=-1)[:, num_out:] if num_out else keys, axis=-1)
    return (0x7FFFFFFF - (largest[:, ::-1] & 0xFFFFFFFF)).astype(mx.uint32)


def _exp2(x: mx.array) -> mx.array:
    """2^x for float32 x <= 0, relative error below 2e-7; 0 or next to it below -126."""
    if mx.default_device() != mx.Device(mx.cpu):
        return mx.exp(x * math.log(2.0))
    # MLX's exp takes 11 ns a value on x86 CPUs; these operations are vectorised and take a quarter of that.
    x = mx.maximum(x, -126.0)
    shifted = x + 12582912.0  # 1.5 * 2^23: the lowest bits are x rounded to whole
    rest = x - (shifted - 12582912.0)  # [-1/2, 1/2]
    power = 1.535336188319500e-4 * rest + 1.339887440266574e-3
    for c in (9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1, 6.931472028550421e-1, 1.0):
        power = power * rest + c
    return (power.view(mx.int32) + (shifted.view(mx.int32) << 23)).view(mx.float32)
