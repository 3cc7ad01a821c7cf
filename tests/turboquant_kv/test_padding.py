"""Head dimensions without a rotation of their own: stored with zeros behind, attended over as they are."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import qwen2
from mlx_lm.models.cache import KVCache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.cache.calibration import calibrate
from turboquant_kv.cache.layer_cache import LayerSource, TurboQuantKVCache
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError, stored_dim

NEARLY_EXACT = KVFormat(8, 8, page_tokens=16, sink_tokens=8)
BACKENDS = ["cpu-numpy", "cpu-native", "mlx-ops"]


def with_head_dim(head_dim: int) -> Any:
    """GQA with key biases, so that means matter."""
    mx.random.seed(0)
    args = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=4 * head_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        rms_norm_eps=1e-6,
        vocab_size=small_models.VOCAB,
    )
    model = qwen2.Model(args)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = 3 * mx.random.normal(layer.self_attn.k_proj.bias.shape)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(
    ("head_dim", "stored"), [(32, 32), (40, 48), (48, 48), (72, 80), (100, 112), (136, 160), (160, 160), (224, 256)]
)
def test_the_next_dimension_that_has_a_rotation_is_taken(head_dim: int, stored: int) -> None:
    assert stored_dim(head_dim) == stored


@pytest.mark.parametrize("head_dim", [8, 24, 36, 200, 320, 513, 576])
def test_what_would_cost_too_much_is_refused_with_its_number(head_dim: int) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"head_dim {head_dim} "):
        stored_dim(head_dim)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [32, 48, 100, 160])
def test_models_compute_what_they_do_uncompressed(head_dim: int, backend: str, rng: np.random.Generator) -> None:
    model = with_head_dim(head_dim)
    tokens = random_tokens(rng, 90)
    plain = logits_of(model, KVRuntime(model, None).make_cache(), tokens, [40, 80, 81])
    runtime = KVRuntime(model, NEARLY_EXACT, calibration=calibrate(model, tokens), backend=backend)
    caches = runtime.make_cache()
    got = logits_of(model, caches, tokens, [40, 80, 81])
    assert np.linalg.norm(got - plain) / np.linalg.norm(plain) < 0.02
    measured, dim = runtime.measure(caches), stored_dim(head_dim)
    assert measured.compressed == 2 * 5 * NEARLY_EXACT.page_bytes(2, dim, dim)
    assert measured.total == runtime.bytes_for(90) == sum(c.nbytes for c in caches)
    assert measured.raw_equivalent == 90 * 2 * 2 * 2 * head_dim * 4
    runtime.release(caches)
    runtime.check_integrity()


@pytest.mark.parametrize("head_dim", [72, 64])
def test_a_chunk_is_planned_with_its_zeros(head_dim: int, rng: np.random.Generator) -> None:
    model, num_tokens = with_head_dim(head_dim), 40
    for fmt in (KVFormat(page_tokens=64, sink_tokens=8), None):
        runtime = KVRuntime(model, fmt)
        caches = runtime.make_cache()
        logits_of(model, caches, random_tokens(rng, num_tokens), [])
        dim = head_dim if fmt is None else stored_dim(head_dim)
        assert runtime.chunk_token_bytes == 2 * 2 * 2 * dim * 4
        if fmt is not None:
            assert runtime.measure(caches).exact >= num_tokens * runtime.chunk_token_bytes, "a page that is not full"


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_batch_get_what_they_get_alone(backend: str, rng: np.random.Generator) -> None:
    source = LayerSource(KVFormat(page_tokens=16, sink_tokens=8), backend)

    def drawn(num_rows: int, heads: int, num_tokens: int) -> mx.array:
        return mx.array(rng.standard_normal((num_rows, heads, num_tokens, 100)).astype(np.float32))

    alone = [TurboQuantKVCache(source) for _ in range(3)]
    for cache, n in zip(alone, (5, 30, 61), strict=True):
        cache.append(drawn(1, 2, n), drawn(1, 2, n))
    batch = TurboQuantKVCache.merge(alone)
    for _ in range(20):
        k, v, q = drawn(3, 2, 1), drawn(3, 2, 1), drawn(3, 4, 1)
        batch.update_and_fetch(k, v)
        out = batch.attend(q, scale=0.1, mask=None, sinks=None)
        assert out.shape == (3, 4, 1, 100)
        for b, cache in enumerate(alone):
            cache.update_and_fetch(k[b : b + 1], v[b : b + 1])
            want = cache.attend(q[b : b + 1], scale=0.1, mask=None, sinks=None)
            assert mx.array_equal(out[b : b + 1], want)


def test_converted_and_saved_conversations_have_their_own_dimension(rng: np.random.Generator) -> None:
    model = with_head_dim(100)
    family = KVFamily(model, base=NEARLY_EXACT, calibration=calibrate(model, random_tokens(rng, 90)))
    caches = family.runtime("8/8").make_cache()
    logits_of(model, caches, random_tokens(rng, 60), [])
    plain = family.convert(caches, "8/8", "f16")
    assert all(type(c) is KVCache and c.keys.shape[3] == c.values.shape[3] == 100 for c in plain)
    again = family.convert(plain, "f16", "8/8")
    loaded = family.import_caches(*family.export_caches(caches))
    more = random_tokens(rng, 5)
    want = logits_of(model, family.runtime("8/8").fork(caches, 60), more, [])
    assert np.array_equal(logits_of(model, loaded, more, []), want)
    for other in (plain, again):
        assert np.linalg.norm(logits_of(model, other, more, []) - want) / np.linalg.norm(want) < 0.02


def test_a_trellis_needs_64_dimensions() -> None:
    with pytest.raises(UnsupportedFormatError, match="head_dim 48 is too short for codec 4t, which needs 64"):
        KVRuntime(with_head_dim(48), KVFormat.parse("4t"))
