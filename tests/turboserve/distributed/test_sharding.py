"""A rank's part of a model's layers: ordinary layers that sum to what the whole model computes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
from mlx.nn import quantize  # type: ignore[attr-defined]
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tests.turboserve.distributed.processes import CONFIG
from tests.turboserve.distributed.test_ranks import Group

from turboserve.engine.distributed.sharding import SummedLinear, count_heads, shard
from turboserve.engine.native_linears import install_native_linears
from turboserve.errors import StartupError

nn: Any = mlx.nn


def model_of(**changes: Any) -> Any:
    mx.random.seed(5)
    return Model(ModelArgs.from_dict({**CONFIG, "attention_bias": True, "mlp_bias": True, **changes}))


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_parts_of_all_ranks_sum_to_the_whole(bits: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model_of()
    if bits is not None:
        quantize(whole, group_size=64, bits=bits)
    parts = []
    for rank in (0, 1):
        part = model_of()
        if bits is not None:
            quantize(part, group_size=64, bits=bits)
        shard(part, {**CONFIG}, Group(rank, 2))
        parts.append(part)
    layers = [part.layers[0] for part in [whole, *parts]]
    assert all(layer.self_attn.n_kv_heads == 2 for layer in layers[1:])
    x = mx.random.normal((3, CONFIG["hidden_size"]))
    wanted = layers[0].self_attn.q_proj(x)
    got = mx.concatenate([layer.self_attn.q_proj(x) for layer in layers[1:]], axis=-1)
    assert np.allclose(np.array(got), np.array(wanted), atol=1e-5)
    kind = nn.Linear if bits is None else nn.QuantizedLinear
    assert type(layers[1].self_attn.q_proj) is kind and type(layers[1].self_attn.o_proj) is SummedLinear
    monkeypatch.setattr(mx.distributed, "all_sum", lambda y, group=None: y)
    heads = mx.random.normal((3, 4 * CONFIG["head_dim"]))
    halves = mx.split(heads, 2, axis=-1)
    o_projs = [layer.self_attn.o_proj for layer in layers[1:]]
    summed = sum((o.linear(half) for o, half in zip(o_projs, halves, strict=True)), start=o_projs[0].bias)
    assert np.allclose(np.array(summed), np.array(layers[0].self_attn.o_proj(heads)), atol=1e-4)
    assert np.allclose(np.array(o_projs[0](halves[0])), np.array(o_projs[0].linear(halves[0]) + o_projs[0].bias))


def test_half_of_the_divided_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def divided_bytes(model: Any) -> int:
        flat: Any = tree_flatten(model.layers)
        return sum(int(a.nbytes) for name, a in flat if "proj" in name and "bias" not in name)

    whole, part = model_of(), model_of()
    shard(part, {**CONFIG}, Group(1, 2))
    assert divided_bytes(part) * 2 == divided_bytes(whole)


def test_native_products_take_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.distributed, "all_sum", lambda y, group=None: y)
    part = model_of()
    quantize(part, group_size=64, bits=4)
    shard(part, {**CONFIG}, Group(0, 2))
    found = install_native_linears(part)
    assert found is not None and found.kinds == {"4-bit": 2 + 7 * CONFIG["num_hidden_layers"]}


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(StartupError, match="4 attention heads cannot be divided among 3 ranks"):
        shard(model_of(), {**CONFIG}, Group(0, 3))
    config = {**CONFIG, "num_attention_heads": 9, "num_key_value_heads": 3}
    with pytest.raises(StartupError, match="3 key value heads cannot be divided among 9 ranks"):
        shard(model_of(), config, Group(0, 9))


def test_groups_of_quantisation_that_do_not_divide_are_refused() -> None:
    model = model_of(intermediate_size=192)  # three groups of 64
    quantize(model, group_size=64, bits=4)
    with pytest.raises(StartupError, match="cannot be divided among 2 ranks"):
        shard(model, {**CONFIG}, Group(0, 2))


def test_models_that_mlx_lm_does_not_divide_are_refused() -> None:
    with pytest.raises(StartupError, match="mlx-lm cannot divide models of type gpt2"):
        shard(nn.Linear(4, 4), {"model_type": "gpt2"}, Group(0, 2))


def test_a_share_of_the_heads_keeps_their_size() -> None:
    config = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    assert count_heads(config, 2) == {
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    assert count_heads({"text_config": config}, 4)["text_config"]["num_key_value_heads"] == 1
    assert count_heads(config, 1) == config
