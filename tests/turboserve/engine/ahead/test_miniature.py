"""A model's first layers stand for all of them, and work by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tests.turboquant_kv import odd_models, small_models

from turboserve.engine.ahead.miniature import UncuttableError, cut_layers, miniature_bytes


def kinds(model: Any) -> set[str]:
    return {repr((type(cache).__name__, getattr(cache, "max_size", None))) for cache in make_prompt_cache(model)}


@pytest.mark.parametrize(
    ("new_model", "expected"),
    [
        (lambda: small_models.dense(num_layers=6), 2),
        (small_models.sliding, 3),  # the third sees everything
        (small_models.recurrent, None),
        (odd_models.absolute, 2),
    ],
)
def test_the_first_layers_of_all_kinds_are_left_and_make_a_model(
    new_model: Callable[[], Any], expected: int | None
) -> None:
    model = new_model()
    before, all_bytes, num_layers = kinds(model), miniature_bytes(model), len(model.layers)
    left = cut_layers(model)
    assert left <= num_layers and (expected is None or left == expected)
    caches = make_prompt_cache(model)
    assert len(caches) == len(model.layers) == left
    assert kinds(model) == before
    assert (miniature_bytes(model) < all_bytes) == (left < num_layers)
    logits = model(mx.array([[1, 2, 3]]), cache=caches)
    assert logits.shape[:2] == (1, 3) and not mx.any(mx.isnan(logits)).item()


def test_a_layer_of_other_numbers_is_another_kind() -> None:
    model = small_models.dense(num_layers=5)
    odd = model.layers[3].mlp.down_proj
    odd.weight = odd.weight.astype(mx.float16)
    assert cut_layers(model) == 4


def test_what_is_no_list_of_layers_is_not_cut() -> None:
    with pytest.raises(UncuttableError, match="no list of layers"):
        cut_layers(object())
