"""Pure scheduling decisions."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from turboserve.engine.scheduler import (
    ASK_AGAIN_S,
    MAX_RETRY_AFTER_S,
    MAX_ROOM_WAIT_S,
    MAX_SKIPPED_STEPS,
    Admission,
    HeadView,
    PrefillView,
    RowView,
    WithoutGrowth,
    can_queue,
    chunk_len,
    growing,
    next_admission,
    pick_prefill,
    retry_after_s,
    to_preempt,
    without_growth,
)


def due(head: HeadView | None, *, num_running: int = 0, may_prepare: bool = True, generation: int = 7) -> Admission:
    return next_admission(
        head, num_running=num_running, max_running=2, may_prepare=may_prepare, memory_generation=generation
    )


def test_the_head_is_prepared_and_then_asked_for_while_there_are_slots() -> None:
    assert due(None) is Admission.NOTHING
    assert due(HeadView(is_prepared=False)) is Admission.PREPARE
    assert due(HeadView(is_prepared=False), may_prepare=False) is Admission.NOTHING
    assert due(HeadView(is_prepared=True), may_prepare=False) is Admission.ASK
    assert due(HeadView(is_prepared=True), num_running=2) is Admission.NOTHING


def test_who_was_told_to_wait_is_asked_about_again_when_the_memory_has_changed() -> None:
    waiting = HeadView(is_prepared=True, roomless_s=1.0, told_to_wait_at=7)
    assert due(waiting, generation=7) is Admission.NOTHING and due(waiting, generation=8) is Admission.ASK
    # what a running request computes and a disk that takes files again free nothing, and yet may be what is missing
    assert due(replace(waiting, since_asked_s=ASK_AGAIN_S)) is Admission.ASK
    assert due(HeadView(is_prepared=True, roomless_s=1.0, told_to_wait_at=None)) is Admission.ASK


def test_who_waits_too_long_is_given_up_unless_their_answer_has_begun() -> None:
    late = MAX_ROOM_WAIT_S + 1
    assert due(HeadView(True, roomless_s=late, told_to_wait_at=7)) is Admission.GIVE_UP
    assert due(HeadView(True, has_answer=True, roomless_s=late, told_to_wait_at=7)) is Admission.NOTHING
    assert due(HeadView(True, has_answer=True, roomless_s=late, told_to_wait_at=6)) is Admission.ASK


def test_those_that_outgrew_their_room_grow_the_oldest_first() -> None:
    rows = [RowView(order=5, num_tokens=11, reserved_tokens=10), RowView(2, 10, 10), RowView(1, 30, 20)]
    assert growing(rows) == [2, 0] and growing([]) == []


def test_who_cannot_grow_makes_way_for_older_ones_and_the_oldest_ends() -> None:
    assert without_growth(4, [4, 2, 9]) is WithoutGrowth.MAKE_WAY
    assert without_growth(2, [4, 2, 9]) is WithoutGrowth.END
    assert without_growth(2, [2]) is WithoutGrowth.END


def test_those_whom_a_verdict_names_are_preempted_in_its_order() -> None:
    assert to_preempt((9, 4), [4, 2, 9]) == [2, 0]
    assert to_preempt((9, 4), [4, 2]) == [0], "the other has ended meanwhile"


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
