"""For every test: the fast BLAS before MLX is imported, and fresh random inputs whose seed is printed on failure."""

from __future__ import annotations

import os
import secrets

import numpy as np
import pytest

from turboquant_kv import blas

blas.interpose()  # like the server does, and for the same reason: before any test module imports MLX


@pytest.fixture
def seed() -> int:
    """New for each test; pytest shows the printed line when the test fails, and TEST_SEED repeats it."""
    value = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**31))
    print(f"TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
