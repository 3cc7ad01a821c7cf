"""Whether decode steps keep their graphs is decided by what they compute and by the clock."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboquant_kv.summing_kernels import LAYERS, Rows

from turboserve.engine.graph_choice import GraphChoice, refused_graphs, try_graphs

NUM_ROWS = 2


@pytest.fixture
def model(rng: np.random.Generator) -> Any:
    return small_models.dense(int(rng.integers(1 << 30)), LAYERS)


def tried(model: Any, wanted: str = "auto") -> GraphChoice:
    """The choice, for a batch that is as long afterwards as it was before."""
    rows = Rows(model, NUM_ROWS)
    before = rows.batch[0].lengths
    choice = try_graphs(model, rows.batch, NUM_ROWS, wanted)
    assert all(cache.lengths == before for cache in rows.batch)
    rows.pool.check_integrity()
    return choice


def test_graphs_are_kept_where_they_are_faster(model: Any) -> None:
    """The model's own Python takes 20 ms a step here, which a kept graph does not run."""

    def slow(tokens: mx.array, cache: Any) -> Any:
        time.sleep(0.02)
        return model(tokens, cache=cache)

    choice = tried(slow)
    assert choice.graphs is not None and "instead of" in choice.reason


def test_what_computes_something_else_is_refused(model: Any) -> None:
    """A model that reads more than its arrays: what is traced once is wrong in the next step."""
    calls = 0

    def counting(tokens: mx.array, cache: Any) -> Any:
        nonlocal calls
        calls += 1
        return model(tokens, cache=cache) * calls

    choice = tried(counting, "on")
    assert choice.graphs is None and "logits differ" in choice.reason


def test_what_cannot_be_traced_raises(model: Any) -> None:
    def reading(tokens: mx.array, cache: Any) -> Any:
        logits = model(tokens, cache=cache)
        return logits * (1 + 0 * logits.sum().item())

    with pytest.raises(ValueError, match=r"eval"):
        tried(reading)


def test_no_trial_where_none_is_wanted() -> None:
    assert str(refused_graphs("off", on_cpu=False)) == "built anew in every step (as set)"
    assert refused_graphs("auto", on_cpu=True) is not None
    assert refused_graphs("auto", on_cpu=False) is None
    assert refused_graphs("on", on_cpu=True) is None


def test_caches_of_other_kinds_are_left_alone(model: Any) -> None:
    choice = try_graphs(model, model.make_cache() if hasattr(model, "make_cache") else [object()], 1, "on")
    assert choice.graphs is None and "compressed" in choice.reason
