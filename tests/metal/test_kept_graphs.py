"""Steps by kept graphs do to logits, pages and rows what the model does by itself: emulated Metal, byte by byte.

mx.compile cannot trace what the emulator runs, so traced functions are called as they are here. That graphs which were
traced once are right in later steps is tests/turboquant_kv/test_kept_graphs.py's business, and the device's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.metal.emulator import metal_kernel
from tests.turboquant_kv import small_models

from turboquant_kv.backends.base import LayerShape
from turboquant_kv.backends.gpu.backend import GpuBackend
from turboquant_kv.backends.gpu.launch import DecodeKernels
from turboquant_kv.backends.gpu.page_kernels import PageKernels
from turboquant_kv.cache import seam
from turboquant_kv.cache.kept_graphs import STEPS_BEFORE, KeptGraphs
from turboquant_kv.cache.layer_cache import BatchTurboQuantKVCache, LayerSource, TurboQuantKVCache
from turboquant_kv.cache.pages import PagePool
from turboquant_kv.cache.sequence import PagedSequence
from turboquant_kv.codec.format import KVFormat

LAYERS = 2
FMT = replace(KVFormat.parse("4/4"), page_tokens=16, sink_tokens=4)
LENGTHS = (30, 7)  # of prompts


def as_it_is(traced: Any) -> Any:
    return traced


class Conversations:
    """A batch of conversations of `dense`, and everything it decodes."""

    def __init__(self, model: Any, prompts: list[Any]) -> None:
        seam.install()
        self.model = model
        backend = GpuBackend("metal", DecodeKernels("metal", metal_kernel), PageKernels("metal", metal_kernel))
        shapes = [LayerShape(2, 64, 64, mx.float32)] * LAYERS
        self.pool = PagePool(backend, shapes, FMT, [None] * LAYERS)
        self.sources = [LayerSource.of_pool(self.pool, layer) for layer in range(LAYERS)]
        self.batch: list[BatchTurboQuantKVCache] = []
        for prompt in prompts:
            self.join(prompt)

    def join(self, prompt: Any) -> None:
        conversation = PagedSequence(self.pool, range(LAYERS))
        singles = [TurboQuantKVCache(source, conversation.of_layer(source.layer)) for source in self.sources]
        mx.eval(self.model(mx.array([prompt]), cache=singles))
        joined = [TurboQuantKVCache.merge([one]) for one in singles]
        for single in singles:
            single.release()
        if not self.batch:
            self.batch = joined
        else:
            for cache, other in zip(self.batch, joined, strict=True):
                cache.extend(other)

    def contents(self) -> list[Any]:
        """All rows' states, as they would be saved."""
        states = [[np.array(x) if isinstance(x, mx.array) else x for x in row] for c in self.batch for row in c.state]
        return states


def same(a: list[Any], b: list[Any]) -> bool:
    return all(
        np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.fixture
def twice(rng: np.random.Generator) -> tuple[Conversations, Conversations]:
    """The same conversations two times, each with pages of its own."""
    model = small_models.dense(int(rng.integers(1 << 30)), LAYERS)
    prompts = [rng.integers(0, small_models.VOCAB, length).tolist() for length in LENGTHS]
    return Conversations(model, prompts), Conversations(model, prompts)


def test_pages_and_logits_are_those_of_the_model(
    twice: tuple[Conversations, Conversations], rng: np.random.Generator
) -> None:
    """Over closed pages, grown regions, a row that joins and one that leaves."""
    plain, kept = twice
    graphs = KeptGraphs(kept.model, as_it_is)
    for number in range(40):
        if number == 12:
            prompt = rng.integers(0, small_models.VOCAB, 19).tolist()
            plain.join(prompt)
            kept.join(prompt)
        if number == 25:
            for cache in (*plain.batch, *kept.batch):
                cache.filter([0, 2])
        num_rows = len(plain.batch[0].sequences)
        tokens = mx.array(rng.integers(0, small_models.VOCAB, (num_rows, 1)))
        expected = plain.model(tokens, cache=plain.batch)
        logits = graphs.forward(tokens, kept.batch)
        assert np.array_equal(np.array(logits), np.array(expected)), number
        assert kept.batch[0].lengths == plain.batch[0].lengths
    assert graphs.num_run > 20
    assert same(plain.contents(), kept.contents())
    kept.pool.check_integrity()


def test_a_step_that_fails_has_not_happened(
    twice: tuple[Conversations, Conversations], rng: np.random.Generator
) -> None:
    """Whether the graph's function or the model fails: the next step is what it would have been."""
    plain, kept = twice
    fails: list[int] = []

    def model(tokens: mx.array, cache: Any) -> Any:
        logits = kept.model(tokens, cache=cache)
        if fails and fails.pop():
            raise ArithmeticError("planted")
        return logits

    def failing_first(tokens: mx.array, cache: Any) -> Any:
        if fails and fails.pop() == 2:
            raise ArithmeticError("planted")
        return model(tokens, cache)

    for failing in (model, failing_first):
        graphs = KeptGraphs(failing, as_it_is)
        for number in range(STEPS_BEFORE + 4):
            tokens = mx.array(rng.integers(0, small_models.VOCAB, (len(LENGTHS), 1)))
            if number > STEPS_BEFORE + 1 or (failing is failing_first and number == 0):
                before = kept.contents()
                fails[:] = [2]
                with pytest.raises(ArithmeticError):
                    graphs.forward(tokens, kept.batch)
                assert same(kept.contents(), before)
            logits = graphs.forward(tokens, kept.batch)
            assert np.array_equal(np.array(logits), np.array(plain.model(tokens, cache=plain.batch)))
    assert same(plain.contents(), kept.contents())
