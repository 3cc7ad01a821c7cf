"""Shared fixtures of the library's tests: fresh random numbers whose seed a failure prints."""

from __future__ import annotations

import os
import secrets

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a new seed each run; TEST_SEED=N repeats one."""
    seed = int(os.environ.get("TEST_SEED") or secrets.randbits(32))
    print(f"TEST_SEED={seed}")
    return np.random.default_rng(seed)
