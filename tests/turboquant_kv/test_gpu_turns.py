"""The tables of angles by which kernels turn keys' means: what they make is codec/rotary.py's block means."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv.histories import random_rotary

from turboquant_kv.backends.base import LayerShape, Means
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.store import turning_of
from turboquant_kv.backends.gpu.turns import MIN_BLOCKS, Turns
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.rotary import Rotary


def padded_pairs(rotary: Rotary) -> int:
    """Pairs with those behind the last that fill eight, which kernels multiply too."""
    return -(-rotary.num_pairs // 8) * 8


@pytest.mark.parametrize("num_blocks", [1, MIN_BLOCKS + 1, 20_000])
def test_means_turned_by_the_floats_are_the_block_means(num_blocks: int, rng: np.random.Generator) -> None:
    """At 3e5 positions too, where a float32 angle is off by a hundredth of a radian."""
    dim, sink = int(rng.choice([64, 80, 112, 128])), int(rng.integers(0, 40))
    rotary = random_rotary(rng, dim)
    mean = rng.standard_normal((2, dim)).astype(np.float32)
    table = np.array(Turns(rotary, sink).floats(num_blocks))
    padded, pairs = padded_pairs(rotary), rotary.num_pairs
    assert table.dtype == np.float32 and len(table) >= num_blocks and table.shape[1] == 2 * padded
    cos, sin = table[:num_blocks, :padded], table[:num_blocks, padded:]
    made = np.broadcast_to(rotary.averaged(mean)[:, None], (2, num_blocks, dim)).copy()
    first, second = made[..., rotary.first], made[..., rotary.second]
    made[..., rotary.first] = first * cos[:, :pairs] - second * sin[:, :pairs]
    made[..., rotary.second] = first * sin[:, :pairs] + second * cos[:, :pairs]
    np.testing.assert_allclose(made, rotary.block_means(mean, sink, num_blocks), atol=2e-6)


def test_nothing_stands_behind_the_last_pair(rng: np.random.Generator) -> None:
    """Padding is cosines and sines of no pair, which products must not add."""
    rotary = Rotary(10000.0 ** (-np.arange(21) / 21), 2, 1)
    table = np.array(Turns(rotary, 5).floats(40)).reshape(-1, 2, 24)
    assert table[..., :21].any(axis=0).all() and not table[..., 21:].any()


def test_halves_and_what_they_left_out_are_the_floats(rng: np.random.Generator) -> None:
    turns, num_blocks = Turns(random_rotary(rng, 80), 32), MIN_BLOCKS + 1
    floats = np.array(turns.floats(num_blocks))
    plain, halves = (
        np.array(turns.halves(num_blocks, parts)).view(np.float16).reshape(len(floats), parts, -1) for parts in (1, 2)
    )
    np.testing.assert_array_equal(plain[:, 0], halves[:, 0])
    np.testing.assert_allclose(halves[:, 0], floats, atol=2.0**-12, rtol=1e-6)
    np.testing.assert_allclose(halves.astype(np.float64).sum(axis=1), floats, atol=2.0**-21)


@pytest.mark.parametrize("num_parts", [0, 1, 2])
def test_a_table_that_has_grown_keeps_its_rows(num_parts: int, rng: np.random.Generator) -> None:
    """It is made once for many lengths, has rows to spare behind any, and a longer one begins with the shorter."""
    turns = Turns(random_rotary(rng, 64), 32)

    def rows(num_blocks: int) -> mx.array:
        return turns.halves(num_blocks, num_parts) if num_parts else turns.floats(num_blocks)

    first = rows(3)
    assert rows(MIN_BLOCKS - 2) is first
    row_size = first.size // MIN_BLOCKS
    longer = rows(MIN_BLOCKS - 1)
    assert longer.size == 2 * MIN_BLOCKS * row_size
    assert mx.array_equal(longer.reshape(-1)[: first.size], first.reshape(-1))


def test_layers_that_turn_alike_share_a_table(rng: np.random.Generator) -> None:
    def refuse(**options: Any) -> Any:
        raise AssertionError("a kernel was made")

    backend = GpuBackend("cuda", DecodeKernels("cuda", refuse))
    rotary = random_rotary(rng, 64)
    other = dataclasses.replace(rotary, frequencies=rotary.frequencies / 2)
    mean = rng.standard_normal((2, 64)).astype(np.float32)

    def turns_of(means: Means | None, fmt: KVFormat) -> object:
        store: Any = backend.new_store(LayerShape(2, 64, 64, mx.float16), fmt, means)
        return store._turns

    turning = Means(mean, mean, rotary)
    turns = turns_of(turning, KVFormat())
    assert turns is not None and turns_of(Means(mean + 1, mean, rotary), KVFormat(3, 3)) is turns
    assert turns_of(Means(mean, mean, other), KVFormat()) is not turns
    assert turns_of(turning, KVFormat(sink_tokens=16)) is not turns
    assert turns_of(turning, KVFormat(centred=False)) is None
    assert turns_of(Means(mean, mean), KVFormat()) is None


def test_factors_of_long_means_are_two_halves(rng: np.random.Generator) -> None:
    """Of one head's long mean, all heads': they share a kernel."""
    mean = rng.standard_normal((3, 128)).astype(np.float32)
    mean *= 40 / np.linalg.norm(mean, axis=1, keepdims=True)
    longer = mean * np.array([[1], [2], [1]], np.float32)
    rotary = random_rotary(rng, 128)
    assert [turning_of(Means(k, mean, rotary), KVFormat())[2] for k in (mean, longer)] == [1, 2]
