"""Prompts multiplied by weights that are expanded for one product: the same values, and only where it pays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tests.turboserve.engine.test_projections import logits_of, make_model

from turboserve.engine import expanded_products
from turboserve.engine.expanded_products import (
    PRODUCTS_UNDER_WAY,
    ExpandingLinear,
    Pace,
    choose_expanded_products,
    expand_where_it_pays,
)
from turboserve.engine.projections import arrange_projections

nn: Any = mlx.nn  # whose stubs say too little
ROOMY = 1 << 30


def pays(expanded_s: float, stored_s: float) -> bool:
    return True


def a_linear(*, bits: int = 4, group: int = 64, mode: str = "affine", bias: bool = False, width: int = 128) -> Any:
    rng = np.random.default_rng()
    dense = nn.Linear(width, 96, bias=bias)
    dense.weight = mx.array(rng.standard_normal((96, width)) / width**0.5).astype(mx.float16)
    if bias:
        dense.bias = mx.array(rng.standard_normal(96)).astype(mx.float16)
    return nn.QuantizedLinear.from_linear(dense, group, bits, mode=mode)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"bias": True},
        {"bits": 8, "group": 32},
        {"bits": 3, "bias": True},
        {"group": 32, "mode": "mxfp4"},
        {"width": 192, "bits": 6},
    ],
)
def test_a_prompt_is_multiplied_by_the_same_values(kind: dict[str, Any], dtype: mx.Dtype) -> None:
    linear = a_linear(**kind)
    expanding = ExpandingLinear(linear, 5, Pace())
    rng = np.random.default_rng()
    for shape in ((1, 5, kind.get("width", 128)), (3, 4, kind.get("width", 128)), (1, 131, kind.get("width", 128))):
        x = mx.array(rng.standard_normal(shape)).astype(dtype)
        got, expected = expanding(x), linear(x.astype(mx.float32))
        assert got.shape == expected.shape
        error: Any = mx.linalg.norm((got.astype(mx.float32) - expected).flatten()) / mx.linalg.norm(expected.flatten())
        assert error.item() < {mx.float32: 1e-3, mx.float16: 2e-3, mx.bfloat16: 1e-2}[dtype]


def test_few_rows_and_steps_of_one_token_keep_their_bits() -> None:
    linear = a_linear()
    expanding = ExpandingLinear(linear, 8, Pace())
    for shape in ((1, 7, 128), (40, 1, 128), (1, 1, 128), (30, 128)):
        x = mx.random.normal(shape).astype(mx.float16)
        assert mx.array_equal(expanding(x), linear(x)).item()


def test_a_step_over_it_can_be_traced() -> None:
    expanding = ExpandingLinear(a_linear(), 2, Pace())
    x = mx.random.normal((4, 1, 128)).astype(mx.float16)
    assert mx.array_equal(mx.compile(expanding)(x), expanding(x)).item()


def test_a_pace_holds_nothing_but_numbers_of_few_products() -> None:
    pace = Pace()
    for _ in range(7):
        pace.hand_over(mx.random.normal((1, 300, 64)) @ mx.random.normal((64, 128)))
        assert len(pace._under_way) <= PRODUCTS_UNDER_WAY
        assert all(mark.size == 1 for mark in pace._under_way)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without and with biases
def test_a_model_whose_layers_expand_computes_the_same(kind: str, joined: bool) -> None:
    model = make_model(kind)
    nn.quantize(model, group_size=32, bits=4)
    if joined:
        arrange_projections(model, join=True, most_rows=lambda _: 0, reason="")
    prompt = [np.random.default_rng().integers(0, 70, 300).tolist()]
    batches = [prompt, [[3], [9]], [[1, 2, 3]]]
    expected, parameters = [logits_of(model, tokens) for tokens in batches], dict(flat(model))
    chosen = expand_where_it_pays(model, ROOMY, pays)
    assert all(trial.least_rows == 256 for trial in chosen.trials)
    assert dict(flat(model)).keys() == parameters.keys(), "no weights are held twice"
    expanding = [module for _, module in model.named_modules() if isinstance(module, ExpandingLinear)]
    assert len(expanding) == 2 * (4 if joined else 7)
    for tokens, logits in zip(batches, expected, strict=True):
        np.testing.assert_allclose(logits_of(model, tokens), logits, rtol=1e-4, atol=1e-4)


def flat(model: Any) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(model.parameters())
    return list(found)


def test_what_a_prompt_does_not_need_is_not_computed() -> None:
    """Its logits, and of the last layer all but keys and values."""
    model = make_model()
    nn.quantize(model, group_size=32, bits=4)
    model.lm_head = nn.QuantizedLinear.from_linear(nn.Linear(64, 70, bias=False), 32, 4)
    model.args.tie_word_embeddings = False
    expand_where_it_pays(model, ROOMY, pays)
    assert type(model.lm_head) is nn.QuantizedLinear
    handed: list[str] = []
    for i, layer in enumerate(model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, ExpandingLinear) and module._pace is not None:
                handed.append(f"{i} {name}")
    assert handed and all(name.startswith("0 ") for name in handed)


def test_what_does_not_pay_stays() -> None:
    model = make_model()
    nn.quantize(model, group_size=32, bits=4)
    chosen = expand_where_it_pays(model, ROOMY, lambda expanded_s, stored_s: False)
    assert {trial.least_rows for trial in chosen.trials} == {0}
    assert "as stored" in str(chosen) and "TFLOP/s" in str(chosen)
    assert not any(isinstance(module, ExpandingLinear) for _, module in model.named_modules())


def test_fewer_rows_are_tried_until_it_does_not_pay() -> None:
    answers = iter([True, True, False])
    model = a_model_of_one()
    chosen = expand_where_it_pays(model, ROOMY, lambda expanded_s, stored_s: next(answers))
    assert [trial.least_rows for trial in chosen.trials] == [1024]


def a_model_of_one() -> Any:
    model, layer = nn.Module(), nn.Module()
    layer.child = nn.Linear(64, 64)
    model.layers = [layer]
    nn.quantize(model, group_size=32, bits=4)
    return model


def test_weights_beyond_their_share_of_memory_stay_as_stored() -> None:
    chosen = expand_where_it_pays(a_model_of_one(), 64 * 64 * 4 - 1, pays)
    assert [trial.least_rows for trial in chosen.trials] == [0]
    assert "its weights are more than" in str(chosen)


def test_a_product_that_differs_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = expanded_products._expanded
    monkeypatch.setattr(expanded_products, "_expanded", lambda linear, x: 1.05 * right(linear, x))
    chosen = expand_where_it_pays(a_model_of_one(), ROOMY, pays)
    assert [trial.least_rows for trial in chosen.trials] == [0]
    assert "differ by 0.050 of their norm" in str(chosen)


def test_a_device_that_cannot_expand_is_told_of_and_multiplies_as_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(linear: Any, x: mx.array) -> mx.array:
        raise RuntimeError("no such kernel\n here")

    monkeypatch.setattr(expanded_products, "_expanded", failing)
    model = a_model_of_one()
    with caplog.at_level("WARNING"):
        chosen = expand_where_it_pays(model, ROOMY, pays)
    assert "as stored (the trial failed: no such kernel here)" in str(chosen) and "no such kernel" in caplog.text
    assert type(model.layers[0].child) is nn.QuantizedLinear


def test_nothing_is_tried_where_it_is_not_wanted() -> None:
    assert str(choose_expanded_products(make_model(), "off")) == "by MLX (as set)"
    assert str(choose_expanded_products(make_model(), "auto")) == "by MLX (on a CPU)"
    assert "no quantised layers" in str(expand_where_it_pays(make_model(), ROOMY, pays))
