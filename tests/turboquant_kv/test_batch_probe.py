"""Batches on trial: models that get them wrong are told from those that do not; rows apart get what they get alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gemma3_text, qwen2
from tests.turboquant_kv import odd_models, small_models

from turboquant_kv.cache import batch_probe
from turboquant_kv.cache.batch_probe import Batching
from turboquant_kv.cache.leaves import leaves
from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.cache.rows_apart import RowsApart, forward, merge_apart
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat

FORMAT = KVFormat(4, 4, page_tokens=16, sink_tokens=8, centred=False)


def runtime_of(model: Any, name: str) -> KVRuntime:
    return KVFamily(model, base=FORMAT).runtime(name)


@pytest.mark.parametrize("name", ["f16", "4/4"])
@pytest.mark.parametrize("kind", sorted(small_models.EVERY_KIND))
def test_models_whose_batches_are_right_keep_them(kind: str, name: str, seed: int) -> None:
    runtime = runtime_of(small_models.EVERY_KIND[kind](seed), name)
    assert runtime.try_batches() == Batching(None, None)
    assert runtime.unique_bytes() == 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_rounding_in_half_precision_costs_no_batches(dtype: mx.Dtype, seed: int) -> None:
    model = small_models.dense(seed, num_layers=6)
    model.set_dtype(dtype)
    assert runtime_of(model, "f16").try_batches() == Batching(None, None)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (odd_models.reusing, "together get other logits than alone"),
        (odd_models.absolute, "cannot be computed (ValueError)"),
        (odd_models.chunked, "cannot be computed (AttributeError)"),
    ],
    ids=["reusing", "absolute", "chunked"],
)
def test_wrong_batches_are_found(model: Any, reason: str, seed: int) -> None:
    found = runtime_of(model(seed), "f16").try_batches()
    assert found.decode is not None and reason in found.decode
    assert found.prefill == found.decode


@pytest.mark.parametrize("name", ["f16", "4/4"])
def test_a_model_that_fails_with_as_many_rows_as_kv_heads_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two, three and six rows it is right."""
    args = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=320,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=5,
        num_key_value_heads=5,
        rms_norm_eps=1e-6,
        vocab_size=small_models.VOCAB,
    )
    model, whole = qwen2.Model(args), qwen2.Attention.__call__

    def mixes(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        out = whole(self, x, mask, cache)
        return out[::-1] if x.shape[:2] == (5, 1) else out

    monkeypatch.setattr(qwen2.Attention, "__call__", mixes)
    found = runtime_of(model, name).try_batches()
    assert found.decode is not None and "5 rows" in found.decode


@pytest.mark.parametrize("name", ["f16", "4/4"])
def test_kv_heads_of_rings_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full layers have two of them, which is tried anyway."""
    model, whole = small_models.sliding(), gemma3_text.Attention.__call__
    args = dataclasses.replace(model.args, num_attention_heads=5, num_key_value_heads=5)
    for number in (0, 1):
        model.layers[number].self_attn = gemma3_text.Attention(args, number)

    def mixes(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        out = whole(self, x, mask, cache)
        return out[::-1] if x.shape[:2] == (5, 1) else out

    monkeypatch.setattr(gemma3_text.Attention, "__call__", mixes)
    found = runtime_of(model, name).try_batches()
    assert found.decode is not None and "5 rows" in found.decode


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        ({("prefill", 0), ("decode", 1)}, Batching()),
        ({("decode", 0), ("prefill", 1)}, Batching()),
        ({("prefill", 0), ("prefill", 1), ("decode", 1)}, Batching(None, "prefill 1")),
        ({("decode", 0), ("decode", 1), ("prefill", 0)}, Batching("decode 1", "decode 1")),
    ],
)
def test_a_verdict_needs_both_sets_of_tokens(
    fail: set[tuple[str, int]], expected: Batching, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("decode", "prefill"):
        real = getattr(batch_probe._Trial, kind)

        def fails_for(trial: Any, *given: Any, kind: str = kind, real: Any = real) -> None:
            if (kind, trial._seed) in fail:
                raise batch_probe._WrongError(f"{kind} {trial._seed}")
            real(trial, *given)

        monkeypatch.setattr(batch_probe._Trial, kind, fails_for)
    assert runtime_of(small_models.dense(), "4/4").try_batches() == expected


def test_wrong_padding_of_prompts_costs_only_their_reading_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = small_models.dense(), qwen2.Attention.__call__

    def sees_padding(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        out = whole(self, x, mask, cache)
        return out + x.mean(axis=1, keepdims=True) if x.shape[0] > 1 and x.shape[1] > 1 else out

    monkeypatch.setattr(qwen2.Attention, "__call__", sees_padding)
    found = runtime_of(model, "4/4").try_batches()
    assert found.decode is None
    assert found.prefill is not None and "2 prompts" in found.prefill


def test_a_difference_by_chance_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a router's two best experts are all but equal."""
    distances = iter([9.0])
    real = batch_probe._distance

    def once_far(got: Any, expected: Any) -> float:
        return next(distances, 0.0) or real(got, expected)

    runtime = runtime_of(small_models.dense(), "f16")
    monkeypatch.setattr(batch_probe._Trial, "_rounding_limit", lambda trial: 0.01)
    monkeypatch.setattr(batch_probe, "_distance", once_far)
    assert runtime.try_batches().decode is None and next(distances, None) is None


def test_nothing_but_numbers_is_far_from_numbers() -> None:
    a = np.array([1.0, 2.0, -np.inf], np.float32)
    assert batch_probe._distance(a, a) == 0.0
    assert batch_probe._distance(np.array([1.0, np.nan, -np.inf], np.float32), a) == np.inf


@pytest.mark.parametrize("name", ["f16", "4/4"])
@pytest.mark.parametrize("kind", ["absolute", "chunked"])
def test_what_needs_a_position_that_is_a_number_is_compressed(kind: str, name: str, rng: np.random.Generator) -> None:
    """One row at a time, as its format does in any other model; exact as long as nothing but exact ends is held."""
    model = odd_models.EVERY_KIND[kind]()
    family = KVFamily(model, base=FORMAT)
    assert family.layers.unsupported is None
    runtime = family.runtime(name)
    assert runtime.layers_compressed == (0 if name == "f16" else {"absolute": 2, "chunked": 1}[kind])
    prompt = [int(t) for t in rng.integers(0, small_models.VOCAB, 21)]
    ours, plain = runtime.make_cache(), family.runtime("f16").make_cache()
    for tokens in (prompt[:9], prompt[9:20], prompt[20:]):
        got, want = (np.array(model(mx.array([tokens]), cache=c)[0, -1]) for c in (ours, plain))
        assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want)
    runtime.release(ours)


@pytest.mark.parametrize("name", ["f16", "4/4"])
@pytest.mark.parametrize("kind", sorted({**small_models.EVERY_KIND, "absolute": 0, "chunked": 0}))
def test_rows_apart_get_what_they_get_alone(kind: str, name: str, rng: np.random.Generator) -> None:
    model = {**small_models.EVERY_KIND, **odd_models.EVERY_KIND}[kind]()
    runtime = runtime_of(model, name)
    alone = []
    for length in (3, 40, 18):
        alone.append(runtime.make_cache())
        model(mx.array([[int(t) for t in rng.integers(0, small_models.VOCAB, length)]]), cache=alone[-1])
        runtime.evaluate(alone[-1])
    batch: list[Any] = list(merge_apart(alone[:1]))
    for members, change in (([0], None), ([0, 1, 2], "join"), ([2, 0], "leave")):
        if change == "join":
            batch = runtime.extend_rows(batch, list(merge_apart(alone[1:])))
        elif change == "leave":
            for cache in batch:
                cache.filter(mx.array([2, 0]))
        for _ in range(3):
            tokens = rng.integers(0, small_models.VOCAB, (len(members), 1))
            got = np.array(forward(model, mx.array(tokens), batch))
            runtime.evaluate(batch)
            for i, row in enumerate(members):
                want = np.array(model(mx.array(tokens[i : i + 1]), cache=alone[row]))
                runtime.evaluate(alone[row])
                assert np.array_equal(got[i : i + 1], want)
                extracted = [cache.extract(i) for cache in batch]
                assert runtime.measure_row(batch, i) == runtime.measure(extracted) == runtime.measure(alone[row])
                runtime.release(extracted)
    assert all(isinstance(cache, RowsApart) and cache.nbytes > 0 for cache in leaves(batch))
    used = runtime.unique_bytes()
    runtime.release(batch)
    assert runtime.unique_bytes() < used or name == "f16"
    for caches in alone:
        runtime.release(caches)
    assert runtime.unique_bytes() == 0
    runtime.check_integrity()


@pytest.mark.parametrize("name", ["f16", "4/4"])
def test_a_conversation_may_come_twice(name: str, rng: np.random.Generator) -> None:
    model = small_models.sliding()
    runtime = runtime_of(model, name)
    single = runtime.make_cache()
    model(mx.array([[int(t) for t in rng.integers(0, small_models.VOCAB, 30)]]), cache=single)
    batch = list(merge_apart([single, single]))
    for _ in range(3):
        token = int(rng.integers(0, small_models.VOCAB))
        got = np.array(forward(model, mx.array([[token], [token]]), batch))
        want = np.array(model(mx.array([[token]]), cache=single))
        assert np.array_equal(got[:1], want)
        assert np.array_equal(got[1:], want)


def test_an_extracted_row_is_not_written_by_its_batch(rng: np.random.Generator) -> None:
    model = odd_models.chunked()
    runtime = runtime_of(model, "4/4")
    single = runtime.make_cache()
    model(mx.array([[1, 2, 3]]), cache=single)
    batch = list(merge_apart([single]))
    before = [cache.extract(0) for cache in batch]
    twin = copy.deepcopy(single)
    forward(model, mx.array([[4]]), batch)
    a, b = (np.array(model(mx.array([[5]]), cache=caches)) for caches in (before, twin))
    assert np.array_equal(a, b)
