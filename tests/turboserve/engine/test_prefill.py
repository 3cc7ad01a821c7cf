"""Several prompts in one pass: answers, shared beginnings and failures are as if each had been read alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tests.turboquant_kv import small_models
from tests.turboserve.engine.fakes import Sink, add, make_loop, make_parts, passes_of, request, run, text_of
from tests.turboserve.engine.ties import RECOMPUTED_TIE, assert_same_answer

from turboquant_kv.codec.format import KVFormat
from turboserve.engine.loading import build_parts
from turboserve.engine.scheduler import PrefillSpeed
from turboserve.engine.step_loop import StepLoop
from turboserve.errors import EngineFailureError
from turboserve.messages import Request, SamplingParams
from turboserve.settings import Settings

PAGE, SINK = 16, 16
FORMATS = [None, KVFormat(k_bits=4, v_bits=4, page_tokens=PAGE, sink_tokens=SINK, centred=False)]


@pytest.fixture(params=FORMATS, ids=lambda fmt: "f16" if fmt is None else fmt.name)
def fmt(request: pytest.FixtureRequest) -> KVFormat | None:
    value: KVFormat | None = request.param
    return value


def prompt(rng: np.random.Generator, num_tokens: int) -> str:
    return text_of([int(t) for t in rng.integers(0, 256, num_tokens)])


class Watched:
    """A loop whose model notes the shapes of what it is fed, and raises where `fails` says so."""

    def __init__(self, loop: StepLoop) -> None:
        self.loop, self.model = loop, passes_of(loop).model
        self.shapes: list[tuple[int, int]] = []
        self.failures: Iterator[bool] = iter(())
        self.fatal_token: int | None = None
        passes_of(loop).model = self

    def __call__(self, tokens: mx.array, cache: Any) -> Any:
        logits = self.model(tokens, cache=cache)
        if tokens.shape[1] > 1:
            self.shapes.append((tokens.shape[0], tokens.shape[1]))
            if next(self.failures, False) or (self.fatal_token is not None and self.fatal_token in np.array(tokens)):
                raise RuntimeError("injected")
        return logits

    @property
    def num_computed(self) -> int:
        """Padding included."""
        return sum(rows * length for rows, length in self.shapes)


def finish(loop: StepLoop) -> None:
    while loop.has_work:
        loop.step()
    loop.check_integrity()


def assert_as_alone(fmt: KVFormat | None, model: Any, requests: list[Request], sinks: list[Sink]) -> None:
    for one, sink in zip(requests, sinks, strict=True):
        parts = make_parts(model, fmt=fmt)
        (alone,) = run(make_loop(parts, prefill_chunk_tokens=512), one)
        assert_same_answer(parts, str(one.messages[0]["content"]), sink.tokens, alone.tokens, RECOMPUTED_TIE)


def test_prompts_of_like_lengths_are_read_in_one_pass(model: Any, rng: np.random.Generator, fmt: Any) -> None:
    requests = [
        request(f"r{i}", prompt(rng, n), tenant=str(i), max_tokens=12) for i, n in enumerate((37, 48, 40, 47, 100))
    ]
    watched = Watched(make_loop(make_parts(model, fmt=fmt), prefill_chunk_tokens=256))
    sinks = add(watched.loop, *requests)
    finish(watched.loop)
    assert watched.shapes[0] == (4, 48) and sum(rows for rows, _ in watched.shapes) == 5
    assert_as_alone(fmt, model, requests, sinks)


def test_prompts_are_read_in_whole_blocks_where_the_model_wants_it(
    model: Any, rng: np.random.Generator, fmt: Any
) -> None:
    parts = make_parts(model, fmt=fmt)
    parts = replace(parts, loaded=replace(parts.loaded, prompt_block=24))
    watched = Watched(make_loop(parts, prefill_chunk_tokens=16))
    assert watched.loop.prefill_tokens == 24
    run(watched.loop, request("r", prompt(rng, 61), max_tokens=2))
    lens = [length for _, length in watched.shapes]
    assert lens[:2] == [24, 24] and lens[2] < 24


def all_at_once(watched: Watched, requests: list[Request]) -> list[Sink]:
    """Requests that are all prepared when the first of them is read."""
    sinks = add(watched.loop, *requests)
    for generation in watched.loop.requests.everyone():
        watched.loop._preparer.prepare(generation)
    return sinks


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_pass_of_several_gives_each_what_it_gets_alone(
    model: Any, rng: np.random.Generator, fmt: KVFormat | None, overlap: str
) -> None:
    """Ragged, from empty caches and behind conversations of other lengths, in both formats at once."""
    watched = Watched(make_loop(parts := make_parts(model, fmt=fmt), prefill_chunk_tokens=256, overlap=overlap))
    requests, begun = [], []
    for i, (num_held, num_new) in enumerate([(0, 37), (SINK - 1, 40), (SINK + PAGE - 1, 42), (70, 38), (0, 43)]):
        opening = prompt(rng, num_held)
        kv_format = "f16" if i == 3 else None
        if num_held:
            begun.append(request(f"b{i}", opening, tenant=str(i), max_tokens=1, kv_format=kv_format))
        requests.append(
            request(f"r{i}", opening + prompt(rng, num_new), tenant=str(i), max_tokens=12, kv_format=kv_format)
        )
    run(watched.loop, *begun)
    watched.shapes.clear()
    sinks = all_at_once(watched, requests)
    finish(watched.loop)
    assert len(watched.shapes) == 1 and watched.shapes[0][0] == 5 and watched.num_computed <= 256
    assert [s.finished.usage.cached_tokens > 0 for s in sinks] == [False, True, True, True, False]
    assert [s.finished.usage.kv.tokens for s in sinks] == [len(str(r.messages[0]["content"])) + 12 for r in requests]
    for one, sink in zip(requests, sinks, strict=True):
        alone = run(make_loop(make_parts(model, fmt=fmt)), one)[0]
        in_fmt = make_parts(model, fmt=None if one.kv_format else fmt)
        assert_same_answer(in_fmt, str(one.messages[0]["content"]), sink.tokens, alone.tokens, RECOMPUTED_TIE)
    parts.memory.drop_idle()
    assert parts.runtime.allocated_bytes() == parts.runtime.slack_bytes()


def test_a_beginning_that_is_shared_is_computed_once(model: Any, rng: np.random.Generator, fmt: Any) -> None:
    opening = prompt(rng, 100)
    requests = [request(f"r{i}", opening + prompt(rng, 30 + i), max_tokens=10) for i in range(4)]
    watched = Watched(make_loop(make_parts(model, fmt=fmt), prefill_chunk_tokens=512))
    sinks = all_at_once(watched, requests)
    finish(watched.loop)
    assert watched.shapes[0] == (1, 130) and watched.shapes[1][0] == 3 and len(watched.shapes) == 2
    assert watched.num_computed < 130 + 3 * (33 + PAGE)
    assert_as_alone(fmt, model, requests, sinks)


def test_a_prompt_that_fails_in_a_pass_ends_alone(model: Any, rng: np.random.Generator, fmt: Any) -> None:
    requests = [request(f"r{i}", prompt(rng, 40 + i), tenant=str(i), max_tokens=12) for i in range(4)]
    bad = [int(t) for t in rng.integers(0, 255, 41)]
    requests = [
        replace(
            one, messages=({"role": "user", "content": str(one.messages[0]["content"]).replace(chr(0x1FF), "\u0100")},)
        )
        for one in requests
    ]
    requests[1] = request("r1", text_of([*bad, 255, *bad[:2]]), tenant="1", max_tokens=12)
    watched = Watched(make_loop(make_parts(model, fmt=fmt), prefill_chunk_tokens=256))
    watched.fatal_token = 255
    sinks = all_at_once(watched, requests)
    finish(watched.loop)
    assert [rows for rows, _ in watched.shapes] == [4, 1, 1, 1, 1]
    assert isinstance(sinks[1].error, EngineFailureError)
    others = [0, 2, 3]
    assert_as_alone(fmt, model, [requests[i] for i in others], [sinks[i] for i in others])
    assert not watched.loop._parts.memory.leases


def test_a_pass_that_fails_once_costs_nobody_anything(model: Any, rng: np.random.Generator, fmt: Any) -> None:
    requests = [request(f"r{i}", prompt(rng, 40 + i), tenant=str(i), max_tokens=12) for i in range(4)]
    watched = Watched(make_loop(make_parts(model, fmt=fmt), prefill_chunk_tokens=256))
    watched.failures = iter([True])
    sinks = all_at_once(watched, requests)
    finish(watched.loop)
    assert [rows for rows, _ in watched.shapes] == [4, 1, 1, 1, 1]
    assert_as_alone(fmt, model, requests, sinks)


@pytest.mark.parametrize("kind", ["sliding", "recurrent"])
def test_caches_that_would_store_padding_are_filled_one_at_a_time(kind: str, rng: np.random.Generator) -> None:
    loop = make_loop(make_parts(small_models.EVERY_KIND[kind]()), prefill_chunk_tokens=256)
    watched = Watched(loop)
    all_at_once(watched, [request(f"r{i}", prompt(rng, 40), tenant=str(i), max_tokens=3) for i in range(3)])
    finish(loop)
    assert [rows for rows, _ in watched.shapes] == [1, 1, 1]


def test_while_streams_run_a_step_reads_no_more_than_it_has_time_for(model: Any, rng: np.random.Generator) -> None:
    watched = Watched(make_loop(make_parts(model), prefill_chunk_tokens=256, max_inter_token_ms=100))
    loop = watched.loop
    run(loop, request("first", prompt(rng, 200), tenant="first", max_tokens=1))
    assert watched.shapes == [(1, 200)]
    add(loop, request("talking", prompt(rng, 10), tenant="talking", max_tokens=60))
    loop.step()
    watched.shapes.clear()
    loop._speed = PrefillSpeed()
    loop._speed.learn(500, 1.0)
    add(loop, request("long", prompt(rng, 200), tenant="long", max_tokens=1))
    loop.step()
    assert watched.shapes == [(1, 50)]


def test_the_embedded_model_answers_many_prompts_as_it_answers_each(tmp_path: Path) -> None:
    """In the server's default format, through tokenizer and template, from one pass over all prompts."""
    questions = ["What is a hash table?", "Who wrote Faust?", "Name three rivers.", "How far is the moon?"]
    parts = build_parts(Settings(cache_dir=tmp_path, kv_budget="64MiB"), lambda line: None)
    requests = [
        request(f"r{i}", text, tenant=str(i), max_tokens=16, sampling=SamplingParams(temperature=0.0))
        for i, text in enumerate(questions)
    ]
    watched = Watched(make_loop(parts, prefill_chunk_tokens=256))
    together = all_at_once(watched, requests)
    finish(watched.loop)
    assert watched.shapes[0][0] > 1
    parts.memory.drop_idle()
    alone = [run(make_loop(parts, prefill_chunk_tokens=256), replace(one, tenant="alone"))[0] for one in requests]
    # a tie between two words may fall either way for one of them (ties.py)
    assert sum(a.text == b.text for a, b in zip(together, alone, strict=True)) >= 3


def test_copies_of_tails_in_a_pass_are_part_of_what_a_step_may_hold(model: Any, rng: np.random.Generator) -> None:
    """Continued conversations bring tails, which a pass over several of them holds twice."""
    parts = make_parts(model, fmt=FORMATS[1])
    loop = make_loop(parts, prefill_chunk_tokens=32)
    openings = [prompt(rng, 60 + i) for i in range(8)]
    run(loop, *(request(f"a{i}", text, max_tokens=1) for i, text in enumerate(openings)))
    peaks: list[tuple[int, float]] = []
    pass_over = loop.runner._runtime.evaluate

    def measured(caches: list[Any]) -> None:
        pass_over(caches)
        held = sum(g.lease.reserved_bytes for g in loop.requests.running if g.lease is not None)
        peaks.append((parts.runtime.totals().total - held, loop.prefill_tokens * parts.runtime.chunk_token_bytes))

    loop.runner._runtime.evaluate = measured  # type: ignore[method-assign]
    run(loop, *(request(f"b{i}", text + text_of([1, 2]), max_tokens=1) for i, text in enumerate(openings)))
    beside = max(beside for beside, _ in peaks)
    assert max(beside - chunk for beside, chunk in peaks) > 0, "no pass has copied a tail: the test shows nothing"
    assert beside <= loop.scratch_bytes
