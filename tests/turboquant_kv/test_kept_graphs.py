"""Graphs of decode steps that were traced once: what later steps hand over is what they compute with."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboquant_kv.summing_kernels import FMT, LAYERS, Rows

from turboquant_kv.backends.base import Means
from turboquant_kv.cache.kept_graphs import GRAPHS_KEPT, STEPS_BEFORE, KeptGraphs


@pytest.mark.parametrize("num_rows", [1, 3])
def test_later_steps_hand_over_their_own_arrays(num_rows: int, rng: np.random.Generator) -> None:
    model = small_models.dense(int(rng.integers(1 << 30)), LAYERS)
    plain, kept, graphs = Rows(model, num_rows), Rows(model, num_rows), KeptGraphs(model)
    for number in range(FMT.page_tokens + 8):
        tokens = mx.array(rng.integers(0, small_models.VOCAB, (num_rows, 1)))
        logits, expected = graphs.forward(tokens, kept.batch), model(tokens, cache=plain.batch)
        np.testing.assert_allclose(np.array(logits), np.array(expected), rtol=1e-4, atol=1e-5, err_msg=str(number))
    for store, other in zip(kept.pool.stores, plain.pool.stores, strict=True):
        num_launches, expected_launches = (np.array(one.pending_arrays()[0]) for one in (store, other))
        np.testing.assert_array_equal(num_launches, expected_launches)
    assert graphs.num_run >= FMT.page_tokens // 2
    assert graphs.num_built <= 6


def test_a_graph_is_of_one_pool(rng: np.random.Generator) -> None:
    """Pools of other means have the same kernels and shapes, and other constants in their graphs."""
    model = small_models.dense(int(rng.integers(1 << 30)), LAYERS)
    graphs = KeptGraphs(model)
    for _ in range(2):
        k_mean, v_mean = (rng.normal(size=(2, 64)).astype(np.float32) for _ in "kv")
        means = Means(k_mean, v_mean)
        plain, kept = Rows(model, 2, means=means), Rows(model, 2, means=means)
        for number in range(STEPS_BEFORE + 4):
            tokens = mx.array(rng.integers(0, small_models.VOCAB, (2, 1)))
            logits, expected = graphs.forward(tokens, kept.batch), model(tokens, cache=plain.batch)
            np.testing.assert_allclose(np.array(logits), np.array(expected), rtol=1e-4, atol=1e-5, err_msg=str(number))
    assert graphs.num_built == 2


def test_the_model_is_not_called_for_a_kept_graph(rng: np.random.Generator) -> None:
    calls = []
    model = small_models.dense(int(rng.integers(1 << 30)), LAYERS)

    def counted(tokens: mx.array, cache: Any) -> Any:
        calls.append(tokens.shape)
        return model(tokens, cache=cache)

    rows, graphs = Rows(model, 2), KeptGraphs(counted)
    for _ in range(20):
        mx.eval(graphs.forward(mx.zeros((2, 1), mx.int32), rows.batch))
    assert len(calls) <= 20 - graphs.num_run + graphs.num_built + 2  # exact rows that have grown are other arrays
    assert graphs.num_run >= 20 - 2 * (STEPS_BEFORE + 2)


def test_no_more_graphs_are_kept_than_a_few(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turboquant_kv.cache.kept_graphs.GRAPHS_KEPT", 2)
    model = small_models.dense(int(rng.integers(1 << 30)), LAYERS)
    graphs = KeptGraphs(model)
    for num_rows in (1, 2, 3, 1):
        rows = Rows(model, num_rows)
        for _ in range(STEPS_BEFORE + 3):
            mx.eval(graphs.forward(mx.zeros((num_rows, 1), mx.int32), rows.batch))
    assert len(graphs._graphs) == 2 < GRAPHS_KEPT
    assert graphs.num_built == 4


def test_other_batches_are_the_models(rng: np.random.Generator) -> None:
    """Uncompressed caches, several tokens a row, sliding windows beside others: nothing is kept, and all is right."""
    model = small_models.sliding(int(rng.integers(1 << 30)))
    caches, expected = model.make_cache(), model.make_cache()
    graphs = KeptGraphs(model)
    for num_tokens in (5, 1, 1, 1, 1, 1):
        tokens = mx.array(rng.integers(0, small_models.VOCAB, (1, num_tokens)))
        logits = graphs.forward(tokens, caches)
        np.testing.assert_array_equal(np.array(logits), np.array(model(tokens, cache=expected)))
    assert graphs.num_run == graphs.num_built == 0


@pytest.mark.parametrize("or_model", [True, False])
def test_a_graph_that_raises_is_the_models_step_or_none(or_model: bool, rng: np.random.Generator) -> None:
    """With or_model nothing shows that it was tried: not in logits, and not in the books."""
    model = small_models.dense(int(rng.integers(1 << 30)), LAYERS)
    is_failing = False

    def failing(tokens: mx.array, cache: Any) -> Any:
        logits = model(tokens, cache=cache)
        if is_failing and type(cache[0]).__name__ == "_LayerOver":
            raise ValueError("not this one")
        return logits

    plain, kept = Rows(model, 2), Rows(model, 2)
    graphs = KeptGraphs(failing, or_model=or_model)
    for number in range(FMT.page_tokens + 8):  # a page is closed by graphs that fail as well
        is_failing = number > STEPS_BEFORE + 3
        tokens = mx.array(rng.integers(0, small_models.VOCAB, (2, 1)))
        num_run = graphs.num_run
        try:
            logits = graphs.forward(tokens, kept.batch)
        except ValueError:
            assert not or_model and kept.batch[0].lengths == plain.batch[0].lengths
            return
        expected = model(tokens, cache=plain.batch)
        np.testing.assert_allclose(np.array(logits), np.array(expected), rtol=1e-4, atol=1e-5, err_msg=str(number))
        assert kept.pool.books == plain.pool.books
    assert or_model and isinstance(graphs.failure, ValueError) and graphs.num_run == num_run
    kept.pool.check_integrity()
