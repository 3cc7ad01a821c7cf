"""Shared by the engine's tests: one small random model per run."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from tests.turboserve.engine.fakes import random_model


@pytest.fixture(scope="session")
def model() -> Any:
    seed = secrets.randbits(32)
    print(f"model seed {seed}")  # shown by pytest when the first test that uses it fails
    return random_model(seed)
