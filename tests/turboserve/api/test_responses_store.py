"""The store of responses: bounds for each caller, who gives way, forgetting in time."""

from __future__ import annotations

import numpy as np
import pytest
from tests.turboserve.api.scripted_answers import THINKING_USAGE

from turboserve.api.responses.replies import ResponseHead, ResponseWriter
from turboserve.api.responses.reply_models import ReasoningSettings, TextSettings
from turboserve.api.responses.store import ResponseStore, StoredResponse
from turboserve.errors import ResponseNotFoundError
from turboserve.messages import Finished, TextDelta


def stored(name: str, text: str = "x", tenant: str = "t", *, has_ended: bool = True) -> StoredResponse:
    """A response whose answer is this text."""
    head = ResponseHead(
        response_id=f"resp_{name}",
        model="m",
        instructions=None,
        max_output_tokens=None,
        metadata={},
        parallel_tool_calls=True,
        previous_response_id=None,
        prompt_cache_key=None,
        reasoning=ReasoningSettings(effort=None, summary=None),
        is_background=not has_ended,
        is_stored=True,
        temperature=1.0,
        text=TextSettings(format={"type": "text"}),
        tool_choice="auto",
        tools=[],
        top_logprobs=0,
        top_p=1.0,
    )
    writer = ResponseWriter(head)
    writer.delta(TextDelta(text))
    if has_ended:
        writer.finish(Finished("stop", THINKING_USAGE))
    return StoredResponse(tenant, writer, (), ())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def has(store: ResponseStore, name: str, tenant: str = "t") -> bool:
    try:
        return store.get(tenant, f"resp_{name}").response_id == f"resp_{name}"
    except ResponseNotFoundError:
        return False


def test_the_least_recently_used_gives_way() -> None:
    store = ResponseStore(2, 1 << 20, 0)
    store.put(stored("a"))
    store.put(stored("b"))
    store.get("t", "resp_a")
    store.put(stored("c"))
    store.put(stored("d", tenant="other"))
    assert [has(store, name) for name in "abc"] == [True, False, True] and has(store, "d", "other")


def test_one_callers_bytes_are_bounded_and_no_others_give_way(rng: np.random.Generator) -> None:
    limit = 40_000
    store = ResponseStore(10_000, limit, 0)
    store.put(stored("kept", tenant="quiet"))
    for index in range(60):
        store.put(stored(str(index), "x" * int(rng.integers(0, 5000))))
        assert 0 < store.num_bytes("t") <= limit and has(store, str(index))
    assert not has(store, "0") and has(store, "kept", "quiet")
    store.put(stored("huge", "x" * limit))
    assert not has(store, "huge") and store.num_bytes("t") == 0


def test_running_responses_stay_and_are_counted_when_they_end() -> None:
    store = ResponseStore(1, 1 << 20, 10, clock=(clock := Clock()))
    running = stored("a", "x" * 1000, has_ended=False)
    store.put(running)
    before = store.num_bytes("t")
    store.put(stored("b"))
    clock.now = 20
    assert has(store, "a") and not has(store, "b")
    running.writer.finish(Finished("stop", THINKING_USAGE))
    store.put(running)
    assert running.num_bytes > before + 1000 and not has(store, "a")  # its time had come while it ran


def test_responses_are_forgotten_in_time() -> None:
    store = ResponseStore(10, 1 << 20, 10, clock=(clock := Clock()))
    store.put(stored("a"))
    clock.now = 5
    store.put(stored("b"))
    clock.now = 9.9
    assert has(store, "a")
    clock.now = 10.1
    assert not has(store, "a") and has(store, "b")  # its use does not prolong it
    for_ever = ResponseStore(10, 1 << 20, 0, clock=clock)
    for_ever.put(stored("a"))
    clock.now = 1e12
    assert has(for_ever, "a")


def test_nothing_is_kept_where_nothing_may() -> None:
    store = ResponseStore(0, 1 << 20, 0)
    store.put(stored("a"))
    assert not has(store, "a")


def test_another_callers_response_is_not_found() -> None:
    store = ResponseStore(10, 1 << 20, 0)
    store.put(stored("a"))
    for action in (store.get, store.delete):
        with pytest.raises(ResponseNotFoundError):
            action("other", "resp_a")
    store.delete("t", "resp_a")
    assert not has(store, "a")
