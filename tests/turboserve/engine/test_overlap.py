"""Steps that are enqueued before the last one's tokens are read: the same tokens, caches and books as without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboserve.engine.fakes import GREEDY, Sink, add, make_loop, make_parts, passes_of, request, run, text_of

from turboquant_kv.codec.format import KVFormat
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.overlap import choose_overlap
from turboserve.engine.step_loop import StepLoop
from turboserve.messages import ForkSession, Request, SamplingParams

PAGE, SINK = 16, 16
FORMATS = [None, KVFormat(k_bits=4, v_bits=3, page_tokens=PAGE, sink_tokens=SINK, centred=False)]


@pytest.fixture(params=FORMATS, ids=lambda fmt: "f16" if fmt is None else fmt.name)
def fmt(request: pytest.FixtureRequest) -> KVFormat | None:
    value: KVFormat | None = request.param
    return value


def prompt(rng: np.random.Generator, num_tokens: int) -> str:
    return text_of([int(t) for t in rng.integers(0, 256, num_tokens)])


def finish(loop: StepLoop) -> None:
    while loop.has_work:
        loop.step()
    loop.check_integrity()


SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=1.0, seed=2, top_p=0.9, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4),
    SamplingParams(temperature=0.8, seed=3, top_k=12, repetition_penalty=1.2),
    SamplingParams(temperature=1.0, seed=4, min_p=0.02, logit_bias=((7, 2.0), (9, -3.0))),
]


def in_turn(loop: StepLoop, requests: list[Request]) -> list[Sink]:
    """One more request every third step, so that rows join and leave at different steps."""
    sinks = []
    for one in requests:
        sinks += add(loop, one)
        for _ in range(3):
            loop.step()
    finish(loop)
    return sinks


def test_tokens_are_the_same_with_and_without_alone_and_in_any_batch(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None
) -> None:
    requests = [
        request(
            f"r{i}",
            prompt(rng, int(rng.integers(1, 60))),
            max_tokens=int(rng.integers(1, 25)),
            tenant=str(i),
            sampling=SAMPLINGS[i % len(SAMPLINGS)],
        )
        for i in range(12)
    ]
    # Some end by a token or a text that is met on the way, with the next step under way already.
    parts = make_parts(model, fmt=fmt)
    free = in_turn(make_loop(parts, overlap="off"), requests)
    eos_ids = frozenset(s.tokens[len(s.tokens) // 2] for s in free[::4])
    requests = [
        replace(one, stop=(text_of(s.tokens[-3:-1]),)) if i % 4 == 1 and len(s.tokens) > 3 else one
        for i, (one, s) in enumerate(zip(requests, free, strict=True))
    ]

    def loop(overlap: str) -> StepLoop:
        return make_loop(make_parts(model, fmt=fmt, eos_ids=eos_ids), overlap=overlap)

    without, ahead = in_turn(loop("off"), requests), in_turn(loop("on"), requests)
    alone = [run(loop("on"), one)[0] for one in requests]
    assert {s.finished.reason for s in without} == {"stop", "length"}
    differing = 0
    for sinks in zip(without, ahead, alone, strict=True):
        usages = [(s.finished.reason, s.finished.usage.completion_tokens, s.finished.usage.kv.tokens) for s in sinks]
        if all(s.tokens == sinks[0].tokens for s in sinks):
            assert usages == usages[:1] * 3
        else:
            differing += 1
    # other batch mates are another order of summing, which may decide one draw among hundreds (ties.py)
    assert differing <= 1


def ended_by_its_third_token(model: Any, content: str, fmt: KVFormat | None, overlap: str) -> tuple[EngineParts, Sink]:
    free = run(make_loop(make_parts(model, fmt=fmt), overlap="off"), request("a", content, max_tokens=9))[0].tokens
    parts = make_parts(model, fmt=fmt, eos_ids=frozenset({free[2]}))
    (sink,) = run(make_loop(parts, overlap=overlap), request("a", content, max_tokens=9))
    return parts, sink


def contents(parts: EngineParts, caches: list[Any]) -> list[Any]:
    header, arrays = parts.memory.family.export_caches(caches)
    return [header, *(np.asarray(a).tobytes() for a in arrays)]


# held tokens: the prompt's, one for the role, and up to two of the answer
@pytest.mark.parametrize("num_prompt", range(SINK - 4, SINK + 2 * PAGE + 3))
def test_what_an_ended_answer_leaves_is_as_if_nothing_had_run_ahead(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, num_prompt: int
) -> None:
    """Bit for bit, and so is what comes of it: a page that was closed ahead is the one that the next token closes."""
    content = prompt(rng, num_prompt)
    left = []
    for overlap in ("off", "on"):
        parts, sink = ended_by_its_third_token(model, content, fmt, overlap)
        assert sink.finished.reason == "stop"
        (held,) = parts.memory.idle
        assert held.caches is not None
        assert sink.finished.usage.kv.tokens == len(held.tokens) == parts.runtime.measure(held.caches).tokens
        num_held = len(held.tokens)
        is_full = fmt is not None and num_held > SINK and (num_held - SINK) % PAGE == 0
        before = None if is_full else contents(parts, held.caches)
        assert parts.runtime.usable_prefix(held.caches, num_held) == num_held
        next_tokens = add_tokens(parts, held.caches, [5, 6])
        left.append((held.tokens.tolist(), before, next_tokens, contents(parts, held.caches)))
    assert left[0] == left[1]


def add_tokens(parts: EngineParts, caches: list[Any], tokens: list[int]) -> list[float]:
    import mlx.core as mx

    logits = [parts.loaded.model(mx.array([[token]]), cache=caches)[0, -1] for token in tokens]
    return [value for one in logits for value in np.array(one).tolist()]


def counting(loop: StepLoop, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    model, shapes = passes_of(loop).model, []

    def counted(tokens: Any, cache: Any) -> Any:
        shapes.append(tuple(tokens.shape))
        return model(tokens, cache=cache)

    monkeypatch.setattr(passes_of(loop), "model", counted)
    return shapes


def test_an_answer_that_is_known_to_end_is_not_run_ahead(
    model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, fmt: KVFormat | None
) -> None:
    loop = make_loop(make_parts(model, fmt=fmt), overlap="on")
    shapes = counting(loop, monkeypatch)
    run(loop, request("a", prompt(rng, 10), max_tokens=7, tenant="a"))
    assert shapes == [(1, 10)] + 7 * [(1, 1)]
    shapes.clear()
    sinks = run(
        loop,
        request("b", prompt(rng, 12), max_tokens=3, tenant="b"),
        request("c", prompt(rng, 13), max_tokens=6, tenant="c"),
    )
    assert [len(s.tokens) for s in sinks] == [3, 6]
    assert sum(rows for rows, length in shapes if length == 1) == 3 + 6


def test_the_next_step_is_enqueued_before_the_last_ones_tokens_are_read(
    model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(make_parts(model), overlap="on")
    (sink,) = add(loop, request("a", prompt(rng, 10), max_tokens=30))
    shapes = counting(loop, monkeypatch)
    loop.step()
    assert len(sink.tokens) == 1, "a lone reader waits for nobody else's step"
    loop.step()
    assert len(sink.tokens) == 1 and shapes[-1] == (1, 1)
    for num_tokens in range(2, 10):
        num_fed = shapes.count((1, 1))
        loop.step()
        assert len(sink.tokens) == num_tokens and shapes.count((1, 1)) == num_fed + 1
    loop.cancel("a")
    loop.check_integrity()


def test_tokens_that_a_prompts_chunk_has_waited_for_are_not_held_back(model: Any, rng: np.random.Generator) -> None:
    """A chunk is computed after the step in flight: no token has to wait for the next step to be enqueued as well."""
    loop = make_loop(make_parts(model), overlap="on")
    (talking,) = add(loop, request("a", prompt(rng, 4), max_tokens=40))
    loop.step()
    (late,) = add(loop, request("b", prompt(rng, 64), max_tokens=5))
    for num_tokens in range(1, 5):
        loop.step()
        assert len(talking.tokens) == num_tokens
    assert loop.runner.num_rows == 2 and late.tokens == []
    loop.step()
    assert len(late.tokens) == 1


@pytest.mark.parametrize("way", ["cancel", "reader", "preempt"])
def test_a_row_that_leaves_in_flight_takes_nothing_along(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, way: str
) -> None:
    parts = make_parts(model, fmt=fmt)
    loop = make_loop(parts, overlap="on")
    one = request("a", prompt(rng, 21), max_tokens=40, sampling=SamplingParams(temperature=1.0, seed=8))
    other = request("b", prompt(rng, 5), max_tokens=40, tenant="b", sampling=SamplingParams(temperature=1.0, seed=9))
    expected = [s.tokens for s in run(make_loop(make_parts(model, fmt=fmt), overlap="off"), one, other)]
    sinks = add(loop, one, other)
    while len(sinks[0].tokens) < 12:
        loop.step()
    (leaving,) = (g for g in loop.requests.running if g.request_id == "a")
    assert loop.runner.num_in_flight(leaving) == 1
    held = leaving.tokens(0, leaving.cache_len)
    if way == "cancel":
        loop.cancel("a")
    elif way == "reader":
        leaving.sink = type("Gone", (), {"put": lambda self, event: 1 / 0})()
        loop.step()
        held.append(expected[0][len(held) - 22])
    else:
        loop.requests.preempt(leaving)
    (kept,) = parts.memory.idle
    assert kept.tokens.tolist() == held
    assert kept.caches is not None and parts.runtime.measure(kept.caches).tokens == len(held)
    finish(loop)
    assert sinks[1].tokens == expected[1]
    assert sinks[0].tokens == (expected[0] if way == "preempt" else expected[0][:12])


def test_a_running_conversation_is_seen_without_its_token_in_flight(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None
) -> None:
    parts = make_parts(model, fmt=fmt)
    loop = make_loop(parts, overlap="on")
    (sink,) = add(loop, request("a", prompt(rng, 21), max_tokens=60, session_id="mine"))
    for step in range(40):
        loop.step()
        (generation,) = loop.requests.running
        if generation.lease is None or generation.lease.running is None or len(sink.tokens) < 2:
            continue
        view = generation.lease.running
        held = view.held_tokens()
        assert held == [*generation.prompt, *sink.tokens[:-1]] and view.held_len() == len(held)
        assert view.written_len() == view.measure().tokens == len(held) + 1
        fork = view.fork(view.usable_prefix(view.held_len() + 5))
        assert parts.runtime.measure(fork).tokens == len(held)
        parts.runtime.release(fork)
        if step == 20:
            loop.answer(ForkSession("", "mine", "branch"))
    (branch,) = parts.memory.idle
    assert branch.tokens.tolist() == [*generation.prompt, *sink.tokens][: len(branch.tokens)]
    finish(loop)


def test_the_books_cover_the_token_in_flight(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open-ended answers grow block by block and preempt each other in a budget that holds less than all of them."""
    monkeypatch.setattr("turboserve.engine.prepare.OPEN_ANSWER_BLOCK", 3)
    parts = make_parts(model, fmt=fmt)
    requests = [
        request(f"r{i}", prompt(rng, 20 + i), max_tokens=None, tenant=str(i), stop=("never",)) for i in range(3)
    ]
    parts.memory.budget_bytes = int(2.2 * parts.runtime.bytes_for(130))
    loop = make_loop(parts, overlap="on", max_context_tokens=0)
    sinks, most_ahead = add(loop, *requests), 0
    while loop.has_work:
        loop.step()
        assert parts.memory.committed_bytes <= parts.memory.budget_bytes
        for generation in loop.requests.running:
            assert generation.lease is not None
            most_ahead = max(most_ahead, loop.runner.num_in_flight(generation))
            assert loop.runner.measure(generation).total <= generation.lease.reserved_bytes
            assert generation.num_tokens <= generation.lease.reserved_tokens
    assert most_ahead == 1 and all(s.finished.reason == "length" for s in sinks)
    assert parts.memory.events().preemptions["growth"] > 0
    loop.check_integrity()


def test_where_it_is_decided() -> None:
    choose: Callable[..., Any] = choose_overlap
    lazily = {"can_cut": True, "backend_name": "gpu", "on_cpu": False}
    assert choose("auto", **lazily).is_on and choose("on", **lazily).is_on and not choose("off", **lazily).is_on
    for backend_name in ("cpu-native", "cpu-numpy"):
        eager = {"can_cut": True, "backend_name": backend_name, "on_cpu": True}
        assert not choose("auto", **eager).is_on and choose("on", **eager).is_on
    assert not choose("on", **{**lazily, "can_cut": False}).is_on
    assert str(choose("off", **lazily)) == "off (as set)"


@pytest.mark.parametrize("kind", ["sliding", "recurrent"])
def test_caches_that_cannot_be_cut_are_not_run_ahead(kind: str, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(small_models.EVERY_KIND[kind]()), overlap="on")
    assert not loop.overlap.is_on and "cut" in loop.snapshot().details["overlap"]
    add(loop, request("a", prompt(rng, 5), max_tokens=5))
    loop.step()
    assert len(loop.requests.running[0].answer) == 1
