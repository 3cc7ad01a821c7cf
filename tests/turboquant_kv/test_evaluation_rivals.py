"""Rivals' codes are those of their own programs, and cost what those allocate."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache
from tests.turboquant_kv.product_form import Sketch, decode_product, encode_product

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError
from turboquant_kv.codec.reference import decode, encode
from turboquant_kv.codec.rotation import rotation_matrix
from turboquant_kv.evaluation.rivals import Affine, Blocks, ProductForm, Rival, Rotated, _gaussian, standard_rivals

SHAPE = LayerShape(2, 64, 128, mx.float16)
BY_NAME = {rival.name: rival for rival in standard_rivals()}


def fetched(rival: Rival, k: np.ndarray, v: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What attention would see of k (H, T, D), v (H, T, Dv), appended in pieces."""
    cache = rival.new_cache(LayerShape(len(k), k.shape[-1], v.shape[-1], mx.float32))
    for start, end in zip([0, *cuts], [*cuts, k.shape[1]], strict=True):
        keys, values = cache.update_and_fetch(*(mx.array(x[None, :, start:end].astype(np.float32)) for x in (k, v)))
    return np.array(keys[0]), np.array(values[0])


def block_of_32(x: np.ndarray, bits: int) -> np.ndarray:
    """One block as llama.cpp's quantize_row_q8_0_ref and quantize_row_q4_0_ref have it, one coordinate at a time."""
    extreme = max(x, key=abs)
    d = abs(extreme) / 127 if bits == 8 else extreme / -8
    out = []
    for value in x:
        code = round(value / d) if bits == 8 else min(15, math.floor(value / d + 8.5)) - 8
        out.append(code * float(np.float16(d)))
    return np.array(out)


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_llama_cpp_s(bits: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 5, 96)) * rng.lognormal(0, 2, (3, 5, 1))
    got = Blocks(bits).round_trip(x).reshape(-1, 32)
    for block, expected in zip(got, x.reshape(-1, 32), strict=True):
        np.testing.assert_allclose(block, block_of_32(expected, bits), rtol=1e-12, atol=1e-12)
    assert not Blocks(bits).round_trip(np.zeros((2, 32))).any()


def test_product_form_keys_are_its_reference_s(rng: np.random.Generator) -> None:
    k, v = rng.standard_normal((2, 37, 64)), rng.standard_normal((2, 37, 128))
    rival = BY_NAME["prod44"]
    assert isinstance(rival, ProductForm)
    rotation = rotation_matrix(64, rival.fmt.rotation_seed, "k")
    sketch = Sketch(_gaussian(64), math.sqrt(math.pi / 2) / 64)
    x = k.astype(np.float32)  # as the cache gets it
    expected = decode_product(encode_product(x, 4, rotation, sketch), 4, 64, rotation, sketch)
    got_k, got_v = fetched(rival, k, v, [5, 21])
    np.testing.assert_allclose(got_k, expected, atol=1e-5)
    assert 0.001 < np.square(got_v - v).mean() < 0.02  # four bits of Lloyd-Max: .0095


def test_plain_rotation_has_one_norm_and_nothing_exact(rng: np.random.Generator) -> None:
    k, v = rng.standard_normal((2, 50, 64)) + 3, rng.standard_normal((2, 50, 128))
    rival = BY_NAME["r44"]
    assert isinstance(rival, Rotated)
    got = fetched(rival, k, v, [1, 2, 33])
    for x, seen, side in ((k, got[0], "k"), (v, got[1], "v")):
        rotation = rotation_matrix(x.shape[-1], 2504, "k" if side == "k" else "v")
        codec = KVFormat(4, 4, scale="norm").keys
        expected = decode(encode(x.astype(np.float32), codec, rotation), codec, x.shape[-1], rotation)
        np.testing.assert_allclose(seen, expected, atol=1e-5)
        norms = np.linalg.norm(x, axis=-1)
        np.testing.assert_allclose(np.linalg.norm(seen, axis=-1), norms, rtol=1e-3)
        assert (np.abs(seen - x).max(axis=-1) > 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_tokens", [1, 256, 300])
def test_affine_bytes_are_those_that_mlx_lm_allocates(bits: int, num_tokens: int) -> None:
    cache = Affine(bits).new_cache(SHAPE)
    assert isinstance(cache, QuantizedKVCache)
    cache.update_and_fetch(*(mx.zeros((1, 2, num_tokens, dim), mx.float16) for dim in (64, 128)))
    assert Affine(bits).bytes_for(SHAPE, num_tokens) == cache.nbytes


def test_bytes_of_the_others() -> None:
    """Per head and token: codes of 64 + 128 coordinates, and their float16 numbers."""
    heads, tokens = 2, 1000
    for name, per_head in (
        ("r44", 96 + 2 * 2),
        ("prod44", 96 + 3 * 2),
        ("q4_0", 96 + 6 * 2),
        ("q8_0", 192 + 6 * 2),
    ):
        assert BY_NAME[name].bytes_for(SHAPE, tokens) == heads * tokens * per_head


def test_dimensions_without_groups_are_refused() -> None:
    odd = LayerShape(2, 80, 80, mx.float16)
    for rival in (Affine(4), Affine(8), Blocks(4), Blocks(8)):
        with pytest.raises(UnsupportedFormatError, match="80"):
            rival.check(odd)
    for fitting in standard_rivals():
        fitting.check(SHAPE)
    with pytest.raises(UnsupportedFormatError):
        BY_NAME["r44"].check(LayerShape(2, 72, 72, mx.float16))
