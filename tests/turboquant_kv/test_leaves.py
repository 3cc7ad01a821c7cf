"""Layers that keep several caches in a CacheList: what can be compressed inside is, and what cannot is refused."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import longcat_flash
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache
from tests.turboquant_kv import small_models
from tests.turboquant_kv.test_runtime import logits_of, random_tokens

from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.leaves import layer_numbers, leaves, with_leaves
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.probe import probe_layers
from turboquant_kv.cache.runtime import KVRuntime, UnsupportedModelError
from turboquant_kv.codec.format import KVFormat

FMT = KVFormat(page_tokens=16, sink_tokens=8)


def test_caches_stand_in_a_line_and_go_back_to_their_places() -> None:
    a, b, c, d = KVCache(), ArraysCache(2), KVCache(), KVCache()
    layers = [a, CacheList(b, CacheList(c)), d]
    assert leaves(layers) == [a, b, c, d]
    assert layer_numbers(layers) == [0, 1, 1, 2]
    swapped = with_leaves(layers, [d, c, b, a])
    assert leaves(swapped) == [d, c, b, a]
    assert layer_numbers(swapped) == [0, 1, 1, 2]
    assert leaves(layers) == [a, b, c, d], "the layers themselves stay"


@pytest.mark.parametrize("kind", ["side_by_side", "convolved"])
def test_attention_inside_a_list_is_compressed(kind: str, rng: np.random.Generator) -> None:
    runtime = KVRuntime(model := small_models.EVERY_KIND[kind](), FMT)
    caches = runtime.make_cache()
    logits_of(model, caches, random_tokens(rng, 200), [198, 199])
    attention = [c for c in leaves(caches) if isinstance(c, TurboQuantKVCache)]
    assert len(attention) == len(model.layers)
    measured = runtime.measure(caches)
    assert measured.compressed == sum(c.sequence.compressed_bytes for c in attention if c.sequence is not None) > 0
    assert measured.total <= runtime.bytes_for(200)


@pytest.mark.parametrize("kind", ["side_by_side", "convolved"])
def test_a_row_of_lists_is_bit_for_bit_what_it_is_alone(kind: str, rng: np.random.Generator) -> None:
    """Of the compressed layers: what a step wrote beside others is what it writes alone."""
    model = small_models.EVERY_KIND[kind]()
    family = KVFamily(model, base=FMT)
    runtime = family.runtime("4/4")
    rows = [runtime.make_cache() for _ in range(3)]
    for row, n in zip(rows, (21, 40, 70), strict=True):
        logits_of(model, row, random_tokens(rng, n), [])
    batch = runtime.merge_rows(rows)
    alone = [runtime.merge_rows([row]) for row in rows]
    layers = [i for i, c in enumerate(leaves(batch)) if hasattr(c, "sequences")]
    for _ in range(20):
        for i in layers:
            k, v = (mx.array(rng.standard_normal((3, 2, 1, 64)).astype(np.float32)) for _ in range(2))
            q = mx.array(rng.standard_normal((3, 4, 1, 64)).astype(np.float32))
            out = attend(leaves(batch)[i], q, k, v)
            for b in range(3):
                one = slice(b, b + 1)
                assert mx.array_equal(out[one], attend(leaves(alone[b])[i], q[one], k[one], v[one]))


def attend(cache: Any, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    cache.update_and_fetch(k, v)
    out: mx.array = cache.attend(q, scale=0.1, mask=None, sinks=None)
    return out


def test_a_format_changes_inside_lists(rng: np.random.Generator) -> None:
    model = small_models.side_by_side()
    family = KVFamily(model, base=FMT)
    caches = family.runtime("8/8").make_cache()
    logits_of(model, caches, random_tokens(rng, 90), [])
    smaller = family.convert(caches, "8/8", "4/4")
    assert family.runtime_of(smaller) is family.runtime("4/4")
    assert family.runtime("4/4").measure(smaller).compressed < family.runtime("8/8").measure(caches).compressed
    want, got = (logits_of(model, one, [5], [])[0] for one in (caches, smaller))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.2
    plain = family.convert(smaller, "4/4", "f16")
    assert all(isinstance(layer, CacheList) and type(layer[1]) is KVCache for layer in plain)


def test_latents_inside_lists_are_refused() -> None:
    args = longcat_flash.ModelArgs(
        model_type="longcat_flash",
        attention_method="MLA",
        zero_expert_type="identity",
        hidden_size=64,
        ffn_hidden_size=64,
        moe_topk=1,
        expert_ffn_hidden_size=32,
        n_routed_experts=2,
        zero_expert_num=1,
        num_layers=1,
        vocab_size=small_models.VOCAB,
        max_position_embeddings=1024,
        num_attention_heads=4,
        kv_lora_rank=64,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        routed_scaling_factor=1.0,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        attention_bias=False,
    )
    model = longcat_flash.Model(args)
    assert probe_layers(model).unsupported is not None
    with pytest.raises(UnsupportedModelError, match="caches latents, 80 numbers for each token and layer"):
        KVRuntime(model, FMT)
    KVRuntime(model, None)
