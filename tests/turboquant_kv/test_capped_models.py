"""Models that cap attention scores: their rows in a batch get what they get alone, compressed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gear, gemma2
from mlx_lm.models.cache import KVCache, make_prompt_cache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import random_tokens

from turboquant_kv.backends.base import Means
from turboquant_kv.backends.plain_attention import plain_attention
from turboquant_kv.cache import key_guard, seam
from turboquant_kv.cache.calibration import Calibration
from turboquant_kv.cache.key_guard import KEY_CODECS
from turboquant_kv.cache.mixed_batch import PlainRows, merge_rows
from turboquant_kv.cache.probe import probe_layers
from turboquant_kv.cache.protocol import AttendingCache
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat

ORIGINAL = gemma2.Attention.__call__  # at import: other tests' installs may have come before
NEARLY_EXACT = KVFormat(8, 8, page_tokens=16, sink_tokens=8)


def small_gear(seed: int = 0, **changes: Any) -> Any:
    """Norms of queries and keys, sliding windows, convolutions."""
    mx.random.seed(seed)
    layer_types = ["full_attention", "sliding_attention", "conv_mixer", "full_attention"]
    args = gear.ModelArgs(
        model_type="gear",
        **{**small_models.COMMON, "num_hidden_layers": len(layer_types)},
        head_dim=64,
        num_key_value_heads=2,
        intermediate_size=128,
        rms_norm_eps=1e-6,
        layer_types=layer_types,
        query_pre_attn_scalar=2,
        attn_logit_softcapping=2.0,
        sliding_window=24,
        **changes,
    )
    model = gear.Model(args)
    mx.eval(model.parameters())
    return model


def as_dtype(model: Any, dtype: mx.Dtype) -> Any:
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def fed(model: Any, caches: list[Any], tokens: list[list[int]]) -> mx.array:
    """Logits (B, T, vocab)."""
    logits: mx.array = model(mx.array(tokens), cache=caches)
    mx.eval(logits)
    return logits


def error(got: mx.array, want: mx.array) -> float:
    a, b = (np.array(x.astype(mx.float32)) for x in (got, want))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def histories(model: Any, runtime: KVRuntime | None, prompts: Sequence[list[int]]) -> list[list[Any]]:
    """Caches that hold a prompt each, two of them read in two parts."""
    made = []
    for prompt in prompts:
        caches = make_prompt_cache(model) if runtime is None else runtime.make_cache()
        half = len(prompt) // 2
        for part in (prompt[:half], prompt[half:]):
            if part:
                fed(model, caches, [part])
        made.append(caches)
    return made


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("head_dim", "num_kv_heads"), [(64, 1), (64, 2), (64, 4), (256, 2)])
@pytest.mark.parametrize("num_rows", [2, 3, 4])
def test_uncompressed_rows_get_what_they_get_alone(
    num_rows: int, head_dim: int, num_kv_heads: int, dtype: mx.Dtype, rng: np.random.Generator
) -> None:
    """As many rows as KV heads among others, which is where mlx-lm's own batch takes one row's mask for another's."""
    model = as_dtype(small_models.capped(int(rng.integers(99)), head_dim, num_kv_heads), dtype)
    layers = probe_layers(model)
    assert layers.unsupported is None
    assert layers.capped == (True,) * len(layers.kinds)
    alone = histories(model, None, [random_tokens(rng, int(n)) for n in rng.integers(1, 80, num_rows)])
    batch = merge_rows(alone)
    assert all(isinstance(cache, PlainRows) for cache in batch)
    for num_new in (1, 1, 4, 1):
        tokens = [random_tokens(rng, num_new) for _ in alone]
        logits = fed(model, batch, tokens)
        for b, caches in enumerate(alone):
            assert all(type(cache) is KVCache for cache in caches)
            # projections of several rows and of one are rounded differently; attention is not (the next test)
            assert (
                error(logits[b : b + 1], fed(model, caches, [tokens[b]]))
                < {
                    mx.float32: 1e-5,
                    mx.float16: 1e-2,
                    mx.bfloat16: 5e-2,
                }[dtype]
            )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("num_new", [1, 7])
def test_plain_attention_is_gemma2s_own(num_new: int, dtype: mx.Dtype, rng: np.random.Generator) -> None:
    """Bit for bit, a whole Attention module over the same caches, alone and in a batch of its own."""
    seam.install()
    model = as_dtype(small_models.capped(3), dtype)
    module = model.layers[0].self_attn
    x = mx.array(rng.standard_normal((1, 41 + num_new, 64)).astype(np.float32)).astype(dtype)
    own, ours = KVCache(), PlainRows([KVCache()])
    for start, stop in ((0, 41), (41, 41 + num_new)):
        mask = own.make_mask(stop - start, return_array=True, window_size=None)
        want = module(x[:, start:stop], mask, own)
        got = module(x[:, start:stop], ours.make_mask(stop - start, return_array=True), ours)
        assert mx.array_equal(got, want)


@pytest.mark.parametrize("backend", ["cpu-numpy", "cpu-native", "mlx-ops"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (4, "3t")])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_compressed_rows_get_what_they_get_alone(
    head_dim: int, bits: Any, backend: str, rng: np.random.Generator
) -> None:
    model = small_models.capped(int(rng.integers(99)), head_dim)
    runtime = KVRuntime(model, KVFormat(bits[0], bits[1], page_tokens=16, sink_tokens=8), backend=backend)
    prompts = [random_tokens(rng, int(n)) for n in rng.integers(2, 120, 3)]
    alone, plain = histories(model, runtime, prompts), histories(model, None, prompts)
    batch = merge_rows(alone)
    errors = []
    for num_new in (1, 1, 3, 1):
        tokens = [random_tokens(rng, num_new) for _ in alone]
        logits = fed(model, batch, tokens)
        for b, caches in enumerate(alone):
            # bit by bit but for the projections (test_mixed.py), whose last bit may turn a code into its neighbour
            assert error(logits[b : b + 1], fed(model, caches, [tokens[b]])) < 0.03
            errors.append(error(logits[b : b + 1], fed(model, plain[b], [tokens[b]])))
    assert np.mean(errors) < (0.02 if bits == (8, 8) else 0.35), "within the codec's error of mlx-lm's own"


def test_right_padded_prompts_are_read_together(rng: np.random.Generator) -> None:
    model = small_models.capped(5)
    for fmt in (None, NEARLY_EXACT):
        runtime = KVRuntime(model, fmt)
        prompts = [random_tokens(rng, n) for n in (30, 24, 27)]
        batch = merge_rows([runtime.make_cache() for _ in prompts])
        for cache in batch:
            cache.prepare(lengths=[len(p) for p in prompts], right_padding=[30 - len(p) for p in prompts])
        logits = fed(model, batch, [p + [0] * (30 - len(p)) for p in prompts])
        for b, prompt in enumerate(prompts):
            want = fed(model, runtime.make_cache(), [prompt])
            assert error(logits[b : b + 1, : len(prompt)], want) < 1e-4


@pytest.mark.parametrize("fmt", [None, NEARLY_EXACT])
def test_gear_is_served(fmt: KVFormat | None, rng: np.random.Generator) -> None:
    model = small_gear(int(rng.integers(99)))
    assert probe_layers(model).unsupported is None
    runtime = KVRuntime(model, fmt)
    prompts = [random_tokens(rng, n) for n in (50, 9)]
    alone, plain = histories(model, runtime, prompts), histories(model, None, prompts)
    batch = merge_rows(alone)
    for _ in range(3):
        tokens = [random_tokens(rng, 1) for _ in prompts]
        logits = fed(model, batch, tokens)
        for b, caches in enumerate(alone):
            assert error(logits[b : b + 1], fed(model, caches, [tokens[b]])) < (1e-4 if fmt is None else 0.03)
            assert error(logits[b : b + 1], fed(model, plain[b], [tokens[b]])) < 0.03


@pytest.mark.parametrize("exact", [0, 1])
def test_layers_may_differ(exact: int, rng: np.random.Generator) -> None:
    """A layer that is left uncompressed has mlx-lm's own cache, and takes the mask of the other's, or gives it one."""
    model = small_models.capped(2)
    lost = {0: dict.fromkeys(KEY_CODECS, 0.0), 1: dict.fromkeys(KEY_CODECS, 0.0)}
    lost[exact] = dict.fromkeys(KEY_CODECS, 99.0)
    runtime = KVRuntime(model, NEARLY_EXACT, calibration=Calibration({}, "", lost))
    caches, plain = runtime.make_cache(), make_prompt_cache(model)
    assert [type(cache) is KVCache for cache in caches] == [exact == 0, exact == 1]
    for num_new in (30, 1, 5):
        tokens = [random_tokens(rng, num_new)]
        assert error(fed(model, caches, tokens), fed(model, plain, tokens)) < 0.02


def test_one_token_needs_no_mask_even_as_an_array(rng: np.random.Generator) -> None:
    """As mlx-lm's own single cache says; windows are arrays."""
    runtime = KVRuntime(small_models.capped(), NEARLY_EXACT)
    (caches,) = histories(small_models.capped(), runtime, [random_tokens(rng, 12)])
    for cache in (caches[0], merge_rows([caches])[0], KVCache()):
        assert cache.make_mask(1, return_array=True, window_size=None) is None
    for cache in (caches[0], merge_rows([caches])[0]):
        assert cache.make_mask(2, return_array=True).shape[-2:] == (2, 14)
        assert cache.make_mask(1, return_array=True, window_size=4).sum().item() == 4


def test_what_keys_lose_is_measured_through_the_cap(rng: np.random.Generator) -> None:
    """Scores far beyond the cap are all alike, and what a codec does to them shows no more."""
    keys, queries = (rng.standard_normal((2, 128, 64)).astype(np.float32) for _ in range(2))
    means = Means(np.zeros((2, 64), np.float32), np.zeros((2, 64), np.float32))
    found = {
        cap: key_guard.measure([{0: key_guard.Recorded(0, keys, queries, 1.0, cap)}], {0: means})[0]["3"]
        for cap in (0.0, 1e6, 0.05)
    }
    assert found[1e6] == pytest.approx(found[0.0], rel=1e-3)
    assert found[0.05] < found[0.0] / 20
    seam.install()
    recorded = key_guard.record(small_models.capped(), random_tokens(rng, 256), [0, 1], 0)
    assert [one.cap for one in recorded.values()] == [2.0, 2.0]
    assert abs(recorded[0].logits).max() <= 2 < abs(recorded[0].scores).max()


def test_masks_stay_names(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array would cost the native kernels a look at it, and GPUs their fused kernels."""
    model, seen = small_models.capped(2), []
    runtime = KVRuntime(model, NEARLY_EXACT)
    plain_attend = AttendingCache.attend

    def attend(self: AttendingCache, queries: mx.array, **options: Any) -> mx.array:
        seen.append(options["mask"])
        return plain_attend(self, queries, **options)

    monkeypatch.setattr(AttendingCache, "attend", attend)
    alone = histories(model, runtime, [random_tokens(rng, 12), random_tokens(rng, 6)])
    batch = merge_rows(alone)
    fed(model, batch, [[1], [2]])
    fed(model, batch, [[1, 2], [2, 3]])
    assert seen == ["causal"] * 8 + [None] * 2 + ["causal"] * 2


def test_other_caches_get_mlx_lms_own_attention(rng: np.random.Generator) -> None:
    seam.install()
    model = small_models.capped(1)
    tokens = [random_tokens(rng, 20)]
    with_seam = fed(model, make_prompt_cache(model), tokens)
    own = getattr(ORIGINAL, "__wrapped__", ORIGINAL)
    assert gemma2.Attention.__call__.__wrapped__ is own
    seam.install()
    assert gemma2.Attention.__call__.__wrapped__ is own, "installing twice wraps once"
    assert mx.array_equal(with_seam, fed(model, make_prompt_cache(model), tokens))


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive", "per head"])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_plain_attention_with_a_cap(has_sinks: bool, kind: str, rng: np.random.Generator) -> None:
    """In float64, score by score."""
    num_heads, group, num_rows, num_keys, dim, cap = 2, 3, 5, 17, 32, 1.5
    shapes = ((num_heads * group, num_rows, dim), (num_heads, num_keys, dim), (num_heads, num_keys, 48))
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    sinks = rng.standard_normal(num_heads * group).astype(np.float32) if has_sinks else None
    bias = np.zeros((num_heads * group, num_rows, num_keys))
    mask: Any = None
    if kind == "causal":
        mask, bias = "causal", bias + np.where(np.arange(17)[None] <= 12 + np.arange(5)[:, None], 0, -np.inf)
    elif kind == "bool":
        seen = rng.random((num_rows, num_keys)) < 0.5
        seen[:, 0] = True
        mask, bias = mx.array(seen), bias + np.where(seen, 0, -np.inf)
    elif kind != "none":
        drawn = rng.standard_normal((num_heads * group if kind == "per head" else 1, num_rows, num_keys))
        mask, bias = mx.array(drawn.astype(np.float32)[None]), bias + drawn
    scores = 0.5 * q.astype(np.float64) @ np.repeat(k, group, axis=0).swapaxes(1, 2)
    weights = np.exp(cap * np.tanh(scores / cap) + bias)
    total = weights.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks.astype(np.float64))[:, None, None])
    want = (weights / total) @ np.repeat(v, group, axis=0)
    arrays = [mx.array(x[None]) for x in (q, k, v)]
    out = plain_attention(*arrays, scale=0.5, mask=mask, sinks=None if sinks is None else mx.array(sinks), cap=cap)
    np.testing.assert_allclose(np.array(out)[0], want, atol=1e-5)
