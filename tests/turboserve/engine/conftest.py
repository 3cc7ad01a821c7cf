"""Shared by the engine's tests: one small random model per run."""

from __future__ import annotations

import os
import secrets
from typing import Any

import pytest
from tests.turboserve.engine.fakes import random_model

MODEL_SEED = int(os.environ.get("MODEL_SEED") or secrets.randbits(31))


@pytest.fixture(scope="session")
def shared_model() -> Any:
    return random_model(MODEL_SEED)


@pytest.fixture
def model(shared_model: Any) -> Any:
    """pytest shows the printed line when the test fails, and MODEL_SEED beside TEST_SEED repeats it."""
    print(f"MODEL_SEED={MODEL_SEED}")
    return shared_model
