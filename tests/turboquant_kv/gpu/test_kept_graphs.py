"""Kept graphs of decode steps on a GPU: the logits and the conversations that the model's own steps give."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv import small_models

from turboquant_kv.cache.kept_graphs import KeptGraphs
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.codec.format import KVFormat


def joined(runtime: KVRuntime, model: Any, prompts: list[list[int]]) -> list[Any]:
    """A batch of conversations that have read these prompts."""
    singles = []
    for prompt in prompts:
        caches = runtime.make_cache()
        model(mx.array([prompt]), cache=caches)
        runtime.evaluate(caches)
        singles.append(caches)
    return runtime.merge_rows(singles)


@pytest.mark.parametrize("name", ["4/4", "4t/3t"])
@pytest.mark.parametrize("lengths", [(70,), (33, 150, 7)])
def test_logits_are_the_models(name: str, lengths: tuple[int, ...], rng: np.random.Generator) -> None:
    """Over closed pages and exact rows that have grown, each step handed over before the last one is read."""
    model = small_models.dense(int(rng.integers(1 << 30)), 3)
    model.set_dtype(mx.float16)
    runtime = KVRuntime(model, KVFormat.parse(name))
    prompts = [rng.integers(0, small_models.VOCAB, n).tolist() for n in lengths]
    plain, kept = joined(runtime, model, prompts), joined(runtime, model, prompts)
    graphs = KeptGraphs(model)
    steps = []
    for _ in range(120):
        tokens = mx.array(rng.integers(0, small_models.VOCAB, (len(lengths), 1)))
        pair = graphs.forward(tokens, kept), model(tokens, cache=plain)
        mx.async_eval(*pair)  # type: ignore[no-untyped-call]
        steps.append(pair)
    for number, pair in enumerate(steps):
        logits, expected = (np.array(x.astype(mx.float32)) for x in pair)
        assert np.abs(logits - expected).max() <= 2e-2 * np.std(expected), number
    assert graphs.num_run > 60
    assert [cache.lengths for cache in kept] == [cache.lengths for cache in plain]
