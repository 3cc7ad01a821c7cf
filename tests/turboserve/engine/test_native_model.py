"""A decode step that the CPU kernels compute in one call is the step that is computed layer by layer."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma, llama, qwen2, qwen3
from mlx_lm.models.cache import make_prompt_cache
from tests.turboserve.engine.test_native_blocks import FORMAT, distance, make, native

from turboquant_kv.backends.base import Means
from turboquant_kv.backends.native.backend import is_available
from turboquant_kv.backends.native.decoder import NativeDecoder
from turboquant_kv.backends.native.linear import NativeWeights
from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboserve.engine import native_model
from turboserve.engine.native_blocks import LayerCall, install_native_blocks
from turboserve.engine.native_model import install_native_model
from turboserve.engine.passes import OwnPasses

pytestmark = pytest.mark.skipif(not is_available(), reason="the native kernels are not built")
ANY: Any = nn  # its stubs leave classes out

FAMILIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "llama": (llama, {"head_dim": 64}, "4"),
    "llama, yarn": (llama, {"head_dim": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "8"),
    "qwen2": (qwen2, {"hidden_size": 256}, "f16"),
    "qwen3": (qwen3, {"head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": False}, "4"),
}
FAMILIES["llama, yarn"][1]["rope_scaling"]["original_max_position_embeddings"] = 64


def whole(model: Any) -> Any:
    """A model whose steps are one call; its class before is what `layerwise` calls."""
    model = native(model)
    assert install_native_blocks(model).num_native == 2
    cls = type(model)
    assert install_native_model(model) and type(model) is not cls
    return model, cls


def balanced_means(rng: np.random.Generator, heads: int, dim: int) -> Means:
    def normal() -> Any:
        return rng.standard_normal((heads, dim)).astype(np.float32) * 0.1

    return Means(normal(), normal(), key_factors=rng.uniform(0.5, 2, (heads, dim)).astype(np.float32))


def filled(model: Any, runtime: KVRuntime, prompts: list[Any]) -> list[Any]:
    """A batch of conversations that have read these prompts."""
    singles = []
    for prompt in prompts:
        caches = runtime.make_cache()
        model.model(mx.array(prompt[None]), caches)
        runtime.evaluate(caches)
        singles.append(caches)
    return runtime.merge_rows(singles)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_balanced", [False, True])
def test_steps_are_those_of_the_layers(
    family: str, is_balanced: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over rows of different lengths, while sinks and tails grow and pages close; then caches hold the same."""
    module, more, kind = FAMILIES[family]
    model, cls = whole(make(module, more, rng, kind))
    means = {layer: balanced_means(rng, 2, 64) for layer in range(2)}
    calibration = Calibration(means, "a test") if is_balanced else None
    runtime = KVRuntime(model, FORMAT, calibration=calibration, backend="cpu-native")
    pools = {cache.source.pool for cache in runtime.make_cache()}
    assert [balance is not None for pool in pools for balance in pool.balances] == [is_balanced] * 2
    prompts = [rng.integers(0, 300, n) for n in (130, 62, 5)]
    by_layers, by_call = filled(model, runtime, prompts), filled(model, runtime, prompts)
    steps = [mx.array(rng.integers(0, 300, (3, 1))) for _ in range(75)]
    wanted = [cls.__call__(model, tokens, by_layers) for tokens in steps]
    monkeypatch.setattr(LayerCall, "__call__", None)  # no layer is called by itself
    got = [model(tokens, cache=by_call) for tokens in steps]
    # MLX's last norm differs in a last bit, so that an input of the head may be rounded to the next of its steps.
    assert all(g.shape == (3, 1, 300) and distance(g, w) < 1e-4 for g, w in zip(got, wanted, strict=True))
    for row in range(3):
        one, other = (runtime.extract_row(batch, row) for batch in (by_layers, by_call))
        for mine, theirs in zip(one, other, strict=True):
            assert mine.offset == theirs.offset == len(prompts[row]) + len(steps)
            for a, b in zip(mine.state[1:], theirs.state[1:], strict=True):
                assert isinstance(a, str) or mx.array_equal(a, b)
        runtime.release(one)
        runtime.release(other)
    for batch in (by_layers, by_call):
        runtime.release(batch)
    runtime.check_integrity()


def test_rows_are_the_same_alone_and_in_a_batch(rng: np.random.Generator) -> None:
    model, _ = whole(make(llama, {"head_dim": 64}, rng))
    runtime = KVRuntime(model, FORMAT, backend="cpu-native")
    prompts = [rng.integers(0, 300, n) for n in (130, 61, 5)]
    batch, alone = filled(model, runtime, prompts), [filled(model, runtime, [prompt]) for prompt in prompts]
    for _ in range(5):
        tokens = mx.array(rng.integers(0, 300, (3, 1)))
        together = model(tokens, cache=batch)
        for row, caches in enumerate(alone):
            assert mx.array_equal(model(tokens[row : row + 1], cache=caches)[0], together[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_same_beside_rows_in_other_formats(family: str, rng: np.random.Generator) -> None:
    """Alone a step is one call, or layer by layer where a conversation is not compressed; together it is the latter."""
    module, options, weights = FAMILIES[family]
    model, _ = whole(make(module, options, rng, weights))
    names = ("4/4", None, "3t/2t")
    runtimes = [KVRuntime(model, None if n is None else KVFormat.parse(n), backend="cpu-native") for n in names]
    prompts = [rng.integers(0, 300, n) for n in (130, 61, 5)]
    alone = [filled(model, runtime, [prompt]) for runtime, prompt in zip(runtimes, prompts, strict=True)]
    singles = []
    for runtime, prompt in zip(runtimes, prompts, strict=True):
        caches = runtime.make_cache()
        model.model(mx.array(prompt[None]), caches)
        runtime.evaluate(caches)
        singles.append(caches)
    batch = runtimes[0].merge_rows(singles)
    for _ in range(3):
        tokens = mx.array(rng.integers(0, 300, (3, 1)))
        together = model(tokens, cache=batch)
        for row, caches in enumerate(alone):
            assert mx.array_equal(model(tokens[row : row + 1], cache=caches)[0], together[row]), names[row]


def test_a_step_that_fails_never_happened(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = whole(make(llama, {"head_dim": 64}, rng))
    runtime = KVRuntime(model, FORMAT, backend="cpu-native")
    batch = filled(model, runtime, [rng.integers(0, 300, n) for n in (132, 9)])  # the first one's tail is full
    good = runtime.merge_rows([runtime.extract_row(batch, row) for row in range(2)])
    tokens = mx.array([[7], [8]])
    wanted = model(tokens, cache=good)
    with pytest.raises(ValueError, match="row 300 is not among the table's 300"):
        model(mx.array([[7], [300]]), cache=batch)
    with monkeypatch.context() as patch:
        patch.setattr(NativeDecoder, "step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens, cache=batch)
    assert [cache.lengths for cache in batch] == [[132, 9]] * 2
    assert mx.array_equal(model(tokens, cache=batch), wanted)
    runtime.release(batch)
    runtime.release(good)
    runtime.check_integrity()


def test_other_caches_and_more_tokens_go_layer_by_layer(rng: np.random.Generator) -> None:
    model, cls = whole(make(llama, {"head_dim": 64}, rng))
    plain = make_prompt_cache(model)
    tokens = mx.array(rng.integers(0, 300, (2, 1)))
    assert distance(model(tokens, cache=plain), cls.__call__(model, tokens, make_prompt_cache(model))) < 1e-5
    assert distance(model(tokens), cls.__call__(model, tokens)) == 0
    numpy = KVRuntime(model, FORMAT, backend="cpu-numpy")
    caches = numpy.make_cache()
    assert model(tokens[:1], cache=caches).shape == (1, 1, 300) and caches[0].offset == 1
    runtime = KVRuntime(model, FORMAT, backend="cpu-native")
    caches = runtime.make_cache()  # whose conversations have no rows yet
    for num_tokens, offset in ((1, 1), (3, 4), (1, 5)):
        model(mx.array(rng.integers(0, 300, (1, num_tokens))), cache=caches)
        assert [cache.offset for cache in caches] == [offset] * 2
    windows = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8, "head_dim": 64}
    mixed, _ = whole(make(llama, windows, rng))  # its layers keep to two pools
    runtime = KVRuntime(mixed, FORMAT, backend="cpu-native")
    caches = runtime.make_cache()
    for _ in range(3):
        mixed(tokens[:1], cache=caches)
    assert [cache.offset for cache in caches] == [3, 3]


def test_prompts_are_read_without_the_head(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which nobody reads the logits: for SmolLM2-135M a fifth of the work."""
    model, _ = whole(make(llama, {"head_dim": 64}, rng))
    runtime = KVRuntime(model, FORMAT, backend="cpu-native")
    caches, own = runtime.make_cache(), runtime.make_cache()
    prompt = rng.integers(0, 300, 20).tolist()
    mx.eval(model(mx.array([prompt]), cache=own))
    with monkeypatch.context() as patch:
        patch.setattr(NativeWeights, "multiply", None)
        OwnPasses(model).fill([prompt], caches)
    assert caches[0].offset == 20
    assert mx.array_equal(model(mx.array([[3]]), cache=caches), model(mx.array([[3]]), cache=own))


@pytest.mark.parametrize("what", ["scaled logits", "another norm", "foreign embedding", "foreign layer"])
def test_models_that_are_more_than_that_stay(
    what: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(llama, {}, rng)
    if what == "foreign layer":
        model.model.layers[1].mlp.up_proj = ANY.Linear(128, 192, bias=False)
    if what == "foreign embedding":
        model.model.embed_tokens = ANY.Embedding(300, 128)
        model.lm_head, model.args.tie_word_embeddings = ANY.Linear(128, 300, bias=False), False
    model = native(model)
    install_native_blocks(model)
    if what == "another norm":
        model.model.norm = ANY.LayerNorm(128)
    if what == "scaled logits":
        call = llama.Model.__call__
        monkeypatch.setattr(llama.Model, "__call__", lambda *args, **more: call(*args, **more) * 0.5)
    before = type(model)
    assert not install_native_model(model) and type(model) is before
    assert ("differs from its layers" in caplog.text) == (what == "scaled logits")
    other = native(make(gemma, {"head_dim": 32}, rng))
    assert install_native_blocks(other).num_native == 0 and not install_native_model(other)


def test_one_wrong_logit_is_seen(rng: np.random.Generator) -> None:
    """The trial compares all of them."""
    model, _ = whole(make(llama, {"tie_word_embeddings": False}, rng))
    weight = mx.array(rng.standard_normal((300, 128))).astype(mx.float16)
    blocks = [layer._native.block for layer in model.layers]
    norm = model.model.norm.weight, 1e-5
    wrong = NativeDecoder(model.model.embed_tokens.weights, blocks, norm, NativeWeights(weight))
    assert not native_model._is_right(model, wrong)
