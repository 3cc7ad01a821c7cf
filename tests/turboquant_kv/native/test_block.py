"""Decoder layers around their attention, at every level, beside their reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from turboquant_kv.backends.native import linear
from turboquant_kv.backends.native.backend import load_kernels
from turboquant_kv.backends.native.block import (
    BlockShape,
    NativeBlock,
    Norms,
    reference_gate,
    reference_norm,
    reference_turn,
)
from turboquant_kv.backends.native.linear import NativeWeights, Quantised

kernels, _ = load_kernels()
pytestmark = pytest.mark.skipif(kernels is None, reason="the native kernels are not built")
LEVELS: list[str] = [] if kernels is None else kernels.isa_levels()
Floats = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    level: str = request.param
    monkeypatch.setattr(linear, "isa_choice", lambda: level)
    return level


class Layer:
    """Random weights of one layer, as the kernels hold them and dense."""

    def __init__(
        self,
        rng: np.random.Generator,
        shape: BlockShape,
        width: int,
        hidden: int,
        kinds: list[Any],
        *,
        head_norms: bool,
    ) -> None:
        """kinds: of each linear layer (bits, group), or a 16-bit dtype."""
        self.shape, self.width = shape, width
        heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.num_kv_heads * shape.v_dim
        sizes = [(n, width) for n in heads] + [(width, shape.num_heads * shape.v_dim)]
        sizes += [(hidden, width), (hidden, width), (width, hidden)]
        self.dense: list[Floats] = []
        self.bias: list[Floats] = []
        linears = []
        for (num_out, num_in), kind in zip(sizes, kinds, strict=True):
            weight = mx.array(rng.standard_normal((num_out, num_in)) / np.sqrt(num_in)).astype(mx.float16)
            bias = rng.standard_normal(num_out).astype(np.float32)
            quantised = None
            if isinstance(kind, tuple):
                bits, group = kind
                weight, scales, biases = mx.quantize(weight, group, bits)
                quantised = Quantised(scales, biases, bits, group)
                wide = scales.astype(mx.float32), biases.astype(mx.float32)
                self.dense.append(np.array(mx.dequantize(weight, *wide, group, bits)))
            else:
                weight = weight.astype(kind)
                self.dense.append(np.array(weight.astype(mx.float32)))
            self.bias.append(bias)
            linears.append(NativeWeights(weight, quantised, mx.array(bias)))

        def norm(n: int) -> tuple[Floats, float]:
            return rng.uniform(0.5, 2, n).astype(np.float32), float(rng.choice([1e-6, 1e-2]))

        both = (norm(shape.head_dim), norm(shape.head_dim)) if head_norms else (None, None)
        self.norms = (norm(width), norm(width), *both)
        given = [None if n is None else (mx.array(n[0]), n[1]) for n in self.norms]
        self.native = NativeBlock(linears, Norms(*given), shape)  # type: ignore[arg-type]  # the first two are there

    def product(self, i: int, x: Floats) -> Floats:
        return x @ self.dense[i].T + self.bias[i]

    def normed(self, i: int, x: Floats) -> Floats:
        found = self.norms[i]
        return x if found is None else reference_norm(x, *found)

    def inputs(self, x: Floats, turn: Floats) -> list[Floats]:
        shape, (batch, num_rows, _) = self.shape, x.shape
        after = self.normed(0, x)
        sides = []
        for i, heads in enumerate((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)):
            side = self.product(i, after).reshape(batch, num_rows, heads, -1).transpose(0, 2, 1, 3)
            if i < 2:
                side = self.normed(2 + i, side)
                side = reference_turn(side, turn[:, None], shape.num_pairs, is_interleaved=shape.is_interleaved)
            sides.append(side)
        return sides

    def outputs(self, x: Floats, attended: Floats) -> Floats:
        batch, num_rows, _ = x.shape
        h = x + self.product(3, attended.transpose(0, 2, 1, 3).reshape(batch, num_rows, -1))
        after = self.normed(1, h)
        return h + self.product(6, reference_gate(self.product(4, after), self.product(5, after)))


def turn_of(rng: np.random.Generator, shape: BlockShape, batch: int, num_rows: int) -> Floats:
    angles = rng.uniform(0, 100, (batch, num_rows, shape.num_pairs))
    pairs = np.arange(shape.num_pairs)
    first, second = (2 * pairs, 2 * pairs + 1) if shape.is_interleaved else (pairs, pairs + shape.num_pairs)
    turn = rng.uniform(0.5, 2, (batch, num_rows, shape.head_dim)).astype(np.float32)
    turn[..., first], turn[..., second] = np.cos(angles), np.sin(angles)
    return turn


def is_near(got: Floats, want: Floats, tolerance: float) -> bool:
    return bool(np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want))


Q4, Q4_32, Q8, F16, BF16 = (4, 64), (4, 32), (8, 64), mx.float16, mx.bfloat16
CASES: list[tuple[BlockShape, int, int, list[Any], bool]] = [
    (BlockShape(4, 2, 32, 32, 16, is_interleaved=False), 128, 192, [Q4] * 7, False),
    (BlockShape(3, 1, 64, 64, 32, is_interleaved=True), 192, 256, [Q4_32] * 4 + [(6, 64)] * 3, True),
    (
        BlockShape(6, 3, 64, 32, 10, is_interleaved=False),
        256,
        448,
        [F16, Q8, BF16, F16, (3, 32), (5, 64), (2, 64)],
        True,
    ),
    (BlockShape(5, 5, 128, 128, 0, is_interleaved=False), 320, 640, [Q8, Q4_32, Q4, (2, 128), Q4, Q4_32, BF16], False),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.usefixtures("isa")
def test_layers_are_those_of_the_reference_and_rows_the_same_in_any_batch(case: int, rng: np.random.Generator) -> None:
    shape, width, hidden, kinds, head_norms = CASES[case]
    layer = Layer(rng, shape, width, hidden, kinds, head_norms=head_norms)
    for batch, num_rows in ((1, 1), (3, 1), (2, 5), (1, 37)):
        x = rng.standard_normal((batch, num_rows, width)).astype(np.float32)
        turn = turn_of(rng, shape, batch, num_rows)
        got = layer.native.inputs(x, turn)
        for side, want in zip(got, layer.inputs(x, turn), strict=True):
            assert side.shape == want.shape and is_near(side, want, 3e-4)
        attended = rng.standard_normal((batch, shape.num_heads, num_rows, shape.v_dim)).astype(np.float32)
        y = layer.native.outputs(x, attended)
        assert is_near(y, layer.outputs(x, attended), 3e-4)
        for b in range(batch):
            for t in range(num_rows):
                row = slice(b, b + 1), slice(t, t + 1)
                alone = layer.native.inputs(np.ascontiguousarray(x[row]), np.ascontiguousarray(turn[row]))
                for side, one in zip(got, alone, strict=True):
                    assert np.array_equal(side[b, :, t], one[0, :, 0])
                heads = np.ascontiguousarray(attended[b : b + 1, :, t : t + 1])
                assert np.array_equal(y[row], layer.native.outputs(np.ascontiguousarray(x[row]), heads))


@pytest.mark.usefixtures("isa")
def test_one_turn_serves_all_sequences_and_attention_may_be_a_view(rng: np.random.Generator) -> None:
    shape, width, hidden, kinds, head_norms = CASES[0]
    layer = Layer(rng, shape, width, hidden, kinds, head_norms=head_norms)
    x, turn = rng.standard_normal((2, 3, width)).astype(np.float32), turn_of(rng, shape, 1, 3)
    for one, both in zip(layer.native.inputs(x, turn), layer.native.inputs(x, np.repeat(turn, 2, 0)), strict=True):
        assert np.array_equal(one, both)
    view = rng.standard_normal((3, 2, 4, 64)).astype(np.float32).transpose(1, 2, 0, 3)[..., :32]
    assert np.array_equal(layer.native.outputs(x, view), layer.native.outputs(x, np.ascontiguousarray(view)))
    empty = layer.native.inputs(np.zeros((0, 1, width), np.float32), turn[:, :1])
    assert [side.size for side in empty] == [0, 0, 0]


@pytest.mark.usefixtures("isa")
def test_rows_that_are_no_numbers_spoil_themselves_only(rng: np.random.Generator) -> None:
    for case in (0, 2):
        shape, width, hidden, kinds, head_norms = CASES[case]
        layer = Layer(rng, shape, width, hidden, kinds, head_norms=head_norms)
        x, turn = rng.standard_normal((3, 1, width)).astype(np.float32), turn_of(rng, shape, 3, 1)
        attended = rng.standard_normal((3, shape.num_heads, 1, shape.v_dim)).astype(np.float32)
        clean, after = layer.native.inputs(x, turn), layer.native.outputs(x, attended)
        for bad in (np.nan, np.inf, -np.inf):
            spoilt, spoilt_heads = x.copy(), attended.copy()
            spoilt[1, 0, int(rng.integers(width))] = bad
            for side, want in zip(layer.native.inputs(spoilt, turn), clean, strict=True):
                assert np.isnan(side[1]).all() and np.array_equal(side[[0, 2]], want[[0, 2]])
            spoilt_heads[1, 0, 0, 0] = bad
            for y in (layer.native.outputs(spoilt, attended), layer.native.outputs(x, spoilt_heads)):
                assert not np.isfinite(y[1]).any() and np.array_equal(y[[0, 2]], after[[0, 2]])


@pytest.mark.usefixtures("isa")
def test_gates_of_any_size(rng: np.random.Generator) -> None:
    """Through weights that pass one input on: what a gate makes of 200 and of -200 is neither NaN nor infinite."""
    eye = mx.eye(64).astype(mx.float16)
    zero = mx.zeros((64, 64), mx.float16)
    shape = BlockShape(1, 1, 64, 64, 0, is_interleaved=False)
    one = mx.ones(64), 0.0
    linears = [NativeWeights(w) for w in (zero, zero, zero, zero, eye * 100, eye, eye)]
    block = NativeBlock(linears, Norms(one, one), shape)
    x = rng.standard_normal((1, 1, 64)).astype(np.float32)
    x[0, 0, :2] = 30, -30
    got = block.outputs(x, np.zeros((1, 1, 1, 64), np.float32)) - x
    after = reference_norm(x, np.ones(64, np.float32), 0.0)
    assert np.isfinite(got).all()
    assert np.abs(got - reference_gate(after * 100, after)).max() <= 1e-4 * np.abs(after).max() ** 2 * 100


def test_what_the_kernels_do_not_take_is_refused(rng: np.random.Generator) -> None:
    assert kernels is not None
    shape, width, hidden, kinds, _ = CASES[0]
    layer = Layer(rng, shape, width, hidden, kinds, head_norms=False)
    weights = [NativeWeights(mx.array(w).astype(mx.float16)).held for w in layer.dense]
    norms: list[Any] = [np.ones(128, np.float32), np.ones(128, np.float32), None, None]
    good: dict[str, Any] = {"linears": weights, "norms": norms, "eps": [1e-5] * 4}
    good |= {"num_heads": 4, "num_kv_heads": 2, "num_pairs": 16, "is_interleaved": False}
    assert kernels.DecoderBlock(**good)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"linears": weights[:6]}, "7 linear layers"),
        ({"linears": [*weights[:6], weights[0]]}, "do not fit"),
        ({"norms": [None, *norms[1:]]}, "norms of its inputs"),
        ({"norms": [np.ones(127, np.float32), *norms[1:]]}, "along axis 0"),
        ({"norms": [*norms[:2], np.ones(16, np.float32), None]}, "along axis 0"),
        ({"eps": [float("nan"), 0, 0, 0]}, "eps"),
        ({"num_heads": 3}, "multiple of their heads"),
        ({"num_heads": 0}, "multiple of their heads"),
        ({"num_kv_heads": 1}, "do not fit"),
        ({"num_pairs": 17}, "out of range"),
    ]
    for change, said in bad:
        with pytest.raises(ValueError, match=said):
            kernels.DecoderBlock(**{**good, **change})
    zeros = np.zeros
    x, turn = zeros((2, 3, 128), np.float32), zeros((1, 3, 32), np.float32)
    outs = [zeros((2, heads, 3, 32), np.float32) for heads in (4, 2, 2)]
    block = kernels.DecoderBlock(**good)
    for call, said in (
        ((x[..., :64], turn, *outs), "along axis 2"),
        ((x.astype(np.float64), turn, *outs), "type"),
        ((x, turn[:, :2], *outs), "along axis 1"),
        ((x, zeros((3, 3, 32), np.float32), *outs), "number of sequences"),
        ((x, turn, outs[1], outs[1], outs[2]), "along axis 1"),
        ((x, turn, outs[0][:, :, ::2], outs[1], outs[2]), "along axis 2"),
        ((x, turn, outs[0].swapaxes(0, 1).copy().swapaxes(0, 1), outs[1], outs[2]), "contiguous"),
    ):
        with pytest.raises(ValueError, match=said):
            block.attention_inputs(*call)
    for call2, said in (
        ((x, outs[1], x), "along axis 1"),
        ((x, outs[0], x[:, :2]), "along axis 1"),
        ((x, outs[0].astype(np.float16), x), "type"),
        ((x, zeros((2, 4, 3, 64), np.float32)[..., ::2], x), "dense along its last axis"),
    ):
        with pytest.raises(ValueError, match=said):
            block.outputs(*call2)
