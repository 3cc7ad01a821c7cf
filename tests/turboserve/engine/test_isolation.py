"""One request's failure is its own: the others' tokens are those of an undisturbed run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboserve.engine.fakes import Sink, add, make_loop, make_parts, passes_of, request, run, text_of
from tests.turboserve.engine.ties import RECOMPUTED_TIE, assert_same_answer

from turboquant_kv.codec.format import KVFormat
from turboserve.engine import scheduler
from turboserve.engine.draws import Flight
from turboserve.engine.generation import Stage
from turboserve.engine.sampling import BatchSampler
from turboserve.engine.step_loop import StepLoop
from turboserve.errors import EngineFailureError, OverloadedError
from turboserve.messages import SamplingParams, TextDelta

FORMATS = [None, KVFormat(k_bits=4, v_bits=4, page_tokens=16, sink_tokens=16, centred=False)]
NUM_REQUESTS = 4
VICTIM = 2
FAIL_AT = 6  # answer tokens of the victim before it fails


@pytest.fixture(autouse=True)
def one_prompt_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows join at different steps, and chunks' lengths tell whose they are."""
    monkeypatch.setattr(scheduler, "MAX_PREPARE_S", 0.0)


@pytest.fixture(params=["off", "on"], ids=["at once", "overlap"])
def overlap(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=FORMATS, ids=lambda fmt: "f16" if fmt is None else fmt.name)
def loop(request: pytest.FixtureRequest, model: Any, overlap: str) -> StepLoop:
    return make_loop(make_parts(model, fmt=request.param), overlap=overlap)


@pytest.fixture
def prompts(rng: np.random.Generator) -> list[str]:
    return [text_of([int(t) for t in rng.integers(0, 256, n)]) for n in (5, 40, 21, 33)]


def start(loop: StepLoop, prompts: list[str]) -> list[Sink]:
    return add(loop, *(request(f"r{i}", p, max_tokens=30, tenant=str(i)) for i, p in enumerate(prompts)))


def undisturbed(loop: StepLoop, prompts: list[str]) -> list[list[int]]:
    """Tokens of all requests, from a loop of the same kind that nothing happens to."""
    other = make_loop(make_parts(loop._parts.loaded.model, fmt=loop._parts.runtime.fmt))
    sinks = start(other, prompts)
    while other.has_work:
        other.step()
    return [s.tokens for s in sinks]


def step_until_victim_has(loop: StepLoop, sinks: list[Sink], num_tokens: int) -> Any:
    while len(sinks[VICTIM].tokens) < num_tokens:
        loop.step()
    return next(s for s in loop.requests.running if s.request_id == f"r{VICTIM}")


def finish(loop: StepLoop) -> None:
    while loop.has_work:
        loop.step()
    assert not loop._parts.memory.leases
    loop._parts.memory.check_integrity()


def assert_answered(loop: StepLoop, prompts: list[str], sinks: list[Sink], expected: list[list[int]]) -> None:
    """Everybody but the victim as if undisturbed, and the victim as far as it came."""
    for i, (prompt, sink, want) in enumerate(zip(prompts, sinks, expected, strict=True)):
        assert_same_answer(loop._parts, prompt, sink.tokens, want[: len(sink.tokens)] if i == VICTIM else want)


def assert_only_victim_failed(loop: StepLoop, prompts: list[str], sinks: list[Sink], expected: list[list[int]]) -> None:
    assert isinstance(sinks[VICTIM].error, EngineFailureError)
    assert_answered(loop, prompts, sinks, expected)


class Broken:
    """Raises at any use."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("injected")


def test_a_failing_text_ends_its_row_only(loop: StepLoop, prompts: list[str]) -> None:
    expected = undisturbed(loop, prompts)
    sinks = start(loop, prompts)
    victim = step_until_victim_has(loop, sinks, FAIL_AT)
    victim.text = Broken()
    finish(loop)
    assert_only_victim_failed(loop, prompts, sinks, expected)


@pytest.mark.parametrize("breaks", ["at once", "when others leave"])
def test_sampling_that_fails_for_one_row_ends_that_row_only(
    loop: StepLoop, prompts: list[str], breaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch's draw raises with the victim in it; the others are drawn alone, and then together again."""
    expected = undisturbed(loop, prompts)
    sinks = start(loop, prompts)
    victim = step_until_victim_has(loop, sinks, FAIL_AT)
    broken = victim.sampling
    if breaks == "when others leave":  # a sampler that is made anew meets a row it cannot take
        victim.sampling = Broken()
        loop.cancel("r3")
        loop.runner._sampler = None
    sample, num_batches = BatchSampler.sample, [0]

    def failing(self: BatchSampler, *args: Any, **options: Any) -> Any:
        if any(row is broken for row in self._rows):
            raise RuntimeError("injected")
        num_batches[0] += self.num_rows > 1
        return sample(self, *args, **options)

    monkeypatch.setattr(BatchSampler, "sample", failing)
    finish(loop)
    assert num_batches[0] > 1
    if breaks == "when others leave":
        expected[3] = expected[3][: len(sinks[3].tokens)]
    assert_only_victim_failed(loop, prompts, sinks, expected)


def test_seeded_and_penalised_rows_survive_failures_with_the_same_draws(
    loop: StepLoop, prompts: list[str], poison: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed batched step, and then a failed batched draw: places and counts come from the answers."""
    params = [
        SamplingParams(temperature=0.8, seed=3, top_p=0.9),
        SamplingParams(temperature=1.0, seed=4, frequency_penalty=0.5),
        SamplingParams(temperature=1.0, seed=5, top_k=8, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, seed=6),
    ]
    requests = [
        request(f"r{i}", prompt, max_tokens=30, tenant=str(i), sampling=one)
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]
    expected = run(make_loop(make_parts(loop._parts.loaded.model, fmt=loop._parts.runtime.fmt)), *requests)
    sinks = add(loop, *requests)
    step_until_victim_has(loop, sinks, FAIL_AT)
    failures = iter([True])
    poison["when"] = lambda lengths: len(lengths) == NUM_REQUESTS and next(failures, False)
    loop.step()
    assert next(failures, None) is None
    sample, broken_draws = BatchSampler.sample, iter([True])

    def fail_once(self: BatchSampler, *args: Any, **options: Any) -> Any:
        draws = sample(self, *args, **options)
        if self.num_rows > 1 and next(broken_draws, False):
            raise RuntimeError("injected after the rows' state has moved on")
        return draws

    monkeypatch.setattr(BatchSampler, "sample", fail_once)
    finish(loop)
    assert next(broken_draws, None) is None
    assert [s.tokens for s in sinks] == [s.tokens for s in expected]


def test_a_reader_that_raises_ends_its_request_only(loop: StepLoop, prompts: list[str]) -> None:
    expected = undisturbed(loop, prompts)
    sinks = start(loop, prompts)
    victim = step_until_victim_has(loop, sinks, FAIL_AT)
    victim.sink = type("Gone", (), {"put": lambda self, event: 1 / 0})()
    finish(loop)
    assert victim.stage is Stage.ENDED and len(sinks[VICTIM].tokens) == FAIL_AT
    assert_answered(loop, prompts, sinks, expected)


@pytest.fixture
def poison(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Makes the second layer raise for batches that `when` recognises by its cache's row lengths."""
    plan: dict[str, Any] = {"when": lambda lengths: False, "error": RuntimeError}
    attention = model.layers[1].self_attn
    original = type(attention).__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        out = original(self, x, mask, cache)
        if self is attention and cache is not None and plan["when"](row_lengths(cache)):
            raise plan["error"]("injected")
        return out

    monkeypatch.setattr(type(attention), "__call__", call)
    yield plan


def row_lengths(cache: Any) -> list[int]:
    offset = cache.offset
    return [int(n) for n in np.array(offset).reshape(-1)]


def test_a_row_that_breaks_the_batched_step_is_found(
    loop: StepLoop, prompts: list[str], poison: dict[str, Any]
) -> None:
    expected = undisturbed(loop, prompts)
    sinks = start(loop, prompts)
    victim = step_until_victim_has(loop, sinks, FAIL_AT)
    # rows are told apart by their lengths
    fatal_len = victim.cache_len + loop.runner.num_in_flight(victim) + 1
    poison["when"] = lambda lengths: fatal_len in lengths
    loop.step()
    if loop.overlap.is_on:  # it was tried again when the tokens were known
        assert isinstance(sinks[VICTIM].events[-1], TextDelta)
        loop.step()
    poison["when"] = lambda lengths: False
    finish(loop)
    assert_only_victim_failed(loop, prompts, sinks, expected)


def test_a_step_that_fails_once_costs_nobody_anything(
    loop: StepLoop, prompts: list[str], poison: dict[str, Any]
) -> None:
    expected = undisturbed(loop, prompts)
    sinks = start(loop, prompts)
    step_until_victim_has(loop, sinks, FAIL_AT)
    failures = iter([True])
    poison["when"] = lambda lengths: len(lengths) == NUM_REQUESTS and next(failures, False)
    finish(loop)
    assert all(s.finished for s in sinks)
    assert_answered(loop, prompts, sinks, expected)


def test_a_step_that_fails_for_all_fails_all_and_the_engine_lives(
    loop: StepLoop, prompts: list[str], poison: dict[str, Any]
) -> None:
    expected = undisturbed(loop, prompts)
    sinks = start(loop, prompts)
    step_until_victim_has(loop, sinks, FAIL_AT)
    poison["when"] = lambda lengths: True
    for _ in range(2 if loop.overlap.is_on else 1):
        loop.step()
    assert all(isinstance(s.error, EngineFailureError) for s in sinks)
    poison["when"] = lambda lengths: False
    again = start(loop, prompts)
    finish(loop)
    assert all(s.finished for s in again)
    assert_answered(loop, prompts, again, expected)


def test_a_failing_prefill_ends_its_request_only(loop: StepLoop, prompts: list[str], poison: dict[str, Any]) -> None:
    expected = undisturbed(loop, prompts)
    poison["when"] = lambda lengths: lengths == [16] or lengths == [11]  # a chunk of the victim, 22 tokens in two
    sinks = start(loop, prompts)
    for _ in range(3):
        loop.step()
    poison["when"] = lambda lengths: False
    finish(loop)
    assert_only_victim_failed(loop, prompts, sinks, expected)
    assert sinks[VICTIM].tokens == []


def test_a_failed_allocation_sheds_idle_caches_and_may_be_tried_again(
    loop: StepLoop, prompts: list[str], poison: dict[str, Any]
) -> None:
    run(loop, request("old", prompts[1], tenant="old"))
    assert len(list(loop._parts.memory.idle)) == 1
    poison["error"] = MemoryError
    poison["when"] = lambda lengths: True
    (sink,) = add(loop, request("a", prompts[1], tenant="x"))
    loop.step()
    assert isinstance(sink.error, OverloadedError) and sink.error.retry_after_s
    assert len(list(loop._parts.memory.idle)) == 0
    poison["when"] = lambda lengths: False
    (again,) = run(loop, request("b", prompts[1], tenant="x"))
    assert again.finished.reason == "length"


def test_lost_caches_are_computed_again(loop: StepLoop, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = undisturbed(loop, prompts)
    sinks = start(loop, prompts)
    step_until_victim_has(loop, sinks, FAIL_AT)
    evaluate, failures = loop._parts.runtime.evaluate, iter([True])

    def fail_once(caches: list[Any]) -> None:
        if next(failures, False):
            raise RuntimeError("injected device error")
        evaluate(caches)

    if loop.overlap.is_on:
        fail_in_flight(monkeypatch, "land", failures)
    else:
        monkeypatch.setattr(loop._parts.runtime, "evaluate", fail_once)
    finish(loop)
    assert next(failures, None) is None
    for prompt, sink, want in zip(prompts, sinks, expected, strict=True):
        assert_same_answer(loop._parts, prompt, sink.tokens, want, RECOMPUTED_TIE)


def fail_in_flight(monkeypatch: pytest.MonkeyPatch, verb: str, failures: Iterator[bool]) -> None:
    """Steps that are enqueued ahead fail when they are to start or to land."""
    original = getattr(Flight, verb)

    def failing(self: Flight) -> Any:
        if next(failures, False):
            raise RuntimeError("injected device error")
        return original(self)

    monkeypatch.setattr(Flight, verb, failing)


@pytest.mark.parametrize("verb", ["start", "land"])
@pytest.mark.parametrize("overlap", ["on"])
def test_a_device_that_fails_ahead_costs_seeded_rows_nothing(
    loop: StepLoop, prompts: list[str], verb: str, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row has its last token in flight when the step after it fails; all draws come again from seed and place."""
    requests = [
        request(f"r{i}", prompt, max_tokens=n, tenant=str(i), sampling=SamplingParams(temperature=1.0, seed=i))
        for i, (prompt, n) in enumerate(zip(prompts, (FAIL_AT + 3, 30, 30, 30), strict=True))
    ]
    parts = loop._parts
    expected = run(make_loop(make_parts(parts.loaded.model, fmt=parts.runtime.fmt), overlap="off"), *requests)
    sinks = add(loop, *requests)
    while len(sinks[0].tokens) < FAIL_AT + 2:
        loop.step()
    failures = iter([True])
    fail_in_flight(monkeypatch, verb, failures)
    finish(loop)
    assert next(failures, None) is None
    for sink, want in zip(sinks, expected, strict=True):
        # the same draws up to where logits of recomputed caches, which differ in their last bits, could matter
        assert len(sink.tokens) == len(want.tokens) and sink.tokens[: FAIL_AT + 1] == want.tokens[: FAIL_AT + 1]
    assert sum(s.tokens == w.tokens for s, w in zip(sinks, expected, strict=True)) >= 2


def test_a_device_that_fails_again_and_again_ends_the_request(
    loop: StepLoop, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (sink,) = add(loop, request("a", prompts[1], max_tokens=30))
    loop.step()
    fail_in_flight(monkeypatch, "land", iter([True] * 9))
    evaluate = loop._parts.runtime.evaluate

    def failing(caches: list[Any]) -> None:
        if loop.num_running and loop.requests.running[0].stage is Stage.DECODE:
            raise RuntimeError("injected device error")
        evaluate(caches)

    monkeypatch.setattr(loop._parts.runtime, "evaluate", failing)
    finish(loop)
    assert isinstance(sink.error, EngineFailureError)


def test_nan_logits_fail_only_their_row(loop: StepLoop, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = undisturbed(loop, prompts)
    sinks = start(loop, prompts)
    step_until_victim_has(loop, sinks, FAIL_AT)
    model = passes_of(loop).model

    def poisoned(tokens: mx.array, cache: list[Any]) -> mx.array:
        logits: mx.array = model(tokens, cache=cache)
        index = [row.request_id for row in loop.runner._rows].index(f"r{VICTIM}")
        logits[index] = mx.nan
        return logits

    monkeypatch.setattr(passes_of(loop), "model", poisoned)
    loop.step()
    monkeypatch.undo()
    finish(loop)
    assert_only_victim_failed(loop, prompts, sinks, expected)
