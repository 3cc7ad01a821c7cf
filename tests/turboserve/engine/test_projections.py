"""Joined projections and products row by row compute what the model's own linear layers compute."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2

from turboserve.engine import projections
from turboserve.engine.projections import (
    JoinedProjections,
    ProjectionPart,
    RowLinear,
    arrange_projections,
    choose_projections,
    joining_pays,
    most_rows_by_trial,
)

nn: Any = mlx.nn  # whose stubs say too little


def make_model(kind: str = "llama") -> Any:
    args = {
        "model_type": kind,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 70,
        "rope_theta": 10000.0,
    }
    module = {"llama": llama, "qwen2": qwen2}[kind]
    model = module.Model(module.ModelArgs.from_dict(args))
    mx.eval(model.parameters())
    return model


def num_bytes(model: Any) -> int:
    parameters: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in parameters)


def logits_of(model: Any, tokens: list[list[int]]) -> np.ndarray[Any, Any]:
    return np.array(model(mx.array(tokens)).astype(mx.float32))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without and with biases
@pytest.mark.parametrize("quantised", [False, True])
def test_a_rearranged_model_computes_the_same(kind: str, quantised: bool) -> None:
    model = make_model(kind)
    if quantised:
        nn.quantize(model, group_size=32, bits=4)
    batches = [[[3], [9], [60]], [[1, 2, 3, 4]], [[5]], [[i] for i in range(9)]]
    expected, held = [logits_of(model, tokens) for tokens in batches], num_bytes(model)
    arranged = arrange_projections(model, join=True, most_rows=lambda _: 4, reason="")
    assert arranged.num_joined == 4  # two groups in each of two layers
    assert arranged.most_rows == (0 if quantised else 4)
    assert num_bytes(model) == held, "joined weights take the place of the others"
    for tokens, logits in zip(batches, expected, strict=True):
        np.testing.assert_allclose(logits_of(model, tokens), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_multiply_one_by_one_up_to_the_limit(dtype: mx.Dtype, has_bias: bool) -> None:
    rng = np.random.default_rng()
    weight, bias = mx.array(rng.standard_normal((37, 64)) / 8).astype(dtype), mx.array(rng.standard_normal(37))
    linear = RowLinear(weight, bias.astype(dtype) if has_bias else None, most_rows=5)
    for num_rows in (1, 2, 5, 6):
        x = mx.array(rng.standard_normal((num_rows, 1, 64))).astype(dtype)
        expected = np.array(x.astype(mx.float32)) @ np.array(weight.astype(mx.float32)).T
        if has_bias:
            expected += np.array(bias.astype(dtype).astype(mx.float32))
        got = linear(x)
        assert got.shape == (num_rows, 1, 37) and got.dtype == dtype
        tolerance = 1e-5 if dtype == mx.float32 else 0.05
        np.testing.assert_allclose(np.array(got.astype(mx.float32)), expected, rtol=tolerance, atol=tolerance)


def test_parts_may_be_asked_for_in_any_order_and_of_other_inputs_between() -> None:
    linear = nn.Linear(8, 6, bias=False)
    joined = JoinedProjections(linear, [1, 2, 3])
    x, y = mx.random.normal((2, 3, 8)), mx.random.normal((2, 3, 8))
    of_x, of_y = np.array(linear(x)), np.array(linear(y))
    for part, asked, expected in (
        (2, x, of_x[..., 3:]),
        (1, y, of_y[..., 1:3]),
        (0, x, of_x[..., :1]),
        (0, x, of_x[..., :1]),  # twice the same part
        (2, y, of_y[..., 3:]),
    ):
        np.testing.assert_array_equal(np.array(joined.part(asked, part)), expected)


def test_no_activations_are_kept() -> None:
    model = make_model()
    arrange_projections(model, join=True, most_rows=lambda _: 4, reason="")
    logits_of(model, [[1, 2, 3]])
    gc.collect()
    parts = [m for _, m in model.named_modules() if isinstance(m, ProjectionPart)]
    assert len(parts) == 2 * 5
    assert not any(part.joined.is_holding or part.joined._parts for part in parts)


def test_projections_that_are_not_all_asked_for_stay_apart() -> None:
    class Half(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.embed = nn.Embedding(4, 8)

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.gate_proj(self.embed(tokens))  # type: ignore[no-any-return]

    model = Half()
    gate, up = np.array(model.gate_proj.weight), np.array(model.up_proj.weight)
    assert arrange_projections(model, join=True, most_rows=lambda _: 0, reason="").num_joined == 0
    assert type(model.gate_proj) is type(model.up_proj) is nn.Linear
    np.testing.assert_array_equal(np.array(model.gate_proj.weight), gate)
    np.testing.assert_array_equal(np.array(model.up_proj.weight), up)


@pytest.mark.parametrize("changed", ["class", "input", "bias", "dtype", "bits"])
def test_what_differs_is_not_joined(changed: str) -> None:
    class Adapted(nn.Linear):  # type: ignore[misc]
        pass

    model = make_model()
    attention = model.layers[0].self_attn
    if changed == "class":
        attention.k_proj = Adapted(64, 32, bias=False)
    elif changed == "input":
        attention.k_proj = nn.Linear(32, 32, bias=False)
    elif changed == "bias":
        attention.k_proj = nn.Linear(64, 32, bias=True)
    elif changed == "dtype":
        attention.k_proj.weight = attention.k_proj.weight.astype(mx.float16)
    else:
        attention.q_proj = nn.QuantizedLinear.from_linear(attention.q_proj, 32, 4)
        attention.k_proj = nn.QuantizedLinear.from_linear(attention.k_proj, 32, 8)
        attention.v_proj = nn.QuantizedLinear.from_linear(attention.v_proj, 32, 4)
    before = attention.q_proj
    if changed == "input":  # such a model cannot run: only the choice is looked at
        from turboserve.engine.projections import _can_join

        assert not _can_join([attention.q_proj, attention.k_proj, attention.v_proj])
        return
    assert arrange_projections(model, join=True, most_rows=lambda _: 0, reason="").num_joined == 3
    assert attention.q_proj is before


def test_the_choice_is_the_settings_and_the_devices() -> None:
    model = make_model()
    assert str(choose_projections(model, "off")) == "as loaded (as set)"
    assert choose_projections(model, "auto").num_joined == 0, "a CPU"
    assert "4 groups joined" in str(choose_projections(model, "on"))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_joining_is_tried_at_all_widths_of_weights(bits: int) -> None:
    model = make_model()
    nn.quantize(model, group_size=32, bits=bits)
    assert joining_pays(model) in (True, False)


def test_layers_are_tried_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined ones too, in their own type: with a device and a clock that always favour what is tried."""
    model, tried = make_model(), set()
    model.set_dtype(mx.bfloat16)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))

    def noted(out: int, width: int, dtype: mx.Dtype) -> int:
        tried.add((out, width, dtype))
        return 2

    monkeypatch.setattr(projections, "_is_faster", lambda tried, usual: True)
    monkeypatch.setattr(projections, "most_rows_by_trial", noted)
    assert choose_projections(model, "auto") == projections.Arrangement(4, 2, "by trial")
    shapes = {
        (128, 64),
        (64, 64),
        (192, 64),
        (64, 96),
    }  # of the embedding, which is the head as well, no linear layer is made
    assert tried == {(*shape, mx.bfloat16) for shape in shapes}


def test_rows_are_multiplied_one_by_one_up_to_where_it_stops_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def is_faster(tried: Any, usual: Any) -> bool:
        np.testing.assert_allclose(np.array(tried()), np.array(usual()), rtol=1e-4, atol=1e-4)
        counts.append(tried().shape[0])
        return len(counts) < 3

    monkeypatch.setattr(projections, "_is_faster", is_faster)
    assert most_rows_by_trial(40, 64, mx.float32) == 8 and counts == [2, 8, 32]


def test_rows_one_by_one_are_one_launch_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    whole = mx.matmul

    def noted(a: mx.array, b: mx.array) -> mx.array:
        shapes.append(b.shape)
        return whole(a, b)

    monkeypatch.setattr(mx, "matmul", noted)
    linear = RowLinear(mx.random.normal((6, 8)), None, most_rows=3)
    for x, expected in (
        (mx.ones((3, 1, 8)), [(3, 8, 1)]),
        (mx.ones((4, 1, 8)), []),
        (mx.ones((2, 5, 8)), []),
    ):
        shapes.clear()
        linear(x)
        assert shapes == expected
