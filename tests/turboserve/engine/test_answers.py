"""How answers end and what goes with their text: stop tokens, min_tokens, logprobs, the reader's deltas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboserve.engine.fakes import GREEDY, VOCAB, Sink, add, make_loop, make_parts, request, run, text_of

from turboquant_kv.codec.format import KVFormat
from turboserve.engine.step_loop import StepLoop
from turboserve.errors import EngineFailureError, InvalidRequestError
from turboserve.messages import (
    Delta,
    ReasoningDelta,
    Request,
    SamplingParams,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)

FMT = KVFormat(k_bits=4, v_bits=3, page_tokens=16, sink_tokens=16, centred=False)


@pytest.fixture(params=["off", "on"], ids=["at once", "overlap"])
def overlap(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prompt(rng: np.random.Generator, num_tokens: int) -> str:
    return text_of([int(t) for t in rng.integers(0, VOCAB, num_tokens)])


def answer_of(model: Any, one: Request, eos_ids: frozenset[int] = frozenset(), overlap: str = "off") -> Sink:
    return run(make_loop(make_parts(model, eos_ids=eos_ids), overlap=overlap), one)[0]


# --- how answers end


def first_time(tokens: list[int], token: int) -> list[int]:
    return tokens[: tokens.index(token)]


def test_stop_tokens_of_the_request_end_it_like_the_models_own(
    model: Any, rng: np.random.Generator, overlap: str
) -> None:
    one = request("a", prompt(rng, 12), max_tokens=30, sampling=SamplingParams(temperature=1.0, seed=5))
    free = answer_of(model, one)
    token = free.tokens[20]
    own = answer_of(model, one, frozenset({token}), overlap)
    asked = answer_of(model, replace(one, stop_token_ids=(token,)), overlap=overlap)
    both = answer_of(model, replace(one, stop_token_ids=(token,)), frozenset({token}), overlap)
    ignored = answer_of(model, replace(one, ignore_eos=True), frozenset({token}), overlap)
    still_asked = answer_of(model, replace(one, ignore_eos=True, stop_token_ids=(token,)), frozenset({token}), overlap)
    for sink, stopped_by in ((own, None), (asked, token), (both, token), (still_asked, token)):
        assert sink.tokens == first_time(free.tokens, token)
        assert sink.finished.reason == "stop" and sink.finished.stopped_by == stopped_by
        assert sink.finished.usage.completion_tokens == len(sink.tokens) + 1
    assert ignored.tokens == free.tokens and ignored.finished.reason == "length"
    assert free.finished.stopped_by is None


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_stop_tokens_outside_the_vocabulary_are_refused(model: Any, token: int) -> None:
    error = answer_of(model, replace(request("a", "x"), stop_token_ids=(3, token))).error
    assert isinstance(error, InvalidRequestError) and error.param == "stop_token_ids"


def test_the_stop_string_is_named_and_shown_when_asked(model: Any, rng: np.random.Generator, overlap: str) -> None:
    one = request("a", prompt(rng, 12), max_tokens=20)
    free = answer_of(model, one)
    stop = free.text[4:7]
    at = free.text.index(stop)
    for include in (False, True):
        asked = replace(one, stop=("never", stop), include_stop=include)
        sink = answer_of(model, asked, overlap=overlap)
        assert sink.text == free.text[: at + 3 * include]
        assert (sink.finished.reason, sink.finished.stopped_by) == ("stop", stop)


def test_no_answer_ends_before_min_tokens_in_any_batch(model: Any, rng: np.random.Generator, overlap: str) -> None:
    """End tokens are so likely that answers end at once where they may; overlap stays on meanwhile."""
    ends = frozenset({7, 8})
    likely = ((7, 30.0), (9, 30.0))
    min_tokens = (0, 1, 5, 11, 40)
    requests = [
        replace(
            request(f"r{i}", prompt(rng, 5 + i), max_tokens=20, tenant=str(i)),
            sampling=SamplingParams(temperature=1.0 * (i % 2), seed=i, logit_bias=likely),
            stop_token_ids=(9,),
            min_tokens=n,
        )
        for i, n in enumerate(min_tokens)
    ]
    loop = make_loop(make_parts(model, eos_ids=ends), overlap=overlap)
    sinks = add(loop, *requests)
    num_ahead = 0
    while loop.has_work:
        loop.step()
        num_ahead += loop.runner._flight is not None
    assert (num_ahead > 10) == (overlap == "on")
    assert [len(s.tokens) for s in sinks] == [0, 1, 5, 11, 20]
    for one, sink in zip(requests, sinks, strict=True):
        assert not ends.union({9}) & set(sink.tokens)
        assert answer_of(model, one, ends).tokens == sink.tokens
    assert [s.finished.reason for s in sinks] == 4 * ["stop"] + ["length"]


@pytest.mark.parametrize("skip", [True, False])
def test_control_tokens_are_shown_when_asked(model: Any, rng: np.random.Generator, skip: bool) -> None:
    parts = make_parts(model)
    decode = type(parts.loaded.tokenizer).decode

    def decode_without_even(self: Any, ids: Any, *, skip_special_tokens: bool, **options: Any) -> str:
        return str(decode(self, [t for t in ids if t % 2 or not skip_special_tokens]))

    one = request("a", prompt(rng, 9), max_tokens=20, sampling=SamplingParams(seed=3))
    free = answer_of(model, one).tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(parts.loaded.tokenizer), "decode", decode_without_even)
        (sink,) = run(make_loop(parts), replace(one, skip_special_tokens=skip))
    assert sink.tokens == [t for t in free if t % 2 or not skip]


# --- logprobs


def expected_logprobs(model: Any, tokens: list[int], num_prompt: int) -> np.ndarray:
    """(n, V) float64: log-softmax of the model's logits before each answer token, from one pass without a cache."""
    logits = np.array(model(mx.array([tokens]))[0].astype(mx.float32), np.float64)[num_prompt - 1 : -1]
    logits -= logits.max(axis=-1, keepdims=True)
    values: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return values


def test_logprobs_are_the_log_softmax_of_the_models_logits_in_any_batch(
    model: Any, rng: np.random.Generator, overlap: str
) -> None:
    """Whatever is drawn from: bias, penalties and temperature leave them alone."""
    asked = (None, 0, 3, 20, None, 1)
    sampling = [
        GREEDY,
        SamplingParams(temperature=1.0, seed=1, frequency_penalty=1.0),
        SamplingParams(temperature=2.0, seed=2, logit_bias=((5, 4.0),)),
    ]
    requests = [
        replace(
            request(f"r{i}", prompt(rng, 4 + 3 * i), max_tokens=15, tenant=str(i), sampling=sampling[i % 3]),
            num_top_logprobs=n,
        )
        for i, n in enumerate(asked)
    ]
    loop = make_loop(make_parts(model), overlap=overlap)
    sinks = []
    for one in requests:  # rows with and without join at different steps
        sinks += add(loop, one)
        loop.step()
        loop.step()
    while loop.has_work:
        loop.step()
    for one, sink, num_top in zip(requests, sinks, asked, strict=True):
        if num_top is None:
            assert sink.logprobs == []
            continue
        assert [p.token_id for p in sink.logprobs] == sink.tokens and "".join(
            p.text for p in sink.logprobs
        ) == sink.text
        tokens = [ord("u"), *[ord(c) - 0x100 for c in str(one.messages[0]["content"])], *sink.tokens]
        want = expected_logprobs(model, tokens, len(tokens) - len(sink.tokens))
        for token, got, row in zip(sink.tokens, sink.logprobs, want, strict=True):
            assert got.logprob == pytest.approx(row[token], abs=2e-3) and got.raw == text_of([token]).encode()
            assert [p.token_id for p in got.top] == sorted(
                (p.token_id for p in got.top), key=lambda t: -next(q.logprob for q in got.top if q.token_id == t)
            )
            np.testing.assert_allclose([p.logprob for p in got.top], np.sort(row)[::-1][:num_top], atol=2e-3)
            np.testing.assert_allclose([p.logprob for p in got.top], row[[p.token_id for p in got.top]], atol=2e-3)
        alone = answer_of(model, one)
        assert alone.tokens == sink.tokens
        np.testing.assert_allclose([p.logprob for p in alone.logprobs], [p.logprob for p in sink.logprobs], atol=1e-3)


def test_a_batch_where_nobody_asks_computes_no_logprobs(
    model: Any, rng: np.random.Generator, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboserve.engine.sampling.BatchSampler._logprobs", lambda *args: 1 / 0)
    sinks = run(make_loop(make_parts(model), overlap=overlap), request("a", prompt(rng, 5)), request("b", "x"))
    assert all(s.finished.reason == "length" for s in sinks)


def test_a_stop_string_and_an_end_token_have_no_logprobs_and_what_only_looked_like_one_has(
    model: Any, rng: np.random.Generator, overlap: str
) -> None:
    one = replace(request("a", prompt(rng, 12), max_tokens=20), num_top_logprobs=2)
    free = answer_of(model, one)
    stop = free.text[9:12]
    at = free.text.index(stop)
    looks_like = free.text[4:6] + "?"
    stopped = answer_of(model, replace(one, stop=(looks_like, stop)), overlap=overlap)
    assert [p.token_id for p in stopped.logprobs] == free.tokens[:at] == stopped.tokens
    shown = answer_of(model, replace(one, stop=(stop,), include_stop=True), overlap=overlap)
    assert [p.token_id for p in shown.logprobs] == free.tokens[: at + 3]
    ended = answer_of(model, one, frozenset({free.tokens[9]}), overlap)
    assert [p.token_id for p in ended.logprobs] == first_time(free.tokens, free.tokens[9])
    held = answer_of(model, replace(one, stop=(free.text[-2:] + "?",)), overlap=overlap)
    assert [p.token_id for p in held.logprobs] == free.tokens and held.text == free.text


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_logprobs_survive_draws_that_fail(
    model: Any, rng: np.random.Generator, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn alone, each row has the logprobs it would have had."""
    requests = [
        replace(
            request(f"r{i}", prompt(rng, 9), max_tokens=12, tenant=str(i), sampling=SamplingParams(seed=i)),
            num_top_logprobs=i or None,
        )
        for i in range(3)
    ]
    expected = run(make_loop(make_parts(model), overlap="off"), *requests)
    loop = make_loop(make_parts(model), overlap=overlap)
    sinks = add(loop, *requests)
    for _ in range(4):
        loop.step()
    sample, failures = loop.runner._sample, iter([True])

    def fail_once(*args: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("injected")
        return sample(*args)

    monkeypatch.setattr(loop.runner, "_sample", fail_once)
    while loop.has_work:
        loop.step()
    assert next(failures, None) is None
    for sink, want in zip(sinks, expected, strict=True):
        assert sink.tokens == want.tokens and len(sink.logprobs) == len(want.logprobs)
        for got, one in zip(sink.logprobs, want.logprobs, strict=True):
            assert got.token_id == one.token_id and got.logprob == pytest.approx(one.logprob, abs=1e-4)
            assert len(got.top) == len(one.top)


# --- the reader of an answer's text


class Thoughtful:
    """The first five tokens are reasoning, the next five text, and what follows a call's arguments."""

    def __init__(self, raises_at: int | None = None) -> None:
        self.num_tokens, self.num_reasoning_tokens, self.has_tool_calls = 0, 0, False
        self.raises_at, self.held = raises_at, ""

    def add(self, text: str, logprobs: tuple[TokenLogprob, ...], num_tokens: int = 1) -> list[Delta]:
        if self.num_tokens == self.raises_at:
            raise ValueError("injected")
        self.num_tokens += num_tokens
        if self.num_tokens <= 5:
            self.num_reasoning_tokens += num_tokens
            return [ReasoningDelta(text)]
        if self.num_tokens <= 10:
            return [TextDelta(text)]
        self.held += text
        return []

    def finish(self) -> list[Delta]:
        if self.raises_at == -1:
            raise ValueError("injected")
        self.has_tool_calls = bool(self.held)
        return [ToolCallDelta(0, "call", "name", self.held)] if self.held else []


def run_with_readers(loop: StepLoop, requests: list[Request], readers: list[Any]) -> list[Sink]:
    prepare = loop._preparer.prepare

    def prepare_and_swap(generation: Any) -> None:
        prepare(generation)
        generation.reader = readers[int(generation.request_id[1:])] or generation.reader

    loop._preparer.prepare = prepare_and_swap  # type: ignore[method-assign]
    return run(loop, *requests)


@pytest.mark.parametrize(("num_tokens", "by_length"), [(16, True), (16, False), (10, False), (3, False)])
def test_all_text_goes_through_the_reader(
    model: Any, rng: np.random.Generator, overlap: str, num_tokens: int, by_length: bool
) -> None:
    one = request("r0", prompt(rng, 12), max_tokens=num_tokens)
    text = answer_of(model, replace(one, max_tokens=16)).text
    if not by_length:  # ended by a text that follows
        rest = text[num_tokens:] or answer_of(model, replace(one, max_tokens=18)).text[16:]
        one = replace(one, stop=(rest[:1],), max_tokens=30)
        num_tokens = min(num_tokens, (text + rest).index(rest[:1]))
    (sink,) = run_with_readers(make_loop(make_parts(model), overlap=overlap), [one], [Thoughtful()])
    reasoning = "".join(e.text for e in sink.events if isinstance(e, ReasoningDelta))
    arguments = "".join(e.arguments for e in sink.events if isinstance(e, ToolCallDelta))
    text = text[:num_tokens]
    assert (reasoning, sink.text, arguments) == (text[:5], text[5:10], text[10:])
    assert sink.finished.reason == ("length" if by_length else "tool_calls" if arguments else "stop")
    num_drawn = sink.finished.usage.completion_tokens
    assert sink.finished.usage.reasoning_tokens == min(5, num_drawn)


@pytest.mark.parametrize("raises_at", [0, 4, -1])
def test_a_reader_of_text_that_raises_fails_its_request_alone(
    model: Any, rng: np.random.Generator, overlap: str, raises_at: int
) -> None:
    requests = [request(f"r{i}", prompt(rng, 9), tenant=str(i), sampling=SamplingParams(seed=i)) for i in range(3)]
    expected = run(make_loop(make_parts(model)), *requests)
    loop = make_loop(make_parts(model), overlap=overlap)
    sinks = run_with_readers(loop, requests, [None, Thoughtful(raises_at), None])
    assert isinstance(sinks[1].error, EngineFailureError)
    for i in (0, 2):
        assert sinks[i].tokens == expected[i].tokens and sinks[i].finished.reason == "length"
    assert not loop._parts.memory.leases
    loop.check_integrity()
