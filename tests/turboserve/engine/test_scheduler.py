"""Pure scheduling decisions."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from turboserve.engine import scheduler
from turboserve.engine.scheduler import (
    ASK_AGAIN_S,
    MAX_PADDING,
    MAX_RETRY_AFTER_S,
    MAX_ROOM_WAIT_S,
    MAX_SKIPPED_STEPS,
    MIN_PREFILL_TOKENS,
    Admission,
    HeadView,
    Piece,
    PrefillSpeed,
    PrefillView,
    RowView,
    WithoutGrowth,
    can_queue,
    chunk_len,
    concerned,
    growing,
    most_prefill_tokens,
    next_admission,
    plan_prefill,
    prefill_budget,
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


def test_a_step_prepares_one_prompt_in_any_case_and_more_while_there_is_time() -> None:
    assert scheduler.has_time_to_prepare(0, 0.0) and scheduler.has_time_to_prepare(30, 0.01)
    assert not scheduler.has_time_to_prepare(1, scheduler.MAX_PREPARE_S)


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


def planned(views: list[PrefillView], budget: int, *, may_group: bool = True) -> list[tuple[int, int]]:
    return [(piece.place, piece.num_tokens) for piece in plan_prefill(views, budget, may_group=may_group)]


def test_the_shortest_prompt_goes_first_unless_someone_starves() -> None:
    views = [PrefillView(900, 3), PrefillView(20, 0), PrefillView(40, 1)]
    assert planned(views, 256) == [(1, 20)]
    views[0] = PrefillView(900, MAX_SKIPPED_STEPS)
    assert planned(views, 256) == [(0, 225)]
    assert planned([], 256) == []


def test_prompts_of_like_lengths_are_read_together_as_far_as_the_budget_reaches() -> None:
    views = [PrefillView(n, 0) for n in (300, 900, 310, 320, 305)]
    assert planned(views, 1000) == [(0, 300), (4, 305), (2, 310)]
    assert planned(views, 1000, may_group=False) == [(0, 300)]
    assert planned(views, 310) == [(0, 300)]
    assert planned([PrefillView(100, 0), PrefillView(167, 0)], 1000) == [(0, 100)], "a quarter of it would be padding"
    assert planned([PrefillView(100, 0), PrefillView(166, 0)], 1000) == [(0, 100), (1, 166)]


def test_who_waits_for_what_another_computes_is_not_read_beside_it() -> None:
    views = [PrefillView(300, 0, "a"), PrefillView(301, 0, "a"), PrefillView(302, 0, "b"), PrefillView(303, 0)]
    assert planned(views, 2048) == [(0, 300), (2, 302), (3, 303)]
    assert concerned(views, plan_prefill(views, 2048, may_group=True)) == [0, 1, 2, 3]
    assert concerned(views, [Piece(2, 302)]) == [2] and concerned(views, [Piece(3, 303)]) == [3]


def test_prompts_with_nothing_left_to_read_take_no_turn() -> None:
    assert planned([PrefillView(0, 0), PrefillView(50, 0), PrefillView(0, 0)], 256) == [(0, 0), (2, 0), (1, 50)]


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 12), st.sampled_from([None, "a", "b"])), max_size=12),
    st.integers(16, 4096),
    st.booleans(),
)
def test_a_pass_is_within_the_budget_and_its_padding_bounded(
    candidates: list[tuple[int, int, str | None]], budget: int, may_group: bool
) -> None:
    views = [PrefillView(*candidate) for candidate in candidates]
    pieces = plan_prefill(views, budget, may_group=may_group)
    lens = [piece.num_tokens for piece in pieces if piece.num_tokens]
    assert len({piece.place for piece in pieces}) == len(pieces)
    assert bool(lens) == any(view.num_remaining for view in views)
    if lens:
        assert len(lens) * max(lens) <= min(budget, MAX_PADDING * sum(lens)) and (may_group or len(lens) == 1)
    shared = [views[piece.place].beginning for piece in pieces if piece.num_tokens]
    assert len([b for b in shared if b]) == len({b for b in shared if b})


def test_running_streams_bound_a_steps_tokens_by_what_these_cost() -> None:
    def budget(
        most: int = 2048, streams_run: bool = True, speed: float | None = 1000.0, max_wait_s: float = 0.5
    ) -> int:
        return prefill_budget(most, streams_run=streams_run, tokens_per_s=speed, max_wait_s=max_wait_s)

    assert budget() == 500 and budget(most=256) == 256
    assert budget(streams_run=False) == budget(max_wait_s=0.0) == budget(speed=None) == 2048
    assert budget(speed=1.0) == MIN_PREFILL_TOKENS and budget(most=16, speed=1.0) == 16


def test_the_speed_of_reading_is_learnt_from_the_latest_chunks() -> None:
    speed = PrefillSpeed()
    assert speed.tokens_per_s is None
    speed.learn(100, 10.0)  # the first one compiles kernels
    assert speed.tokens_per_s == 10.0
    for _ in range(20):
        speed.learn(200, 0.1)
    assert speed.tokens_per_s is not None and 1900 < speed.tokens_per_s < 2000
    large, small, cpu = (most_prefill_tokens(0, on_cpu=c, gpu_bytes=n << 30) for c, n in ((0, 80), (0, 24), (1, 80)))
    assert large > small == most_prefill_tokens(0, on_cpu=False) > cpu
    assert most_prefill_tokens(77, on_cpu=False, gpu_bytes=80 << 30) == 77
    assert most_prefill_tokens(77, on_cpu=True) == 77


@given(st.integers(1, 5000), st.integers(16, 512), st.sampled_from([1, 64]), st.sampled_from([0, 8]))
def test_chunks_cover_the_prompt_in_the_fewest_even_steps(
    num_tokens: int, max_chunk: int, block: int, least: int
) -> None:
    left, lens = num_tokens, []
    while left:
        lens.append(chunk_len(left, max_chunk, block, least))
        left -= lens[-1]
    most = max(max_chunk // block * block, block)
    assert len(lens) in {-(-num_tokens // most), -(-max(num_tokens - least, 1) // most)} and max(lens) <= most + least
    assert all(n % block == 0 for n in lens[:-1])
    assert max(lens) - min(lens[:-1] or lens) <= block + least
    assert lens[-1] > least or len(lens) == 1


def test_prompts_that_are_read_together_have_as_many_whole_blocks_each() -> None:
    views = [PrefillView(n, 0) for n in (130, 127, 126, 150, 60)]
    assert [piece.place for piece in plan_prefill(views[:4], 1000, may_group=True)] == [2, 1, 0, 3]
    assert [piece.place for piece in plan_prefill(views[:4], 1000, may_group=True, block=64)] == [2, 1]
    assert plan_prefill(views[3:4], 100, may_group=True, block=64) == [Piece(0, 64)]
    short = [PrefillView(n, 0) for n in (8, 9, 7)]
    assert [piece.place for piece in plan_prefill(short, 100, may_group=True)] == [2, 0, 1]
    assert [piece.place for piece in plan_prefill(short, 100, may_group=True, least=8)] == [2, 0]


def test_a_queue_of_zero_still_fills_free_slots() -> None:
    assert can_queue(0, 0, max_queued=0, max_running=1)
    assert not can_queue(1, 0, max_queued=0, max_running=1)
    assert not can_queue(0, 1, max_queued=0, max_running=1)
    assert can_queue(3, 8, max_queued=4, max_running=8)
    assert not can_queue(4, 8, max_queued=4, max_running=8)


def test_retry_advice_grows_with_the_queue_and_is_bounded() -> None:
    advice = [retry_after_s(n, 4) for n in (0, 10, 100, 10**6)]
    assert advice == sorted(advice) and advice[0] >= 1 and advice[-1] == MAX_RETRY_AFTER_S
