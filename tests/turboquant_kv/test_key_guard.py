"""Layers whose keys a format cannot hold are found, given more bits and said; all others keep the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_calibration import WEIGHTS, ByteTokenizer
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.backends.base import Means
from turboquant_kv.cache import key_balance, key_guard
from turboquant_kv.cache.calibration import Calibration, calibrate, calibration_for
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.leaves import leaves, with_leaves
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.probe import WindowedKVCache, window_of_ring
from turboquant_kv.cache.rope_probe import learn_rotary
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat
from turboquant_kv.evaluation import Comparison, compare

FMT = KVFormat(4, 4, page_tokens=16, sink_tokens=8)
BIAS_NORM = 900.0  # as in Qwen2.5-7B


def planted(rng: np.random.Generator, norm: float = BIAS_NORM) -> Any:
    """A Qwen2-like model whose second layer has such a bias on its keys, as large in each rotary pair."""
    model = small_models.dense()
    attention = model.layers[1].self_attn
    direction = rng.standard_normal(attention.k_proj.bias.shape)
    attention.k_proj.bias = mx.array((norm * direction / np.linalg.norm(direction)).astype(np.float32))
    attention.q_proj.weight *= 3  # random models attend evenly: errors of keys would not show
    return model


@pytest.fixture
def unbalanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose keys factors do not help: those of the planted bias would (test_key_balance.py)."""
    monkeypatch.setattr(key_balance, "find_factors", lambda *given: None)


def loss(model: Any, runtime: KVRuntime, tokens: list[int]) -> Comparison:
    return compare(model, tokens, make_prompt_cache(model), {"": runtime.make_cache()}, 64)[""]


@pytest.mark.usefixtures("unbalanced")
def test_a_planted_bias_is_found_and_cured(rng: np.random.Generator) -> None:
    model, text = planted(rng), random_tokens(rng, 400)
    calibration = calibrate(model, text)
    assert set(key_guard.raised(FMT, calibration.divergences)) == {1}
    guarded = KVRuntime(model, FMT, calibration=calibration)
    unguarded = KVRuntime(model, FMT, calibration=Calibration(calibration.layers, ""))
    assert (guarded.description, unguarded.description) == ("4/4, 1 of 2 layers 8/4", "4/4")
    tokens = random_tokens(rng, 200)
    bad, good = (loss(model, runtime, tokens).kl.mean() for runtime in (unguarded, guarded))
    assert bad > good
    assert calibration.divergences[1]["4"] > 10 * calibration.divergences[1]["8"]


def test_healthy_models_keep_their_format(rng: np.random.Generator) -> None:
    model = small_models.dense()
    runtime = KVRuntime(model, FMT, calibration=calibrate(model, random_tokens(rng, 400)))
    assert runtime.description == "4/4"
    assert set(runtime.layer_formats.values()) == {FMT}


def test_the_next_bits_that_suffice_are_taken() -> None:
    healthy = {"2": 0.3, "2t": 0.2, "3": 0.08, "3t": 0.05, "4": 0.02, "4t": 0.01, "8": 0.0}
    worse = {"2": 9.0, "2t": 7.0, "3": 2.0, "3t": 1.0, "4": 0.2, "4t": 0.1, "8": 0.001}
    bad = {"2": 99.0, "2t": 90.0, "3": 50.0, "3t": 40.0, "4": 20.0, "4t": 15.0, "8": 0.2}
    hopeless = {**bad, "8": 5.0}
    measured = {0: bad, 1: healthy, 2: worse, 3: healthy, 4: healthy, 5: hopeless}
    for name, expected in (
        ("4/4", {0: "8/4", 5: None}),
        ("3/3", {0: "8/3", 2: "4/3", 5: None}),
        ("3t/2t", {0: "8/2t", 2: "4t/2t", 5: None}),
        ("8/4", {5: None}),
        ("2/2", {0: "8/2", 2: "4/2", 5: None}),
        ("2t/2t", {0: "8/2t", 2: "4t/2t", 5: None}),
    ):
        found = key_guard.raised(KVFormat.parse(name), measured)
        assert {layer: fmt and fmt.name for layer, fmt in found.items()} == expected
    assert key_guard.raised(KVFormat.parse("4/4"), {}) == {}


@pytest.mark.usefixtures("unbalanced")
@pytest.mark.parametrize("backend", ["cpu-numpy", "cpu-native", "mlx-ops"])
def test_bytes_of_layers_with_other_formats_are_counted(backend: str, rng: np.random.Generator) -> None:
    model = planted(rng)
    runtime = KVRuntime(model, FMT, calibration=calibrate(model, random_tokens(rng, 400)), backend=backend)
    plain = KVRuntime(model, FMT, backend=backend)
    caches = runtime.make_cache()
    logits_of(model, caches, random_tokens(rng, 150), [])
    assert runtime.measure(caches).total == runtime.bytes_for(150) == runtime.unique_bytes() > plain.bytes_for(150)
    assert runtime.token_bytes > plain.token_bytes
    layers = [cache.sequence for cache in caches if isinstance(cache, TurboQuantKVCache) and cache.sequence]
    assert layers[1].compressed_bytes > layers[0].compressed_bytes
    assert sum(layer.compressed_bytes for layer in layers) == runtime.totals().compressed


@pytest.mark.usefixtures("unbalanced")
def test_such_conversations_are_saved_forked_and_converted(rng: np.random.Generator) -> None:
    model = planted(rng)
    family = KVFamily(model, calibration=calibrate(model, random_tokens(rng, 400)), base=FMT, backend="cpu-numpy")
    runtime = family.runtime("4/4")
    caches, more = runtime.make_cache(), random_tokens(rng, 5)
    logits_of(model, caches, random_tokens(rng, 150), [])
    again = family.import_caches(*family.export_caches(caches))
    fork = runtime.fork(caches, runtime.usable_prefix(caches, 150))
    smaller = family.convert(caches, "4/4", "3/3")
    assert family.runtime("3/3").description == "3/3, 1 of 2 layers 8/3"
    codes = [[cache.sequence.pages().k_codes for cache in held] for held in (caches, smaller)]
    assert np.array_equal(codes[0][1], codes[1][1]), "its keys stay as they are"
    assert codes[0][0].shape != codes[1][0].shape
    alone = [TurboQuantKVCache.from_state(cache.state) for cache in caches]
    want = logits_of(model, caches, more, [])
    for same in (again, fork):
        assert np.array_equal(logits_of(model, same, more, []), want)
    got = logits_of(model, alone, more, [])  # by the machine's own backend
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05


def test_what_was_measured_is_stored_with_the_means(tmp_path: Path, rng: np.random.Generator) -> None:
    model, tokenizer = planted(rng), ByteTokenizer()
    first = calibration_for(model, tokenizer, tmp_path, WEIGHTS)
    again = calibration_for(model, tokenizer, tmp_path, WEIGHTS)
    assert tokenizer.calls == 1
    assert again.divergences == first.divergences
    families = [KVFamily(model, calibration=c, base=FMT) for c in (first, again)]
    assert families[0].fingerprint == families[1].fingerprint
    other = KVFamily(model, calibration=Calibration(first.layers, ""), base=FMT)
    assert other.fingerprint != families[0].fingerprint, "its layers may have other formats"


@pytest.mark.parametrize("backend", ["cpu-numpy", "cpu-native", "mlx-ops"])
def test_a_layer_that_no_codec_holds_stays_uncompressed_and_is_told(backend: str, rng: np.random.Generator) -> None:
    model = small_models.dense()
    calibration = calibrate(model, random_tokens(rng, 400))
    hopeless = {**calibration.divergences[1], **dict.fromkeys(key_guard.KEY_CODECS, 9.0)}
    # beside three healthy layers: one of two would be its own median
    measured = {
        0: calibration.divergences[0],
        1: hopeless,
        2: calibration.divergences[0],
        3: calibration.divergences[0],
    }
    family = KVFamily(model, calibration=Calibration(calibration.layers, "", measured), base=FMT, backend=backend)
    runtime = family.runtime("4/4")
    assert runtime.description == "4/4, 1 of 2 layers f16"
    caches, tokens, more = runtime.make_cache(), random_tokens(rng, 150), random_tokens(rng, 5)
    assert [isinstance(cache, TurboQuantKVCache) for cache in caches] == [True, False]
    exact = make_prompt_cache(model)
    logits_of(model, caches, tokens, [])
    logits_of(model, exact, tokens, [])
    assert runtime.measure(caches).uncompressed > 0
    assert runtime.measure(caches).total == runtime.bytes_for(150)
    again = family.import_caches(*family.export_caches(caches))
    fork = runtime.fork(caches, runtime.usable_prefix(caches, 150))
    smaller = family.convert(caches, "4/4", "3/3")
    batch = runtime.merge_rows([caches, fork])
    want = logits_of(model, caches, more, [])
    for same in (again, fork):
        assert np.array_equal(logits_of(model, same, more, []), want)
    close = logits_of(model, exact, more, [])
    for lossy in (want, logits_of(model, smaller, more, [])):
        assert np.linalg.norm(lossy - close) / np.linalg.norm(close) < 0.3
    together = np.array(model(mx.array([more, more]), cache=batch).astype(mx.float32))
    assert np.linalg.norm(together[0] - want) / np.linalg.norm(want) < 0.05


@pytest.mark.parametrize("kind", ["sliding", "with_sinks", "convolved", "capped"])
def test_layers_are_given_what_they_are_given_anywhere(kind: str, rng: np.random.Generator) -> None:
    """Windows of 16 and 24 tokens are kept to, so that the layers behind get what they should; far away as well."""
    model, text = small_models.EVERY_KIND[kind](), random_tokens(rng, 150)
    plain = make_prompt_cache(model)
    held = [WindowedKVCache(w) if (w := window_of_ring(c)) else c for c in leaves(plain)]
    mx.eval(model(mx.array([text]), cache=with_leaves(plain, held)))
    places = [i for i, cache in enumerate(held) if isinstance(cache, KVCache)]
    near, far = (key_guard.record(model, text, places, offset) for offset in (0, 4096))
    assert list(near) == list(far) == places
    for i in places:
        want = np.array(held[i].keys_and_values()[0][0])
        np.testing.assert_allclose(near[i].keys, want, atol=1e-4 * np.abs(want).max())
        seen = [np.where(given.hidden, 0, given.logits) for given in (near[i], far[i])]
        assert np.linalg.norm(seen[1] - seen[0]) < 1e-2 * np.linalg.norm(seen[0]), "scores do not know where they are"
        assert near[i].window == getattr(held[i], "window", 0)


@pytest.mark.parametrize("offset", [4096, 32768])
def test_what_a_layer_is_given_far_away_can_be_computed(offset: int, rng: np.random.Generator) -> None:
    model, text = small_models.dense(), random_tokens(rng, 100)
    rotaries = learn_rotary(model, {0: 64, 1: 64})
    near, far = (key_guard.record(model, text, [0, 1], at) for at in (0, offset))
    for i, rotary in rotaries.items():
        moved = near[i].moved(rotary, offset)
        assert moved.offset == offset
        for computed, given in ((moved.keys, far[i].keys), (moved.queries, far[i].queries)):
            assert np.linalg.norm(computed - given) < 5e-3 * np.linalg.norm(given)


def test_keys_that_left_the_window_do_not_count(rng: np.random.Generator) -> None:
    num_tokens, window = key_guard.NUM_TOKENS, 96
    keys = rng.standard_normal((2, num_tokens, 64)).astype(np.float32)
    queries = rng.standard_normal((4, key_guard.NUM_MEASURED_QUERIES, 64)).astype(np.float32)
    means = {0: Means(np.zeros((2, 64), np.float32), np.zeros((2, 64), np.float32))}
    other = keys.copy()
    gone = num_tokens - key_guard.NUM_MEASURED_QUERIES - window + 1
    other[:, key_guard.SKIPPED_TOKENS : gone] *= 1000  # a code's error grows with its key
    for width, is_same in ((window, True), (window + 1, False), (0, False)):
        given = [key_guard.Recorded(0, k, queries, 0.125, window=width) for k in (keys, other)]
        near, far = (key_guard.measure([{0: one}], means)[0]["3"] for one in given)
        assert (near == far) == is_same
        hidden = given[0].hidden
        weights = key_balance.attention_weights(given[0].logits, given[0].query_positions, hidden, 0)
        assert not np.where(hidden, weights, 0).any()
        p = np.where(hidden, 0, np.exp(given[0].logits))
        p /= p.sum(axis=-1, keepdims=True)
        is_old = np.arange(num_tokens) <= given[0].query_positions[:, None] - key_balance.RECENT_TOKENS
        np.testing.assert_allclose(weights, p * (1 - p) * is_old, atol=1e-6)
