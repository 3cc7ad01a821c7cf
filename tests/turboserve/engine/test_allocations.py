"""Pages for which there is no memory: who needs them gets a 503 or computes again, and the others' answers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.turboserve.engine.fakes import Sink, add, make_loop, make_parts, request, run, text_of
from tests.turboserve.engine.ties import RECOMPUTED_TIE, assert_same_answer

from turboquant_kv.cache.pages import PagePool
from turboquant_kv.codec.format import KVFormat
from turboserve.engine.step_loop import StepLoop
from turboserve.errors import OverloadedError
from turboserve.messages import Finished, Request

FMT = KVFormat(k_bits=4, v_bits=4, page_tokens=16, sink_tokens=16, centred=False)
LENGTHS = (5, 90, 40, 33)
NUM_TOKENS = 60


def refuse(monkeypatch: pytest.MonkeyPatch, is_refused: Callable[[int], bool]) -> list[int]:
    """Stores cannot grow to so many pages; which sizes were refused."""
    refused: list[int] = []
    grow = PagePool._grow

    def refusing(pool: PagePool, num_pages: int) -> None:
        if any(num_pages > store.num_pages for store in pool.stores) and is_refused(num_pages):
            refused.append(num_pages)
            raise MemoryError("injected")
        grow(pool, num_pages)

    monkeypatch.setattr(PagePool, "_grow", refusing)
    return refused


def requests(rng: np.random.Generator) -> list[Request]:
    prompts = [text_of([int(t) for t in rng.integers(0, 256, n)]) for n in LENGTHS]
    return [request(f"r{i}", p, max_tokens=NUM_TOKENS, tenant=str(i)) for i, p in enumerate(prompts)]


def with_idle_caches(model: Any, rng: np.random.Generator) -> StepLoop:
    loop = make_loop(make_parts(model, fmt=FMT))
    for i in range(3):
        run(loop, request(f"old{i}", text_of([int(t) for t in rng.integers(0, 256, 60)]), tenant=f"old{i}"))
    assert len(list(loop._parts.memory.idle)) == 3
    return loop


def finish(loop: StepLoop) -> None:
    while loop.has_work:
        loop.step()
        assert loop._parts.memory.committed_bytes <= loop._parts.memory.budget_bytes
    assert not loop._parts.memory.leases
    loop.check_integrity()


def assert_answered_or_refused(loop: StepLoop, asked: list[Request], sinks: list[Sink], expected: list[Sink]) -> int:
    """How many were refused; they may be tried again."""
    num_refused = 0
    for one, sink, want in zip(asked, sinks, expected, strict=True):
        if isinstance(sink.events[-1], Finished):
            prompt = str(one.messages[0]["content"])
            assert_same_answer(loop._parts, prompt, sink.tokens, want.tokens, RECOMPUTED_TIE)
        else:
            assert isinstance(sink.error, OverloadedError) and sink.error.retry_after_s
            num_refused += 1
    return num_refused


@pytest.mark.parametrize("which", range(4))
def test_one_allocation_that_fails_costs_at_most_whom_it_was_for(
    model: Any, rng: np.random.Generator, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(rng)
    expected = [run(make_loop(make_parts(model, fmt=FMT)), one)[0] for one in asked]
    loop = with_idle_caches(model, rng)
    sizes: list[int] = []
    refused = refuse(monkeypatch, lambda num_pages: sizes.append(num_pages) or len(sizes) == which + 1)  # type: ignore[func-returns-value]
    sinks = add(loop, *asked)
    while loop.has_work and not refused:
        loop.step()
    if refused:
        assert len(list(loop._parts.memory.idle)) < 3, "idle caches were given up"
    finish(loop)
    assert refused, "nothing was refused"
    assert assert_answered_or_refused(loop, asked, sinks, expected) <= 1
    again = run(loop, asked[1])[0]
    assert_same_answer(loop._parts, str(asked[1].messages[0]["content"]), again.tokens, expected[1].tokens)


@pytest.mark.parametrize("most_pages", [0, 8, 14])
def test_a_system_without_more_memory_serves_what_fits_and_recovers(
    model: Any, rng: np.random.Generator, most_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(rng)
    expected = [run(make_loop(make_parts(model, fmt=FMT)), one)[0] for one in asked]
    loop = make_loop(make_parts(model, fmt=FMT))
    with monkeypatch.context() as patch:
        refused = refuse(patch, lambda num_pages: num_pages > most_pages)
        sinks = add(loop, *asked)
        finish(loop)
    assert refused
    assert 1 <= assert_answered_or_refused(loop, asked, sinks, expected) <= (4 if most_pages == 0 else 3)
    for one, want in zip(asked, expected, strict=True):
        assert_same_answer(loop._parts, str(one.messages[0]["content"]), run(loop, one)[0].tokens, want.tokens)
    loop.check_integrity()
