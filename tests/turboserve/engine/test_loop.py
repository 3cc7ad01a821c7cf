"""Whole requests through the step loop: batching, limits, reuse, cancelling, admission."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboserve.engine.fakes import (
    MAX_CONTEXT,
    Clock,
    RecordingTelemetry,
    Sink,
    add,
    make_loop,
    make_parts,
    make_settings,
    request,
    run,
    text_of,
)
from tests.turboserve.engine.ties import RECOMPUTED_TIE, assert_same_answer

from turboquant_kv.codec.format import KVFormat
from turboserve.cache.memory import Ask, Growth, Start
from turboserve.cache.sizes import peak_bytes, shared_pages
from turboserve.engine.protocol import NullTelemetry
from turboserve.engine.scheduler import MAX_VERDICT_ROUNDS
from turboserve.engine.step_loop import StepLoop
from turboserve.errors import ContextLengthError, InvalidRequestError, RequestCancelledError
from turboserve.messages import Failed, Request, SamplingParams

FORMATS = [None, KVFormat(k_bits=4, v_bits=3, page_tokens=16, sink_tokens=16, centred=False)]


@pytest.fixture(params=FORMATS, ids=lambda fmt: "f16" if fmt is None else fmt.name)
def fmt(request: pytest.FixtureRequest) -> KVFormat | None:
    value: KVFormat | None = request.param
    return value


def prompt(rng: np.random.Generator, num_tokens: int) -> str:
    return text_of([int(t) for t in rng.integers(0, 256, num_tokens)])


def mixed_requests(rng: np.random.Generator) -> list[Request]:
    """Unequal lengths, early finishers, greedy and seeded rows."""
    lengths = [1, 3, 16, 17, 40, 70, 33, 90]
    return [
        request(
            f"r{i}",
            prompt(rng, n),
            max_tokens=int(rng.integers(3, 25)),
            tenant=f"t{i}",
            sampling=SamplingParams(temperature=0.8, seed=i, top_p=0.9)
            if i % 3 == 2
            else SamplingParams(temperature=0),
        )
        for i, n in enumerate(lengths)
    ]


def test_answers_in_a_batch_are_those_given_alone(model: Any, rng: np.random.Generator, fmt: KVFormat | None) -> None:
    requests = mixed_requests(rng)
    alone = [run(make_loop(make_parts(model, fmt=fmt)), r)[0] for r in requests]
    together = run(make_loop(parts := make_parts(model, fmt=fmt)), *requests)
    for r, a, b in zip(requests, together, alone, strict=True):
        if r.sampling.temperature:
            assert a.tokens == b.tokens
        else:
            assert_same_answer(parts, str(r.messages[0]["content"]), a.tokens, b.tokens)
    assert all(len(s.tokens) == r.max_tokens for s, r in zip(together, requests, strict=True))


def test_a_late_request_joins_and_leaves_without_a_trace(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None
) -> None:
    content = prompt(rng, 20)
    first, late = request("a", content, max_tokens=30), request("b", prompt(rng, 50), max_tokens=3)
    expected = run(make_loop(make_parts(model, fmt=fmt)), first)[0].tokens
    loop = make_loop(make_parts(model, fmt=fmt))
    sinks = add(loop, first)
    for _ in range(6):
        loop.step()
    sinks += add(loop, late)
    while loop.has_work:
        loop.step()
    assert_same_answer(loop._parts, content, sinks[0].tokens, expected)
    assert len(sinks[1].tokens) == 3


def test_running_streams_get_a_token_in_every_step_of_a_long_prefill(model: Any, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(model))
    (talking,) = add(loop, request("a", prompt(rng, 4), max_tokens=40))
    loop.step()
    add(loop, request("b", prompt(rng, 160), max_tokens=1))
    for _ in range(8):
        before = len(talking.tokens)
        loop.step()
        assert len(talking.tokens) == before + 1
    assert loop.num_running == 2


def test_the_first_token_comes_with_the_last_chunk(model: Any, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(model), prefill_chunk_tokens=16, overlap="off")
    (sink,) = add(loop, request("a", prompt(rng, 32), max_tokens=5))  # 33 tokens with the role: 32 to prefill
    loop.step()
    assert sink.tokens == []
    loop.step()
    assert len(sink.tokens) == 1


def test_usage_and_finish_reason_by_length(model: Any, rng: np.random.Generator, fmt: KVFormat | None) -> None:
    (sink,) = run(make_loop(make_parts(model, fmt=fmt)), request("a", prompt(rng, 30), max_tokens=20))
    finished = sink.finished
    assert finished.reason == "length"
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (31, 20)
    assert finished.usage.kv.tokens == 31 + 20 - 1  # the last token was drawn, never fed
    assert finished.usage.kv.total > 0 and finished.usage.kv_format == ("f16" if fmt is None else "4/3")


def test_an_end_token_stops_and_is_not_shown(model: Any, rng: np.random.Generator) -> None:
    one = request("a", prompt(rng, 10), max_tokens=20)
    tokens = run(make_loop(make_parts(model)), one)[0].tokens
    (sink,) = run(make_loop(make_parts(model, eos_ids=frozenset({tokens[6]}))), one)
    assert sink.finished.reason == "stop"
    assert sink.tokens == tokens[: tokens.index(tokens[6])]


def test_a_stop_string_ends_the_answer_before_it(model: Any, rng: np.random.Generator) -> None:
    content = prompt(rng, 10)
    tokens = run(make_loop(make_parts(model)), request("a", content, max_tokens=20))[0].tokens
    stop = text_of(tokens[4:7])
    (sink,) = run(make_loop(make_parts(model)), request("a", content, max_tokens=20, stop=(stop,)))
    assert sink.finished.reason == "stop"
    assert sink.text == text_of(tokens).split(stop)[0]


def test_a_second_turn_reuses_the_first(model: Any, rng: np.random.Generator, fmt: KVFormat | None) -> None:
    parts = make_parts(model, fmt=fmt)
    loop, telemetry = make_loop(parts, recorder := RecordingTelemetry()), recorder
    content = prompt(rng, 60)
    (first,) = run(loop, request("a", content))
    longer = content + first.text + prompt(rng, 20)
    (second,) = run(loop, request("b", longer))
    (fresh,) = run(make_loop(make_parts(model, fmt=fmt)), request("c", longer))
    assert_same_answer(parts, longer, second.tokens, fresh.tokens, RECOMPUTED_TIE)
    held = 61 + 8 - 1
    cached = second.finished.usage.cached_tokens
    assert cached == held if fmt is None else 0 <= held - cached < fmt.page_tokens
    assert telemetry.calls[-2] == ("prompt", (89, cached))
    assert len(list(parts.memory.idle)) == 1  # the longer conversation took the shorter one's place
    parts.memory.check_integrity()


def test_the_same_prompt_again_still_computes_its_last_token(model: Any, rng: np.random.Generator) -> None:
    loop, content = make_loop(make_parts(model)), prompt(rng, 30)
    first, second = run(loop, request("a", content, max_tokens=1))[0], run(loop, request("b", content))[0]
    assert second.finished.usage.cached_tokens == 30
    assert second.tokens[:1] == first.tokens


def test_tenants_never_share(model: Any, rng: np.random.Generator) -> None:
    loop, content = make_loop(make_parts(model)), prompt(rng, 40)
    run(loop, request("a", content, tenant="one"))
    (other,) = run(loop, request("b", content, tenant="two"))
    (same,) = run(loop, request("c", content, tenant="one"))
    assert other.finished.usage.cached_tokens == 0
    assert same.finished.usage.cached_tokens > 0


@pytest.mark.parametrize("num_steps", [0, 1, 6], ids=["waiting", "prefill", "decode"])
def test_cancelling_frees_within_a_step(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, num_steps: int
) -> None:
    parts = make_parts(model, fmt=fmt)
    loop = make_loop(parts, telemetry := RecordingTelemetry())
    (sink,) = add(loop, request("a", prompt(rng, 40), max_tokens=50))
    for _ in range(num_steps):
        loop.step()
    loop.cancel("a")
    assert isinstance(sink.error, RequestCancelledError)
    assert not loop.has_work and not parts.memory.leases
    assert telemetry.calls[-1] == ("cancelled", {0: "queued", 1: "prefill", 6: "decode"}[num_steps])
    parts.memory.check_integrity()
    parts.memory.drop_idle()
    assert parts.runtime.allocated_bytes() == parts.runtime.slack_bytes()


def test_cancelling_one_leaves_the_others_alone(model: Any, rng: np.random.Generator, fmt: KVFormat | None) -> None:
    requests = mixed_requests(rng)
    expected = [s.tokens for s in run(make_loop(make_parts(model, fmt=fmt)), *requests)]
    loop = make_loop(make_parts(model, fmt=fmt))
    sinks = add(loop, *requests)
    for _ in range(9):
        loop.step()
    loop.cancel("r3")
    loop.cancel("unknown")
    while loop.has_work:
        loop.step()
    for i, (one, sink, tokens) in enumerate(zip(requests, sinks, expected, strict=True)):
        want = tokens[: len(sink.tokens)] if i == 3 else tokens
        if one.sampling.temperature:
            assert sink.tokens == want
        else:
            assert_same_answer(loop._parts, str(one.messages[0]["content"]), sink.tokens, want)


def refused(loop: Any, one: Request) -> Sink:
    (sink,) = run(loop, one)
    return sink


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(model: Any, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(model))
    error = refused(loop, request("a", prompt(rng, MAX_CONTEXT - 1))).error
    assert isinstance(error, ContextLengthError)
    assert str(MAX_CONTEXT) in error.message.replace(",", "") and "512" in error.message
    assert refused(loop, request("b", prompt(rng, MAX_CONTEXT - 2), max_tokens=None)).finished.reason == "length"


def test_a_request_beyond_the_budget_is_refused_with_both_numbers(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None
) -> None:
    parts = make_parts(model, fmt=fmt, budget_bytes=0)
    budget = peak_bytes(parts.runtime, 100)
    parts.memory.budget_bytes = budget
    loop = make_loop(parts)
    error = refused(loop, request("a", prompt(rng, 60), max_tokens=300)).error
    assert isinstance(error, ContextLengthError)
    assert f"{budget:,}" in error.message and f"{peak_bytes(parts.runtime, 361):,}" in error.message
    (fits,) = run(loop, request("b", prompt(rng, 60), max_tokens=None))
    assert fits.finished.usage.completion_tokens >= 39  # as far as the budget reaches
    parts.memory.check_integrity()


def test_requests_take_turns_when_memory_holds_only_one(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None
) -> None:
    parts = make_parts(model, fmt=fmt, budget_bytes=0)
    parts.memory.budget_bytes = peak_bytes(parts.runtime, 120) * 3 // 2
    loop = make_loop(parts)
    requests = [request(f"r{i}", prompt(rng, 60), max_tokens=50) for i in range(3)]
    sinks = add(loop, *requests)
    while loop.has_work:
        loop.step()
        assert loop.num_running <= 1
        assert parts.memory.committed_bytes <= parts.memory.budget_bytes
    assert [len(s.tokens) for s in sinks] == [50, 50, 50]
    assert parts.memory.events().evictions["pressure"] >= 1
    parts.memory.check_integrity()


def test_bad_requests_end_alone_and_in_words(model: Any, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(model), telemetry := RecordingTelemetry())
    bad = request("bad", "x", sampling=SamplingParams(logit_bias=((300, 1.0),)))
    sinks = run(loop, bad, request("good", prompt(rng, 5)))
    assert isinstance(sinks[0].error, InvalidRequestError) and sinks[0].error.param == "logit_bias"
    assert sinks[1].finished.reason == "length"
    assert ("refused", "invalid_request") in telemetry.calls


def test_no_more_run_than_allowed(model: Any, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(model), max_running=2)
    add(loop, *(request(f"r{i}", prompt(rng, 3), max_tokens=4) for i in range(5)))
    while loop.has_work:
        loop.step()
        assert loop.num_running <= 2


def test_snapshot_counts_what_the_runtime_holds(model: Any, rng: np.random.Generator, fmt: KVFormat | None) -> None:
    parts = make_parts(model, fmt=fmt)
    loop = make_loop(parts)
    run(loop, request("old", prompt(rng, 50), tenant="x"))
    add(loop, request("a", prompt(rng, 40), max_tokens=30), request("b", prompt(rng, 90), max_tokens=30))
    for _ in range(5):
        loop.step()
    stats = loop.snapshot()
    assert sorted(c.tier for c in stats.conversations) == ["memory", "running", "running"]
    assert stats.num_running == 2 and stats.kv.tokens == sum(c.kv.tokens for c in stats.conversations)
    if fmt is not None:
        assert stats.kv.total == parts.runtime.allocated_bytes()
    while loop.has_work:
        loop.step()
    assert all(c.tier == "memory" for c in loop.snapshot().conversations)


def test_reservations_cover_every_length_on_the_way(model: Any, fmt: KVFormat | None) -> None:
    runtime = make_parts(model, fmt=fmt).runtime
    lengths = range(300)
    for num_tokens in lengths:
        assert peak_bytes(runtime, num_tokens) == max(runtime.bytes_for(n) for n in lengths[: num_tokens + 1])


def test_a_verdict_that_never_holds_costs_a_bounded_number_of_questions_a_step(
    model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(model)
    loop = make_loop(parts)
    asked: list[object] = []
    verdict = parts.memory.verdict

    def counted(question: Any, now_s: float) -> Any:
        asked.append(question)
        return verdict(question, now_s)

    monkeypatch.setattr(parts.memory, "verdict", counted)
    with monkeypatch.context() as never:
        never.setattr(parts.memory, "carry_out", lambda start, now_s: None)
        (sink,) = add(loop, request("a", prompt(rng, 20), max_tokens=3))
        for num_steps in range(1, 4):
            loop.step()
            assert len(asked) == num_steps * MAX_VERDICT_ROUNDS and loop.num_waiting == 1
    while loop.has_work:
        loop.step()
    assert len(sink.tokens) == 3, "it was asked about again in the next step"


def test_a_request_that_waits_is_asked_about_again_only_when_something_was_freed(
    model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(model)
    parts.memory.budget_bytes = peak_bytes(parts.runtime, 120)
    loop = make_loop(parts)
    sinks = add(loop, request("a", prompt(rng, 60), max_tokens=50), request("b", prompt(rng, 60), max_tokens=50))
    asked: list[str] = []
    verdict = parts.memory.verdict

    def noted(question: Any, now_s: float) -> Any:
        if isinstance(question, Ask):
            asked.append(question.request.request_id)
        return verdict(question, now_s)

    monkeypatch.setattr(parts.memory, "verdict", noted)
    while loop.has_work:
        loop.step()
    assert asked == ["a", "b", "b"] and [len(s.tokens) for s in sinks] == [50, 50]


def test_pages_that_a_fork_will_hold_are_foretold(model: Any, rng: np.random.Generator) -> None:
    """Plans count on it: these are not freed by giving up the conversation that a request begins with."""
    parts = make_parts(model, fmt=FORMATS[1])
    (sink,) = run(make_loop(parts), request("a", prompt(rng, 90), max_tokens=4))
    (held,) = parts.memory.idle
    family, runtime = parts.memory.family, parts.runtime
    assert held.caches is not None and sink.finished
    pages = family.held_pages(held.caches)
    assert pages is not None and len(pages.ids) == 4
    for length in range(len(held.tokens) + 1):
        usable = runtime.usable_prefix(held.caches, length)
        fork = runtime.fork(held.caches, usable)
        foretold, real = shared_pages(runtime, pages, usable), family.held_pages(fork)
        assert foretold is not None and foretold.ids.tolist() == (real.ids.tolist() if real is not None else [])
        runtime.release(fork)


@pytest.mark.parametrize("way", ["finish", "cancel"])
@pytest.mark.parametrize("is_closed", [False, True], ids=["before its lease ends", "afterwards"])
def test_a_cache_that_cannot_be_kept_costs_nobody_their_last_event(
    model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, way: str, is_closed: bool
) -> None:
    parts = make_parts(model)
    loop, keep = make_loop(parts), parts.memory.keep

    def failing(*args: Any, **options: Any) -> Any:
        if is_closed:
            keep(*args, **options)
        raise RuntimeError("injected")

    with monkeypatch.context() as patched:
        patched.setattr(parts.memory, "keep", failing)
        (sink,) = add(loop, request("a", prompt(rng, 20), max_tokens=3))
        if way == "cancel":
            loop.step()
            loop.cancel("a")
            assert isinstance(sink.error, RequestCancelledError)
        while loop.has_work:
            loop.step()
    assert sink.ended.is_set() and not parts.memory.leases
    assert way == "cancel" or len(sink.tokens) == 3
    loop.check_integrity()
    assert len(run(loop, request("b", prompt(rng, 20), max_tokens=3))[0].tokens) == 3


def test_a_request_that_cannot_give_its_memory_back_still_hears_of_its_failure(
    model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(model)
    loop = make_loop(parts)
    (sink,) = add(loop, request("a", prompt(rng, 20), max_tokens=3))
    loop.step()

    def failing(*args: Any) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(parts.memory, "drop", failing)
    loop.fail_all(InvalidRequestError("why"))
    assert str(sink.error) == "why" and not loop.has_work


def test_growth_that_fails_ends_that_answer_alone(
    model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboserve.engine.prepare.OPEN_ANSWER_BLOCK", 4)
    parts = make_parts(model)
    loop, carry_out = make_loop(parts), parts.memory.carry_out

    def failing(start: Start, now_s: float) -> Any:
        if isinstance(start.question, Growth):
            raise RuntimeError("injected")
        return carry_out(start, now_s)

    monkeypatch.setattr(parts.memory, "carry_out", failing)
    open_ended = request("a", prompt(rng, 20), max_tokens=None, stop=("never",))
    growing, bounded = run(loop, open_ended, request("b", prompt(rng, 20), max_tokens=30))
    assert isinstance(growing.events[-1], Failed) and len(bounded.tokens) == 30
    loop.check_integrity()


def test_scratch_memory_is_given_back_at_rest(model: Any) -> None:
    """MLX keeps freed arrays for the next ones; a server that has nothing to do leaves them to the machine."""
    clock = Clock()
    loop = StepLoop(make_parts(model, fmt=None), make_settings(), NullTelemetry(), clock)
    run(loop, request("a", text_of([1, 2, 3]), max_tokens=3))
    scratch = mx.zeros(1 << 22)
    mx.eval(scratch)
    del scratch
    loop.tick()
    assert mx.get_cache_memory() >= 4 << 22, "the next request may come at once"
    clock.now_s += 60
    loop.tick()
    assert mx.get_cache_memory() == 0


def test_what_was_found_in_caches_is_counted_once_and_everywhere_alike(model: Any, rng: np.random.Generator) -> None:
    """Also of prompts that waited for each other's tokens: the later one begins anew from a longer start."""
    telemetry = RecordingTelemetry()
    loop = make_loop(make_parts(model, fmt=FORMATS[1]), telemetry, max_running=4)
    shared = prompt(rng, 120)
    run(loop, *(request(f"r{i}", shared + prompt(rng, 5), max_tokens=3, tenant="me") for i in range(3)))
    told: list[Any] = [figures for name, figures in telemetry.calls if name == "prompt"]
    stats = loop.snapshot()
    assert (sum(n for n, _ in told), sum(n for _, n in told)) == (
        stats.events.prefix_query_tokens,
        stats.events.prefix_hit_tokens,
    )
    assert any(num_tokens == 0 and num_found > 0 for num_tokens, num_found in told), "none began anew"
