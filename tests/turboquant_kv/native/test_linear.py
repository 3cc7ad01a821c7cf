"""Products with weights as MLX stores them, at every level, beside their reference and beside MLX's own arithmetic."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.native import linear
from turboquant_kv.backends.native.backend import load_kernels
from turboquant_kv.backends.native.linear import BITS, GROUPS, NativeWeights, Quantised, reference_product

kernels, _ = load_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the native kernels are not built")
LEVELS: list[str] = [] if kernels is None else kernels.isa_levels()
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    level: str = request.param
    monkeypatch.setattr(linear, "isa_choice", lambda: level)
    return level


def random_rows(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    """With a few rows and columns much larger than the others, as in real models."""
    scales = np.exp(rng.normal(0, 2, shape[-1])).astype(np.float32)
    return (rng.standard_normal(shape) * scales).astype(np.float32)


def step_of(x: np.ndarray[Any, Any], block: int) -> np.ndarray[Any, Any]:
    """How far apart neighbouring values of rounded inputs are, for every input."""
    largest = np.abs(x.reshape(len(x), -1, block)).max(axis=-1)
    return np.repeat(largest / 32512, block, axis=-1)


@pytest.mark.usefixtures("isa")
def test_mxfp4_products_are_those_of_the_reference_and_of_float32(rng: np.random.Generator) -> None:
    for num_out, num_in in ((1, 64), (7, 384), (66, 2112)):
        spread = rng.standard_normal((num_out, num_in)) * np.exp(rng.normal(0, 3, (num_out, 1)))
        codes, scales, *_ = mx.quantize(mx.array(spread), 32, 4, mode="mxfp4")
        if num_out > 1:  # every code with every neighbour, and the smallest scale that is no zero's
            codes[0] = mx.array(np.frombuffer(rng.bytes(num_in // 2), np.uint32))
            scales[1, 0] = 1
        quantised = Quantised(scales, None, 4, 32)
        bias = mx.array(rng.standard_normal(num_out)) if num_out > 1 else None
        weights = NativeWeights(codes, quantised, bias)
        dense: np.ndarray[Any, Any] = np.array(quantised.dense(codes))
        added = 0 if bias is None else np.array(bias)
        for num_rows in (1, int(rng.integers(2, 9)), 37):
            x = random_rows(rng, num_rows, num_in)
            got = np.array(weights.multiply(mx.array(x)))
            # Codes are moved by 12 of their 24 steps, so terms are up to three times as large as the weights.
            steps, summing = step_of(x, 32), 6e-6 * (np.abs(x) @ np.abs(dense).T + np.abs(added)) + 1e-6 * np.abs(got)
            flips = 2 * steps.max(-1, keepdims=True) * np.abs(dense).max()
            assert (np.abs(got - reference_product(x, dense, 32) - added) <= flips + summing).all()
            alone = np.array(weights.multiply(mx.array(x[:1])))
            assert np.array_equal(alone, got[:1])
        table = np.array(weights.look_up(mx.arange(num_out)))
        assert np.abs(table - dense).max() <= 1e-37


@pytest.mark.parametrize("bits", [*BITS, 0])
@pytest.mark.usefixtures("isa")
def test_rows_of_tables_are_those_of_mlx(bits: int, rng: np.random.Generator) -> None:
    """Of quantised ones, and of floats (0)."""
    for group in GROUPS:
        dtype = FLOATS[int(rng.integers(1, len(FLOATS)))]
        weight = mx.array(rng.standard_normal((9, 384))).astype(dtype)
        quantised = None
        if bits:
            weight, scales, biases = mx.quantize(weight, group, bits)
            quantised = Quantised(scales, biases, bits, group)
        dense = np.array(weight.astype(mx.float32) if quantised is None else quantised.dense(weight))
        weights, ids = NativeWeights(weight, quantised), rng.integers(0, 9, (2, 3))
        assert np.allclose(np.array(weights.look_up(mx.array(ids))), dense[ids], rtol=0, atol=1e-6)
        for bad in (-1, 9, 1 << 40):
            with pytest.raises(ValueError, match=f"row {bad} is not among the table's 9"):
                weights.look_up(mx.array([0, bad], dtype=mx.int64))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.usefixtures("isa")
def test_quantised_products_are_those_of_the_reference_and_of_float32(
    bits: int, group: int, rng: np.random.Generator
) -> None:
    odd = [] if group > 64 else [(5, 64), (6, 576), (4, 2112)]  # units without another
    for num_out, num_in in ((1, 128), (7, 384), (66, 2304), *odd):
        dtype = FLOATS[int(rng.integers(len(FLOATS)))]
        stored = mx.quantize(mx.array(rng.standard_normal((num_out, num_in))).astype(dtype), group, bits)
        codes, scales, biases = stored
        bias = mx.array(rng.standard_normal(num_out)).astype(dtype) if num_out > 1 else None
        weights = NativeWeights(codes, Quantised(scales, biases, bits, group), bias)
        dense = np.array(mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group, bits))
        added = 0 if bias is None else np.array(bias.astype(mx.float32))
        for num_rows in (1, int(rng.integers(2, 9)), 37):
            x = random_rows(rng, num_rows, num_in)
            got = np.array(weights.multiply(mx.array(x)))
            steps, summing = step_of(x, min(group, 64)), 2e-6 * (np.abs(x) @ np.abs(dense).T + np.abs(added))
            # An input between two steps may go to either: one or two of a row's do so, never all.
            flips = 2 * steps.max(-1, keepdims=True) * np.abs(dense).max()
            assert (np.abs(got - reference_product(x, dense, min(group, 64)) - added) <= flips + summing).all()
            assert (np.abs(got - x @ dense.T - added) <= 0.51 * steps @ np.abs(dense).T + summing).all()
            # Whoever else is multiplied in the same call: a row keeps its bits.
            alone = np.concatenate([np.array(weights.multiply(mx.array(x[i : i + 1]))) for i in range(num_rows)])
            assert np.array_equal(alone, got)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.usefixtures("isa")
def test_products_with_16_bit_floats_are_those_of_float32(dtype: mx.Dtype, rng: np.random.Generator) -> None:
    for num_out, num_in in ((1, 64), (7, 192), (131, 1088)):
        weight = mx.array(rng.standard_normal((num_out, num_in))).astype(dtype)
        weights, dense = NativeWeights(weight), np.array(weight.astype(mx.float32))
        x = random_rows(rng, 2, int(rng.integers(1, 20)), num_in)
        got = np.array(weights.multiply(mx.array(x)))
        assert got.shape == (*x.shape[:2], num_out)
        assert np.linalg.norm(got - x @ dense.T) <= 1e-5 * np.linalg.norm(np.abs(x) @ np.abs(dense).T)


@pytest.mark.usefixtures("isa")
def test_rows_that_are_no_numbers_spoil_themselves_only(rng: np.random.Generator) -> None:
    codes, scales, biases = mx.quantize(mx.array(rng.standard_normal((9, 128)).astype(np.float32)), 64, 4)
    weights = NativeWeights(codes, Quantised(scales, biases, 4, 64))
    x = random_rows(rng, 5, 128)
    x[0] = 0
    clean = np.array(weights.multiply(mx.array(x)))
    assert np.array_equal(clean[0], np.zeros(9))
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[2, int(rng.integers(128))] = bad
        got = np.array(weights.multiply(mx.array(spoilt)))
        assert np.isnan(got[2]).all() and np.array_equal(np.delete(got, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_no_numbers_spoil_their_output_only(
    bits: int, dtype: mx.Dtype, rng: np.random.Generator
) -> None:
    """Several outputs' scales share a register where a row's are no multiple of its lanes."""
    for num_in, group in ((128, 64), (576, 64), (1088, 32), (640, 128)):
        codes, scales, biases = mx.quantize(mx.array(rng.standard_normal((23, num_in))).astype(dtype), group, bits)
        x = mx.array(random_rows(rng, int(rng.integers(1, 7)), num_in))
        clean = np.array(NativeWeights(codes, Quantised(scales, biases, bits, group)).multiply(x))
        output, place = int(rng.integers(23)), int(rng.choice([0, num_in // group - 1]))
        for figures in (scales, biases):
            kept = mx.array(figures[output, place])
            figures[output, place] = float(rng.choice([np.nan, np.inf, -np.inf]))
            got = np.array(NativeWeights(codes, Quantised(scales, biases, bits, group)).multiply(x))
            figures[output, place] = kept
            assert not np.isfinite(got[:, output]).any()
            np.testing.assert_array_equal(np.delete(got, output, 1), np.delete(clean, output, 1))


def test_inputs_may_be_views_of_any_float_type(rng: np.random.Generator) -> None:
    weights = NativeWeights(mx.array(rng.standard_normal((12, 64))).astype(mx.float16))
    x = mx.array(random_rows(rng, 64, 3, 2))
    turned = x.transpose(2, 1, 0)
    assert mx.array_equal(weights.multiply(turned), weights.multiply(mx.array(np.array(turned))))
    half = turned.astype(mx.bfloat16)
    assert mx.array_equal(weights.multiply(half), weights.multiply(half.astype(mx.float32)))
    assert weights.multiply(mx.zeros((0, 64))).shape == (0, 12)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    assert kernels is not None
    codes, scales, biases = mx.quantize(mx.zeros((4, 128)), 64, 4)
    good = {"codes": codes, "scales": scales, "biases": biases, "floats": None, "offset": None, "bits": 4, "group": 64}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"bits": 7}, "bits"),
        ({"bits": 0}, "bits"),
        ({"group": 16}, "groups"),
        ({"group": 128}, "along axis 1"),
        ({"codes": mx.contiguous(codes[:, :4])}, "multiple of 64"),
        ({"codes": mx.contiguous(codes[:3])}, "along axis 0"),
        ({"scales": scales.astype(mx.float16)}, "another type"),
        ({"scales": scales.astype(mx.int32)}, "float32, float16 or bfloat16"),
        ({"offset": mx.zeros(5)}, "along axis 0"),
        ({"floats": mx.zeros((4, 128))}, "float32"),
        ({"floats": mx.zeros((4, 100), mx.float16)}, "multiple of 64"),
        ({"isa": "abacus"}, "abacus"),
    ]
    for change, said in bad:
        with pytest.raises(ValueError, match=said):
            kernels.LinearWeights(**{**good, "isa": "auto", **change})
    weights = kernels.LinearWeights(**good, isa="auto")
    for x, y, said in (
        (np.zeros((2, 127), np.float32), np.zeros((2, 4), np.float32), "along axis 1"),
        (np.zeros((2, 128), np.float64), np.zeros((2, 4), np.float32), "type"),
        (np.zeros((2, 128), np.float32), np.zeros((3, 4), np.float32), "along axis 0"),
        (np.zeros((2, 256), np.float32)[:, ::2], np.zeros((2, 4), np.float32), "contiguous"),
        (np.zeros((2, 128), np.float32), np.zeros((2, 8), np.float32)[:, ::2], "contiguous"),
    ):
        with pytest.raises(ValueError, match=said):
            weights.multiply(x, y)
