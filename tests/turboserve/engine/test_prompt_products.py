"""What multiplies prompts on a CPU is chosen by trial, shown, and changes a model's answers by rounding only."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboserve.engine.test_native_linears import llama, logits_of, stored

from turboquant_kv import blas
from turboquant_kv.backends.native.backend import is_available
from turboquant_kv.backends.native.linear import DENSE_ROWS
from turboserve.cli.doctor import check_layers
from turboserve.engine import prompt_products
from turboserve.engine.native_linears import install_native_linears
from turboserve.engine.prompt_products import ProductTrial, choose_prompt_products
from turboserve.settings import Settings

pytestmark = pytest.mark.skipif(
    not is_available() or not blas.product_address(), reason="the native kernels are not built, or OpenBLAS is missing"
)


def native_model(rng: np.random.Generator) -> Any:
    model = stored(llama(rng, tie=False), "4")
    assert install_native_linears(model) is not None
    return model


def force(monkeypatch: pytest.MonkeyPatch, blas_seconds: float) -> None:
    """Have OpenBLAS take so long, the own kernel one second."""
    monkeypatch.setattr(prompt_products, "_least_seconds", lambda weights, most_s: {False: 1.0, True: blas_seconds})


def test_either_way_gives_the_same_but_for_rounding(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = native_model(rng)
    prompts = {n: rng.integers(0, 300, (1, n)) for n in (1, DENSE_ROWS - 1, DENSE_ROWS, 2 * DENSE_ROWS + 3)}
    step = rng.integers(0, 300, (DENSE_ROWS, 1))
    own = {n: logits_of(model, prompt) for n, prompt in prompts.items()}, logits_of(model, step)
    force(monkeypatch, 0.5)
    chosen = choose_prompt_products(model, "auto")
    assert all(trial.is_dense for trial in chosen.trials) and "OpenBLAS (" in str(chosen)
    assert chosen.prompt_block == DENSE_ROWS and "4-bit 300x128 by OpenBLAS" in chosen.choices
    for n, prompt in prompts.items():
        got = logits_of(model, prompt)
        assert np.linalg.norm(got - own[0][n]) <= 1e-3 * np.linalg.norm(own[0][n])
        assert np.array_equal(got, own[0][n]) == (n < DENSE_ROWS)
    assert np.array_equal(logits_of(model, step), own[1])  # of many sequences one token each
    force(monkeypatch, 0.97)  # too little to be worth it
    chosen = choose_prompt_products(model, "auto")
    assert not any(trial.is_dense for trial in chosen.trials) and (chosen.prompt_block, chosen.choices) == (1, ())
    assert all(np.array_equal(logits_of(model, prompt), own[0][n]) for n, prompt in prompts.items())


def test_each_kind_is_tried_once_and_its_figures_are_shown(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose_prompt_products(native_model(rng), "auto")
    kinds = [f"4-bit {size}" for size in ("128x128", "64x128", "192x128", "128x192", "300x128")]
    assert sorted(trial.kind for trial in chosen.trials) == sorted(kinds)
    assert all(speed > 0 for trial in chosen.trials for speed in (trial.own, trial.blas))
    assert str(ProductTrial("4-bit 128x128", 40.4, 62.6)) == "4-bit 128x128 OpenBLAS (40/63)"
    assert str(ProductTrial("4-bit 128x128", 60.4, 62.6)) == "4-bit 128x128 own kernel (60/63)"


def test_nothing_is_tried_where_it_is_not_wanted_or_cannot_be(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = native_model(rng)
    assert str(choose_prompt_products(model, "off")) == "own kernel (as set)"
    assert "no layers" in str(choose_prompt_products(llama(rng), "auto"))
    monkeypatch.setattr(blas, "product_address", lambda: 0)
    monkeypatch.setattr(blas, "status", lambda: blas.BlasStatus(False, reason="TURBOSERVE_BLAS=off"))
    assert str(choose_prompt_products(model, "auto")) == "own kernel (OpenBLAS is missing: TURBOSERVE_BLAS=off)"


def test_doctor_tries_it() -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU multiplies by itself")
    found = check_layers(Settings())
    assert found is not None and "4-bit 1024x1024" in found.detail and "GFLOP/s" in found.detail
