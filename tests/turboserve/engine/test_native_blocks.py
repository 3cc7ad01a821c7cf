"""Decoder layers that the CPU kernels compute answer as mlx-lm's own, in any batch and over any cache."""

from __future__ import annotations

import copy
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma, llama, olmo2, qwen2, qwen3
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from mlx_lm.models.rope_utils import initialize_rope

from turboquant_kv.backends.native.backend import NativeStore, is_available
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboserve.engine import native_blocks, weights
from turboserve.engine.loading import load
from turboserve.engine.native_blocks import install_native_blocks
from turboserve.engine.native_linears import install_native_linears
from turboserve.machine_memory import MemoryInfo
from turboserve.settings import Settings

pytestmark = pytest.mark.skipif(not is_available(), reason="the native kernels are not built")
ANY: Any = nn  # its stubs leave quantize out
FORMAT = KVFormat.parse("4/4")
SHAPE: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192, "num_attention_heads": 4}
SHAPE |= {"rms_norm_eps": 1e-5, "vocab_size": 300, "num_key_value_heads": 2, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {}),
    "llama, interleaved": (llama, {"rope_traditional": True, "attention_bias": True, "mlp_bias": True}),
    "llama 3": (llama, {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "llama, yarn": (llama, {"rope_scaling": YARN, "head_dim": 64}),
    "llama, two windows": (llama, {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}),
    "qwen2": (qwen2, {}),
    "qwen3": (qwen3, {"head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": False}),
}


def make(module: Any, more: dict[str, Any], rng: np.random.Generator, kind: str = "4") -> Any:
    """A random model with norms and biases that say something, weights as stored."""
    mx.random.seed(int(rng.integers(1 << 30)))
    model = module.Model(module.ModelArgs.from_dict({"model_type": module.__name__, **SHAPE, **more}))
    for name, child in model.named_modules():
        if name.endswith("_proj") and "bias" in child:
            child.bias = mx.random.normal(child.bias.shape)
        if isinstance(child, ANY.RMSNorm):
            child.weight = mx.random.uniform(0.5, 2, child.weight.shape)
    model.set_dtype(mx.float16)
    if kind != "f16":
        ANY.quantize(model, group_size=32, bits=int(kind))
    return model


def native(model: Any) -> Any:
    assert install_native_linears(model) is not None
    return weights.expand(model)


def distance(got: mx.array, want: mx.array) -> float:
    return float(mx.linalg.norm(got - want) / mx.linalg.norm(want))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_answer_as_mlx_lm(family: str, rng: np.random.Generator) -> None:
    module, more = FAMILIES[family]
    model = make(module, more, rng, str(rng.choice(["4", "8", "f16"])))
    own = native(copy.deepcopy(model))
    model = native(model)
    assert install_native_blocks(model).num_native == 2
    caches = [make_prompt_cache(m) for m in (own, model)]
    for num_tokens in (9, 1, 1, 4):
        tokens = mx.array(rng.integers(0, 300, (2, num_tokens)))
        wanted, got = (m(tokens, cache=c) for m, c in zip((own, model), caches, strict=True))
        assert distance(got, wanted) < 1e-3
    assert distance(model(tokens), own(tokens)) < 1e-6  # without a cache it is mlx-lm's own layer


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama, two windows"])
def test_compressed_rows_answer_as_alone_and_as_mlx_lm(family: str, rng: np.random.Generator) -> None:
    """Prompts of several chunks, some of whose keys are encoded, then steps of rows of different lengths."""
    module, more = FAMILIES[family]
    model = make(module, more | {"head_dim": 64}, rng)
    own = native(copy.deepcopy(model))
    model = native(model)
    assert install_native_blocks(model).num_native == 2
    prompts = [rng.integers(0, 300, n) for n in (200, 90, 5)]
    draws = [rng.integers(0, 300, (3, 1)) for _ in range(4)]
    answers = {}
    for name, m in (("own", own), ("native", model)):
        runtime = KVRuntime(m, FORMAT, backend="cpu-native")
        singles = []
        for prompt in prompts:
            caches = runtime.make_cache()
            for start in range(0, len(prompt), 64):
                m(mx.array(prompt[None, start : start + 64]), cache=caches)
                runtime.evaluate(caches)
            singles.append(caches)
        batch = runtime.merge_rows(singles)
        together = [m(mx.array(tokens), cache=batch) for tokens in draws]
        alone = [[m(mx.array(tokens[i : i + 1]), cache=caches) for i, caches in enumerate(singles)] for tokens in draws]
        answers[name] = together
        if name == "native":
            for both, ones in zip(together, alone, strict=True):
                assert all(mx.array_equal(both[i], one[0]) for i, one in enumerate(ones))
        for caches in (batch, *singles):
            runtime.release(caches)
    for got, want in zip(answers["native"], answers["own"], strict=True):
        assert distance(got, want) < 2e-2  # a key between two codes may go to either


def test_padded_batches_answer_as_mlx_lm(rng: np.random.Generator) -> None:
    model = make(llama, {}, rng)
    own = native(copy.deepcopy(model))
    model = native(model)
    assert install_native_blocks(model).num_native == 2
    both = [[BatchKVCache([0, 3]) for _ in range(2)] for _ in range(2)]
    for num_tokens in (6, 1, 1, 1, 2):
        tokens = mx.array(rng.integers(0, 300, (2, num_tokens)))
        wanted, got = (m(tokens, cache=c)[:, -1] for m, c in zip((own, model), both, strict=True))
        assert distance(got, wanted) < 1e-3


def test_compressed_layers_stay_in_host_memory(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What saves the time: from the second step on no layer's attention goes through MLX's arrays."""
    model = native(make(llama, {"head_dim": 64}, rng))
    install_native_blocks(model)
    runtime = KVRuntime(model, FORMAT, backend="cpu-native")
    caches = runtime.make_cache()
    model(mx.array([[1, 2, 3]]), cache=caches)
    monkeypatch.setattr(NativeStore, "attend", None)
    mx.eval(model(mx.array([[4]]), cache=caches))
    runtime.release(caches)


@pytest.mark.parametrize(("module", "more"), [(gemma, {"head_dim": 32}), (olmo2, {})])
def test_layers_that_compute_otherwise_stay(module: Any, more: dict[str, Any], rng: np.random.Generator) -> None:
    """Another activation and other norms with the same children's names, and norms in other places."""
    model = native(make(module, more, rng))
    found = install_native_blocks(model)
    assert found.num_native == 0 and str(found).startswith("by mlx-lm (")


def test_a_layer_that_differs_is_left_to_mlx_lm(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same structure, but another activation, as a later mlx-lm could have it."""
    model = native(make(llama, {}, rng))
    monkeypatch.setattr(llama, "swiglu", lambda gate, x: ANY.gelu(gate) * x)
    before = [type(layer) for layer in model.layers]
    assert install_native_blocks(model).num_native == 0
    assert [type(layer) for layer in model.layers] == before
    assert "TransformerBlock differs from mlx-lm's own" in caplog.text


def test_one_layer_with_a_foreign_part_stays_and_the_others_go(rng: np.random.Generator) -> None:
    model = make(llama, {}, rng)
    model.model.layers[1].mlp.up_proj = ANY.Linear(128, 192, bias=False)
    model = native(model)
    assert str(install_native_blocks(model)).startswith("1 of 2 by the CPU kernels, around attention; linear layers")


def test_turns_are_those_of_the_step(rng: np.random.Generator) -> None:
    """Kept for the layers of a step, and never for another one."""
    rope = ANY.RoPE(32)
    turns = native_blocks.Turns(rope, 32, 16, is_interleaved=False)
    row = mx.array(rng.standard_normal(32).astype(np.float32))

    def wanted(offset: Any, num_tokens: int, batch: int) -> Any:
        turned = rope(mx.broadcast_to(row, (batch, 1, num_tokens, 32)), offset=offset)
        return np.array(turned)[:, 0]

    a, b = mx.array([3, 70]), mx.array([3, 71])
    for offset, num_tokens, batch in ((5, 1, 1), (5, 2, 1), (6, 2, 1), (a, 2, 2), (b, 2, 2), (b, 2, 2), (a, 1, 2)):
        if offset is b:
            b += 1  # in place, as a cache may move its positions: the same object
        turn, x = turns.of(offset, num_tokens), np.array(row)
        c, s = turn[..., :16], turn[..., 16:]
        got = np.concatenate([x[:16] * c - x[16:] * s, x[:16] * s + x[16:] * c], -1)
        assert np.abs(got - wanted(offset, num_tokens, batch)).max() < 1e-5


def test_turns_by_position_are_those_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whichever spans were asked before; a rotation that depends on the length is asked each time."""
    monkeypatch.setattr(native_blocks, "_MOST_SPANS", 2)
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    kinds: list[dict[str, Any] | None] = [None, LLAMA3 | scaling, YARN, {"rope_type": "dynamic", "factor": 2.0}]
    longrope = scaling | {"short_factor": [1.0] * 16, "long_factor": [2.0 + i for i in range(16)]}
    for kind in (*kinds, longrope | {"rope_type": "longrope"}):
        rope = initialize_rope(32, 10000.0, False, kind, 100)
        turns, module = (native_blocks.Turns(rope, 32, 16, is_interleaved=False) for _ in range(2))
        for position in (3, 70, 63, 64, 300, 5, 99, 100, 101):
            assert np.array_equal(turns.rows([position]), module.of(position, 1)[:, 0])
        if kind is None or kind["rope_type"] != "dynamic":  # which takes one length at a time
            positions = [5, 300, 64, 5]
            assert np.array_equal(turns.rows(positions), module.of(mx.array(positions), 1)[:, 0])
            assert len(turns._spans) == 2


def test_start_up_tells_of_layers_and_off_leaves_them() -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU computes by itself")
    cases: tuple[tuple[Literal["auto", "off"], str], ...] = (
        ("auto", "8 of 8 by the CPU kernels, around attention, a token's step in one call"),
        ("off", "by mlx-lm (as set)"),
    )
    for wanted, told in cases:
        lines: list[str] = []
        loaded = load(Settings(projections=wanted), lines.append, MemoryInfo(1 << 40, 1 << 40))
        assert loaded.details["layers"] == told and f"layers       {told}" in lines
