"""Shared fixtures: printed seeds, a small random model, an in-memory event sink."""

from __future__ import annotations

import secrets

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown by pytest when the test fails
    return np.random.default_rng(seed)
