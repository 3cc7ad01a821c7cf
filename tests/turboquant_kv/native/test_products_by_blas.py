"""Products by OpenBLAS over weights widened strip by strip: those of float32, and beside the kernels' own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv import blas
from turboquant_kv.backends.native import linear
from turboquant_kv.backends.native.backend import load_kernels
from turboquant_kv.backends.native.block import BlockShape, NativeBlock, Norms
from turboquant_kv.backends.native.linear import BITS, DENSE_ROWS, GROUPS, NativeWeights, Quantised

kernels, _ = load_kernels()
pytestmark = pytest.mark.skipif(
    kernels is None or not blas.product_address(), reason="the native kernels are not built, or OpenBLAS is missing"
)
LEVELS: list[str] = [] if kernels is None else kernels.isa_levels()
KINDS = [*((bits, group) for bits in BITS for group in GROUPS), "mxfp4", "float16", "bfloat16"]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    level: str = request.param
    monkeypatch.setattr(linear, "isa_choice", lambda: level)
    return level


def stored(rng: np.random.Generator, num_out: int, num_in: int, kind: Any) -> tuple[NativeWeights, Floats, Floats]:
    """Random weights with biases: as the kernels hold them, as float32 and the biases."""
    weight = mx.array(rng.standard_normal((num_out, num_in)) * np.exp(rng.normal(0, 1, (num_out, 1))))
    bias = rng.standard_normal(num_out).astype(np.float32)
    if kind == "mxfp4":
        codes, scales, *_ = mx.quantize(weight, 32, 4, mode="mxfp4")
        quantised = Quantised(scales, None, 4, 32)
    elif isinstance(kind, str):
        weight = weight.astype(getattr(mx, kind))
        return NativeWeights(weight, None, mx.array(bias)), np.array(weight.astype(mx.float32)), bias
    else:
        bits, group = kind
        codes, scales, biases = mx.quantize(weight.astype(mx.bfloat16), group, bits)
        quantised = Quantised(scales, biases, bits, group)
    return NativeWeights(codes, quantised, mx.array(bias)), np.array(quantised.dense(codes)), bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("isa")
def test_products_are_those_of_float32_and_of_the_own_kernel(kind: Any, rng: np.random.Generator) -> None:
    """Shapes of one strip and of several, whole and in part; one row and one output as well."""
    for num_out, num_in in ((1, 128), (7, 384), (300, 1152), (66, 2176)):
        weights, dense, bias = stored(rng, num_out, num_in, kind)
        for num_rows in (1, 5, 67):
            x = rng.standard_normal((num_rows, num_in)).astype(np.float32)
            num_tried = int(rng.integers(1, num_out + 1))
            want = (x @ dense.T + bias)[:, :num_tried]
            allowed = (np.abs(x) @ np.abs(dense).T + np.abs(bias))[:, :num_tried]
            assert (np.abs(weights.trial(x, num_tried, by_blas=True) - want) <= 2e-6 * allowed).all()
            assert (np.abs(weights.trial(x, num_tried, by_blas=False) - want) <= 2e-4 * allowed).all()


@pytest.mark.usefixtures("isa")
def test_whole_blocks_of_a_sequence_go_to_it_and_no_other_rows(rng: np.random.Generator) -> None:
    weights, _, _ = stored(rng, 130, 192, (4, 64))
    weights.set_dense(True)
    for shape in (
        (3, DENSE_ROWS),
        (1, 3 * DENSE_ROWS + 5),
        (3 * DENSE_ROWS,),
        (2, DENSE_ROWS - 1),
        (2, DENSE_ROWS + 1),
    ):
        x = rng.standard_normal((*shape, 192)).astype(np.float32)
        got, rows = np.array(weights.multiply(mx.array(x))).reshape(-1, 130), x.reshape(-1, 192)
        seq_len = shape[-1] if len(shape) > 1 else 1
        is_dense = np.arange(len(rows)) % seq_len < seq_len // DENSE_ROWS * DENSE_ROWS
        # Tasks are cut otherwise than in a trial, and OpenBLAS may then add up in another order.
        by_blas, own = (weights.trial(rows, 130, way) for way in (True, False))
        of_blas, of_own = (np.linalg.norm(got - other, axis=1) for other in (by_blas, own))
        assert (of_blas < of_own / 5)[is_dense].all() and np.array_equal(got[~is_dense], own[~is_dense])
    weights.set_dense(False)
    got = np.array(weights.multiply(mx.array(x))).reshape(-1, 130)
    assert np.array_equal(got, own)


@pytest.mark.parametrize("kind", [(4, 64), (8, 32), "float16"])
@pytest.mark.usefixtures("isa")
def test_rows_get_the_same_bits_in_any_company(kind: Any, rng: np.random.Generator) -> None:
    """Alone, beside other sequences, and cut into chunks of whole blocks."""
    weights, _, _ = stored(rng, 200, 320, kind)
    weights.set_dense(True)
    seq_len = 3 * DENSE_ROWS + int(rng.integers(1, DENSE_ROWS))
    x = mx.array(rng.standard_normal((5, seq_len, 320)).astype(np.float32))
    together = np.array(weights.multiply(x))
    for i, sequence in enumerate(x):
        assert np.array_equal(weights.multiply(sequence[None])[0], together[i])
        for cut in (DENSE_ROWS, 2 * DENSE_ROWS):
            parts = [np.array(weights.multiply(part[None]))[0] for part in (sequence[:cut], sequence[cut:])]
            assert np.array_equal(np.concatenate(parts), together[i])


@pytest.mark.parametrize("kind", [(4, 64), (6, 32), "mxfp4"])
@pytest.mark.usefixtures("isa")
def test_rows_that_are_no_numbers_spoil_themselves_only(kind: Any, rng: np.random.Generator) -> None:
    for num_out in (1, 70):
        weights, _, _ = stored(rng, num_out, 128, kind)
        weights.set_dense(True)
        x = rng.standard_normal((2, DENSE_ROWS + 9, 128)).astype(np.float32)
        clean = np.array(weights.multiply(mx.array(x)))
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = x.copy()
            rows = [2, DENSE_ROWS + 3]  # in a whole block, and behind it
            spoilt[1, rows, int(rng.integers(128))] = bad
            got = np.array(weights.multiply(mx.array(spoilt)))
            assert np.isnan(got[1, rows]).all()
            got[1, rows] = clean[1, rows]
            assert np.array_equal(got, clean)


@pytest.mark.usefixtures("isa")
def test_decoder_layers_are_those_of_the_own_kernel(rng: np.random.Generator) -> None:
    """Heads that share a task, kinds of which some go to OpenBLAS and some do not."""
    shape, width, hidden = BlockShape(10, 5, 32, 64, 16, is_interleaved=False), 192, 320
    sizes = [(320, width), (160, width), (320, width), (width, 640), (hidden, width), (hidden, width), (width, hidden)]
    kinds: list[Any] = [(4, 64), (8, 32), "float16", (4, 64), (3, 64), "mxfp4", (4, 32)]
    linears = [stored(rng, *size, kind)[0] for size, kind in zip(sizes, kinds, strict=True)]
    norm = mx.array(rng.uniform(0.5, 2, width)), 1e-5
    head_norm = mx.array(rng.uniform(0.5, 2, 32)), 1e-5
    block = NativeBlock(linears, Norms(norm, norm, head_norm, None), shape)
    seq_len = DENSE_ROWS + 33
    x = rng.standard_normal((2, seq_len, width)).astype(np.float32)
    turn = rng.standard_normal((1, seq_len, 32)).astype(np.float32)
    attended = rng.standard_normal((2, 10, seq_len, 64)).astype(np.float32)
    wanted = [*block.inputs(x, turn), block.outputs(x, attended)]
    for chosen in (range(7), (0, 3, 5), (1, 2, 4, 6)):
        for i, weights in enumerate(linears):
            weights.set_dense(i in chosen)
        for got, want in zip([*block.inputs(x, turn), block.outputs(x, attended)], wanted, strict=True):
            assert np.linalg.norm(got - want) <= 3e-4 * np.linalg.norm(want)
        assert not all(map(np.array_equal, block.inputs(x, turn), wanted))
        short = [a[:, :1].copy() for a in (x, turn)]
        for got, want in zip(block.inputs(*short), wanted, strict=False):
            assert np.array_equal(got[:, :, 0], want[:, :, 0])  # a step's rows keep the own kernel's bits


def test_what_it_does_not_take_is_refused(rng: np.random.Generator) -> None:
    assert kernels is not None
    weights, _, _ = stored(rng, 8, 64, (4, 64))
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="more outputs than there are"):
        weights.trial(x, 9, by_blas=False)
    with pytest.raises(ValueError, match="no whole sequences"):
        weights.held.multiply(x, np.empty((2, 8), np.float32), 3)
    try:
        kernels.set_blas(0)
        with pytest.raises(ValueError, match="no BLAS"):
            weights.trial(x, 8, by_blas=True)
        weights.set_dense(True)
        rows = mx.array(rng.standard_normal((1, DENSE_ROWS, 64)).astype(np.float32))
        assert np.array_equal(weights.multiply(rows)[0], weights.trial(np.array(rows[0]), 8, by_blas=False))
    finally:
        kernels.set_blas(blas.product_address())
