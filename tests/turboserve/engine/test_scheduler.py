"""Pure scheduling decisions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from turboserve.engine.scheduler import (
    MAX_RETRY_AFTER_S,
    MAX_SKIPPED_STEPS,
    PrefillView,
    can_queue,
    chunk_len,
    pick_prefill,
    retry_after_s,
)


def test_the_shortest_prompt_goes_first_unless_someone_starves() -> None:
    views = [PrefillView(900, 3), PrefillView(20, 0), PrefillView(40, 1)]
    assert pick_prefill(views) == 1
    views[0] = PrefillView(900, MAX_SKIPPED_STEPS)
    assert pick_prefill(views) == 0
    assert pick_prefill([]) is None


@given(st.integers(1, 5000), st.integers(16, 512))
def test_chunks_cover_the_prompt_in_the_fewest_even_steps(num_tokens: int, max_chunk: int) -> None:
    left, lens = num_tokens, []
    while left:
        lens.append(chunk_len(left, max_chunk))
        left -= lens[-1]
    assert len(lens) == -(-num_tokens // max_chunk)
    assert max(lens) <= max_chunk and max(lens) - min(lens) <= 1


def test_a_queue_of_zero_still_fills_free_slots() -> None:
    assert can_queue(0, 0, max_queued=0, max_running=1)
    assert not can_queue(1, 0, max_queued=0, max_running=1)
    assert not can_queue(0, 1, max_queued=0, max_running=1)
    assert can_queue(3, 8, max_queued=4, max_running=8)
    assert not can_queue(4, 8, max_queued=4, max_running=8)


def test_retry_advice_grows_with_the_queue_and_is_bounded() -> None:
    advice = [retry_after_s(n, 4) for n in (0, 10, 100, 10**6)]
    assert advice == sorted(advice) and advice[0] >= 1 and advice[-1] == MAX_RETRY_AFTER_S
