"""KVRuntime with mlx-lm's own models: every layer mix, mlx-lm's own generators, and what it says about bytes."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import qwen2
from tests.turboquant_kv import small_models

from turboquant_kv.cache import seam as attention
from turboquant_kv.cache.calibration import calibrate
from turboquant_kv.cache.layer_cache import TurboQuantKVCache
from turboquant_kv.cache.runtime import KVRuntime, UnsupportedModelError
from turboquant_kv.codec.format import KVFormat, UnsupportedFormatError

NEARLY_EXACT = KVFormat(8, 8, page_tokens=16, sink_tokens=8)


def random_tokens(rng: np.random.Generator, num_tokens: int) -> list[int]:
    return [int(t) for t in rng.integers(1, small_models.VOCAB, num_tokens)]


def logits_of(model: Any, caches: list[Any], tokens: list[int], cuts: list[int]) -> np.ndarray[Any, Any]:
    """(T, vocab), computed in chunks."""
    edges = [0, *cuts, len(tokens)]
    parts = [model(mx.array([tokens[a:b]]), cache=caches) for a, b in itertools.pairwise(edges)]
    return np.array(mx.concatenate(parts, axis=1)[0].astype(mx.float32))


@pytest.mark.parametrize("kind", small_models.EVERY_KIND)
@pytest.mark.parametrize("backend", ["cpu-numpy", "mlx-ops"])
def test_every_layer_mix_computes_what_it_does_uncompressed(kind: str, backend: str, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    tokens = random_tokens(rng, 90)
    plain = logits_of(model, KVRuntime(model, None).make_cache(), tokens, [40, 80, 81])
    runtime = KVRuntime(model, NEARLY_EXACT, calibration=calibrate(model, tokens), backend=backend)
    compressed = logits_of(model, runtime.make_cache(), tokens, [40, 80, 81])
    assert runtime.layers_compressed + runtime.layers_uncompressed == len(model.layers)
    assert runtime.layers_compressed >= 1
    # 8-bit codes have a relative error of 0.6%; attention and two or three layers do not amplify it much. In `sliding`
    # norms of queries and keys make attention sharp: random noise of that size on its keys moves its logits by 3 to 4%.
    assert np.linalg.norm(compressed - plain) / np.linalg.norm(plain) < (0.05 if kind == "sliding" else 0.02)
    coarse = KVRuntime(model, KVFormat(2, 2, page_tokens=16, sink_tokens=0), backend=backend).make_cache()
    assert np.linalg.norm(logits_of(model, coarse, tokens, []) - plain) > np.linalg.norm(compressed - plain)


def greedy(model: Any, caches: list[Any], prompt: list[int], num_tokens: int) -> list[int]:
    steps = generate_step(mx.array(prompt), model, prompt_cache=caches, max_tokens=num_tokens, prefill_step_size=32)
    return [token for token, _ in steps]


@pytest.mark.parametrize("backend", ["cpu-numpy", "mlx-ops"])
def test_mlx_lms_batch_generator_gives_each_row_its_own_answer(backend: str, rng: np.random.Generator) -> None:
    model = small_models.dense()
    runtime = KVRuntime(model, NEARLY_EXACT, backend=backend)
    prompts = [random_tokens(rng, n) for n in (3, 70, 31, 48)]
    limits = [12, 3, 20, 7]
    alone = [greedy(model, runtime.make_cache(), p, n) for p, n in zip(prompts, limits, strict=True)]
    generator = BatchGenerator(model, prefill_step_size=32, completion_batch_size=4, prefill_batch_size=2)
    uids = generator.insert(prompts, limits, caches=[runtime.make_cache() for _ in prompts])
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for r in responses:
            answers[r.uid].append(r.token)
    generator.close()
    assert [answers[uid] for uid in uids] == alone
    generator._generation_batch.filter([])
    runtime.check_integrity()


def test_a_finished_rows_cache_continues_the_conversation(rng: np.random.Generator) -> None:
    model = small_models.dense()
    runtime = KVRuntime(model, NEARLY_EXACT)
    prompt, more = random_tokens(rng, 50), random_tokens(rng, 9)
    caches = runtime.make_cache()
    answer = greedy(model, caches, prompt, 8)
    held = caches[0].offset
    assert held >= len(prompt) + 7
    continued = greedy(model, runtime.fork(caches, len(prompt)), answer + more, 5)
    assert continued == greedy(model, runtime.make_cache(), prompt + answer + more, 5)
    assert caches[0].offset == held, "the fork left the original alone"


def test_bytes_are_planned_as_they_are_allocated(rng: np.random.Generator) -> None:
    model = small_models.dense()
    fmt = KVFormat(4, 3, page_tokens=16, sink_tokens=8)
    runtime = KVRuntime(model, fmt)
    assert runtime.token_bytes == 2 * fmt.token_bytes(2, 64, 64)
    assert runtime.token_raw_bytes == 2 * 2 * 2 * 64 * 4
    for num_tokens in (0, 1, 8, 9, 24, 25, 90):
        caches = runtime.make_cache()
        if num_tokens:
            mx.eval(model(mx.array([random_tokens(rng, num_tokens)]), cache=caches))
        bytes_ = runtime.measure(caches)
        assert bytes_.tokens == num_tokens
        assert bytes_.total == runtime.bytes_for(num_tokens) == sum(c.nbytes for c in caches)
        assert bytes_.raw_equivalent == num_tokens * runtime.token_raw_bytes
        assert runtime.allocated_bytes() == bytes_.total + runtime.slack_bytes()
        runtime.release(caches)
    assert runtime.allocated_bytes() == runtime.slack_bytes()


@pytest.mark.parametrize("kind", small_models.EVERY_KIND)
@pytest.mark.parametrize("fmt", [None, KVFormat(4, 4, page_tokens=16, sink_tokens=8)])
def test_forks_continue_like_a_cold_start(kind: str, fmt: KVFormat | None, rng: np.random.Generator) -> None:
    model = small_models.EVERY_KIND[kind]()
    runtime = KVRuntime(model, fmt)
    tokens = random_tokens(rng, 70)
    caches = runtime.make_cache()
    logits_of(model, caches, tokens[:60], [])
    whole = runtime.usable_prefix(caches, 60)
    assert whole == 60
    partial = runtime.usable_prefix(caches, 50)
    if kind in small_models.ALL_COMPRESSED or (fmt is not None and kind in ("sliding", "with_sinks")):
        assert partial == (50 if fmt is None else 40)
    else:
        assert partial == 0, "rings and recurrent state exist at their end only"
    for length in {whole, partial} - {0}:
        fork = runtime.fork(caches, length)
        got = logits_of(model, fork, tokens[length:], [])
        cold = runtime.make_cache()
        want = logits_of(model, cold, tokens, [length])[length:]
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 5e-3


def test_totals_count_what_is_shared_once(rng: np.random.Generator) -> None:
    model = small_models.dense()
    runtime = KVRuntime(model, KVFormat(4, 3, page_tokens=16, sink_tokens=8))
    caches = runtime.make_cache()
    logits_of(model, caches, random_tokens(rng, 60), [])
    alone = runtime.totals()
    assert (alone.tokens, alone.total - alone.slack) == (60, runtime.measure(caches).total)
    assert alone.raw_equivalent == runtime.measure(caches).raw_equivalent == runtime.compressed_raw_bytes(60)
    fork = runtime.fork(caches, 60)
    assert runtime.totals() == alone
    logits_of(model, fork, random_tokens(rng, 10), [])
    both = runtime.totals()
    assert alone.tokens < both.tokens < 60 + 70
    runtime.release(caches)
    runtime.release(fork)
    assert runtime.totals().tokens == runtime.totals().raw_equivalent == 0


def test_scratch_does_not_grow_with_the_history(rng: np.random.Generator) -> None:
    """Attention never holds a full-precision copy of the past: its peak stays put while the history triples."""
    model = small_models.dense()
    runtime = KVRuntime(model, KVFormat(4, 4))
    caches = runtime.make_cache()
    peaks = []
    for length in (3072, 9216):
        while caches[0].offset < length:
            mx.eval(model(mx.array([random_tokens(rng, 1024)]), cache=caches))
        tracemalloc.start()
        held = runtime.allocated_bytes()
        mx.eval(model(mx.array([random_tokens(rng, 64)]), cache=caches))
        grown = runtime.allocated_bytes() - held
        peaks.append(tracemalloc.get_traced_memory()[1] - grown)
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 9216 * runtime.token_raw_bytes / 2


def test_models_that_bypass_the_seam_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_models.dense()
    attention.install()

    def direct(q: mx.array, k: mx.array, v: mx.array, cache: Any, scale: float, mask: Any) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    monkeypatch.setattr(qwen2, "scaled_dot_product_attention", direct)
    with pytest.raises(UnsupportedModelError, match="without mlx-lm's scaled_dot_product_attention"):
        KVRuntime(model, KVFormat())
    KVRuntime(model, None)


def test_head_dims_without_a_rotation_are_refused() -> None:
    args = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        rms_norm_eps=1e-6,
        vocab_size=11,
    )
    with pytest.raises(UnsupportedFormatError, match="head_dim 24"):
        KVRuntime(qwen2.Model(args), KVFormat())


def test_the_seam_leaves_other_caches_to_mlx_lm(rng: np.random.Generator) -> None:
    attention.install()
    attention.install()
    assert attention.is_installed()
    q, k = mx.random.normal((1, 2, 3, 8)), mx.random.normal((1, 2, 3, 8))
    out = qwen2.scaled_dot_product_attention(q, k, k, cache=None, scale=0.3, mask="causal")
    assert mx.array_equal(out, mx.fast.scaled_dot_product_attention(q, k, k, scale=0.3, mask="causal"))


def test_a_decode_step_leaves_no_growing_graph(rng: np.random.Generator) -> None:
    """With the lazy backend, evaluating a step's logits and caches leaves nothing pending behind."""
    model = small_models.dense()
    runtime = KVRuntime(model, KVFormat(4, 4, page_tokens=16, sink_tokens=8), backend="mlx-ops")
    caches = runtime.make_cache()
    active = []
    for i in range(96):
        mx.eval(model(mx.array([random_tokens(rng, 1)]), cache=caches))
        runtime.evaluate(caches)
        if i in (47, 95):
            active.append(mx.get_active_memory() - runtime.allocated_bytes())
    assert abs(active[1] - active[0]) < 64 * 1024
    assert isinstance(caches[0], TurboQuantKVCache)
