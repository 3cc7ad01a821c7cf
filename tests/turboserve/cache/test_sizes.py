"""What fits, and how much of one sequence another shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.turboserve.cache.fakes import PAGE, FakeFamily

from turboserve.cache.sizes import largest_fitting, shared_pages


@given(st.integers(0, 300), st.integers(0, 5000))
def test_largest_fitting(most: int, budget: int) -> None:
    found = largest_fitting(lambda n: 100 + 16 * (n // 3), budget, most)
    assert found == max([n for n in range(1, most + 1) if 100 + 16 * (n // 3) <= budget], default=0)


@pytest.mark.parametrize("length", [5 * PAGE + 3, 5 * PAGE, 2 * PAGE, PAGE, 0])
def test_shared_pages_are_those_that_a_fork_holds(length: int) -> None:
    family = FakeFamily()
    runtime = family.runtime("4/4")
    caches = runtime.make_cache()
    caches[0].grow(range(5 * PAGE + 3))
    fork = runtime.fork(caches, length)
    shared, held = shared_pages(runtime, family.held_pages(caches), length), family.held_pages(fork)
    assert shared is not None and held is not None and np.array_equal(shared.ids, held.ids)
