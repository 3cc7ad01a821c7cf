"""Factors between queries and keys: scores stay, what codecs lose of them falls, and caches keep working."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_calibration import WEIGHTS, ByteTokenizer
from tests.turboquant_kv.test_key_guard import planted
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.cache import key_balance
from turboquant_kv.cache.calibration import Calibration, calibrate, calibration_for
from turboquant_kv.cache.key_balance import KeyBalance, attention_weights, find_factors
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.protocol import LayerInput
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.codec.reference import decode, encode
from turboquant_kv.codec.rotary import Rotary
from turboquant_kv.codec.rotation import rotation_matrix

FMT = KVFormat(3, 4, page_tokens=16, sink_tokens=8)
DIM = 64
ROTARY = Rotary(10_000.0 ** -(np.arange(DIM // 2) / (DIM // 2)), 1, DIM // 2)


def uneven(rng: np.random.Generator, *shape: int) -> Any:
    """Vectors whose rotary pairs have very different sizes, both partners the same."""
    sizes = np.exp(rng.normal(0, 1.5, DIM // 2))
    return (rng.standard_normal((*shape, DIM)) * np.concatenate([sizes, sizes])).astype(np.float32)


def scores_error(keys: Any, queries: Any, factors: Any) -> float:
    rotation = rotation_matrix(DIM, 1, "k")
    held = keys * factors[:, None]
    decoded = decode(encode(held, FMT.keys, rotation), FMT.keys, DIM, rotation) / factors[:, None]
    return float(np.mean((queries @ (decoded - keys).swapaxes(1, 2)) ** 2))


def test_scores_lose_less(rng: np.random.Generator) -> None:
    keys, queries = uneven(rng, 2, 200), uneven(rng, 2, 100)
    factors = find_factors(keys, queries, np.ones((2, 100, 200), np.float32), ROTARY)
    assert factors is not None
    assert factors.shape == (2, DIM)
    assert np.array_equal(factors[:, : DIM // 2], factors[:, DIM // 2 :]), "dims that turn together have one factor"
    plain, balanced = (scores_error(keys, queries, f) for f in (np.ones((2, DIM)), factors))
    assert balanced < 0.6 * plain


def test_pairs_of_no_weight_do_not_count(rng: np.random.Generator) -> None:
    keys, queries = uneven(rng, 1, 200), uneven(rng, 1, 100)
    odd_keys, odd_queries = keys.copy(), queries.copy()
    odd_keys[:, :50], odd_queries[:, :20] = 100 * uneven(rng, 1, 50), 100 * uneven(rng, 1, 20)
    weights = np.ones((1, 100, 200), np.float32)
    weights[:, :20] = 0
    weights[:, :, :50] = 0
    want, got = (find_factors(k, q, weights, ROTARY) for k, q in ((keys, queries), (odd_keys, odd_queries)))
    assert want is not None
    assert got is not None
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_even_vectors_need_no_factors(rng: np.random.Generator) -> None:
    keys, queries = (rng.standard_normal((2, n, DIM)).astype(np.float32) for n in (400, 300))
    assert find_factors(keys, queries, np.ones((2, 300, 400), np.float32), ROTARY) is None


def test_dead_dims_are_harmless(rng: np.random.Generator) -> None:
    keys, queries = uneven(rng, 2, 50), uneven(rng, 2, 30)
    keys[..., [3, 35]] = 0
    queries[1] = 0
    factors = find_factors(keys, queries, np.ones((2, 30, 50), np.float32), ROTARY)
    assert factors is not None
    assert np.isfinite(factors).all()
    assert factors.min() >= 1 / key_balance.MOST
    assert factors.max() <= key_balance.MOST


def test_weights_are_those_of_attention(rng: np.random.Generator) -> None:
    scores, positions = rng.standard_normal((2, 3, 100)).astype(np.float32), np.array([70, 80, 99])
    weights = attention_weights(scores, positions, np.arange(100) > positions[:, None], 8)
    assert weights.shape == (2, 3, 92)
    p = np.exp(scores[1, 1, :81]) / np.exp(scores[1, 1, :81]).sum()
    last = 80 - key_balance.RECENT_TOKENS
    np.testing.assert_allclose(weights[1, 1, : last + 1 - 8], (p * (1 - p))[8 : last + 1], rtol=1e-4)
    assert not weights[1, 1, last + 1 - 8 :].any()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("group", [1, 3])
def test_scores_stay(dtype: Any, group: int, rng: np.random.Generator) -> None:
    balance = KeyBalance(np.exp(rng.normal(0, 1, (2, DIM))).astype(np.float32))
    keys, queries = (
        mx.array(rng.standard_normal((1, h, 5, DIM)).astype(np.float32)).astype(dtype) for h in (2, 2 * group)
    )
    step = balance.to_store(LayerInput(keys, keys, queries, 1.0, None, None))
    assert (step.keys.dtype, step.queries.dtype) == (dtype, dtype)
    before, after = (
        np.array(mx.repeat(k.astype(mx.float32), group, axis=1) @ q.astype(mx.float32).swapaxes(2, 3))
        for k, q in ((keys, queries), (step.keys, step.queries))
    )
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-2, mx.bfloat16: 0.15}[dtype]
    np.testing.assert_allclose(after, before, atol=tolerance)
    back = balance.keys_from_store(balance.keys_to_store(keys[0]))
    relative = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 2e-2}[dtype]
    got, want = (np.array(x.astype(mx.float32)) for x in (back, keys[0]))
    np.testing.assert_allclose(got, want, rtol=relative)


def test_a_planted_bias_costs_attention_less(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = planted(rng), random_tokens(rng, 400)
    balanced = calibrate(model, text)
    monkeypatch.setattr(key_balance, "find_factors", lambda *given: None)
    plain = calibrate(model, text)
    for codec in ("2t", "3t", "4"):
        assert balanced.divergences[1][codec] < 0.5 * plain.divergences[1][codec]


@pytest.mark.parametrize("backend", ["cpu-numpy", "cpu-native", "mlx-ops"])
def test_conversations_are_saved_forked_converted_and_batched(
    backend: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_models.dense()
    for layer in model.layers:
        layer.self_attn.q_proj.weight *= 3  # random models attend evenly: wrong keys would not show
    half = np.exp(rng.normal(0, 1, (2, DIM // 2))).astype(np.float32)
    monkeypatch.setattr(key_balance, "find_factors", lambda *given: np.concatenate([half, half], axis=1))
    calibration = calibrate(model, random_tokens(rng, 400))
    family = KVFamily(model, calibration=calibration, base=FMT, backend=backend)
    runtime, tokens, more = family.runtime("8/8"), random_tokens(rng, 150), random_tokens(rng, 5)
    caches, plain = runtime.make_cache(), make_prompt_cache(model)
    logits_of(model, caches, tokens, [])
    logits_of(model, plain, tokens, [])
    close = logits_of(model, family.convert(caches, "8/8", "f16"), more, [])
    compressed = family.convert(family.runtime("f16").fork(plain, 150), "f16", "8/8")
    again = family.import_caches(*family.export_caches(caches))
    alone = [TurboQuantKVCache.from_state(cache.state) for cache in caches]
    batch = runtime.merge_rows([caches, runtime.fork(caches, 150)])
    want = logits_of(model, plain, more, [])
    together = np.array(model(mx.array([more, more]), cache=batch))
    for got in (close, together[1], *(logits_of(model, held, more, []) for held in (caches, compressed, again, alone))):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.15
    raw = family.convert(compressed, "8/8", "f16")[1]
    assert isinstance(raw, KVCache)


def test_they_are_stored_with_the_means_and_told_apart(tmp_path: Path, rng: np.random.Generator) -> None:
    model, tokenizer = planted(rng), ByteTokenizer()
    first, again = (calibration_for(model, tokenizer, tmp_path, WEIGHTS) for _ in range(2))
    assert tokenizer.calls == 1
    factors = [c.layers[1].key_factors for c in (first, again)]
    assert factors[0] is not None
    assert factors[1] is not None
    assert np.array_equal(factors[0], factors[1])
    other = calibrate(model, random_tokens(rng, 400))
    layers = {i: _with_factors(means, other.layers[i].key_factors) for i, means in first.layers.items()}
    fingerprints = {KVFamily(model, calibration=c, base=FMT).fingerprint for c in (first, again)}
    assert len(fingerprints) == 1
    changed = KVFamily(model, calibration=Calibration(layers, "", first.divergences), base=FMT)
    assert changed.fingerprint not in fingerprints


def _with_factors(means: Any, factors: Any) -> Any:
    return type(means)(means.k, means.v, means.rotary, factors)
