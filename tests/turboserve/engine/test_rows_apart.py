"""Models whose batches are wrong or raise, through the whole step loop: each request gets what it gets alone."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import qwen2
from tests.turboquant_kv import odd_models
from tests.turboserve.engine.fakes import GREEDY, VOCAB, make_loop, make_parts, make_settings, request, run, text_of
from tests.turboserve.engine.ties import assert_same_answer

from turboquant_kv.cache.rows_apart import RowsApart
from turboquant_kv.codec.format import KVFormat
from turboserve.engine.engine import TurboEngine
from turboserve.engine.runner import MOST_FAILED_BATCHES
from turboserve.errors import StartupError

FORMAT = KVFormat(4, 4, page_tokens=16, sink_tokens=8, centred=False)
SERVED = [
    ("reusing", None),
    ("absolute", None),
    ("absolute", FORMAT),
    ("chunked", None),
    ("chunked", FORMAT),
]
RUNNER_LOGS = {"turboserve.engine.runner", "turboserve.engine.prompt_passes"}


def random_requests(rng: np.random.Generator, lengths: tuple[int, ...], max_tokens: int = 12) -> list[Any]:
    prompts = [text_of([int(t) for t in rng.integers(0, VOCAB, n)]) for n in lengths]
    return [request(str(i), text, max_tokens=max_tokens, sampling=GREEDY) for i, text in enumerate(prompts)]


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize(("kind", "fmt"), SERVED)
def test_requests_at_the_same_time_are_answered_as_alone(
    kind: str, fmt: Any, overlap: str, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    parts = make_parts(odd_models.EVERY_KIND[kind](), fmt=fmt)
    loop = make_loop(parts, overlap=overlap)
    requests = random_requests(rng, (5, 60, 33))
    together = [sink.tokens for sink in run(loop, *requests)]
    for one, tokens in zip(requests, together, strict=True):
        alone = run(make_loop(make_parts(parts.loaded.model, fmt=fmt)), one)[0].tokens
        assert_same_answer(parts, one.messages[0]["content"], tokens, alone)
    stats = loop.snapshot()
    assert stats.rows_apart and stats.details["batching"].startswith("one by one (")
    warnings = [r for r in caplog.records if r.name in RUNNER_LOGS and r.levelno >= logging.WARNING]
    assert len(warnings) == 1 + len(requests) and not any(r.exc_info for r in warnings)  # one a loop, without traceback
    parts.memory.check_integrity()


def test_models_whose_batches_are_right_keep_them(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    loop = make_loop(make_parts(model, fmt=FORMAT))
    assert loop.runner.apart is None and loop.runner.prompts.can_feed_together
    stats = loop.snapshot()
    assert not stats.rows_apart and stats.details["batching"] == "together"
    assert not [r for r in caplog.records if r.name in RUNNER_LOGS]


def test_a_conversation_over_chunks_goes_on(rng: np.random.Generator) -> None:
    """Chunks exist at their end only: a follow-up finds them, a branch does not."""
    parts = make_parts(odd_models.chunked(), fmt=FORMAT)
    loop = make_loop(parts)
    opening = text_of([int(t) for t in rng.integers(0, VOCAB, 60)])
    first = run(loop, request("1", opening, max_tokens=6))[0]
    follow_up = opening + first.text + text_of([int(t) for t in rng.integers(0, VOCAB, 20)])
    second = run(loop, request("2", follow_up, max_tokens=6))[0]
    assert second.finished.usage.cached_tokens > 60
    branch = run(loop, request("3", opening + text_of([1, 2, 3]), max_tokens=2))[0]
    assert branch.finished.usage.cached_tokens == 0


@pytest.mark.parametrize("fmt", [None, FORMAT])
def test_reservations_cover_chunks(fmt: Any, rng: np.random.Generator) -> None:
    parts = make_parts(odd_models.chunked(), fmt=fmt)
    loop = make_loop(parts)
    one_chunk = loop.scratch_bytes
    sinks = run(loop, *random_requests(rng, (1, 30, 300), max_tokens=40))
    assert all(sink.finished for sink in sinks)
    runtime = parts.runtime
    for length in (1, 15, 16, 17, 300, 511):
        caches = runtime.make_cache()
        for start in range(0, length, 16):
            parts.loaded.model(mx.array([[1] * min(16, length - start)]), cache=caches)
            runtime.evaluate(caches)
        assert runtime.measure(caches).total <= runtime.bytes_for(length) + one_chunk
        runtime.release(caches)


@pytest.fixture
def failing_batches(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Batches of four rows and more raise, which the trial at start does not see; counts how many did."""
    seen, whole = {"decode": 0, "prefill": 0}, qwen2.Attention.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        if x.shape[0] > 3:
            seen["prefill" if x.shape[1] > 1 else "decode"] += 1
            raise ValueError("injected")
        return whole(self, x, mask, cache)

    monkeypatch.setattr(qwen2.Attention, "__call__", call)
    return seen


@pytest.mark.parametrize(("overlap", "speculate"), [("off", "off"), ("on", "off"), ("off", "lookup")])
@pytest.mark.parametrize("fmt", [None, FORMAT])
def test_a_batch_that_fails_again_and_again_is_not_tried_any_more(
    model: Any,
    fmt: Any,
    overlap: str,
    speculate: str,
    failing_batches: dict[str, int],
    rng: np.random.Generator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts = make_parts(model, fmt=fmt)
    loop = make_loop(parts, overlap=overlap, speculate=speculate)
    assert loop.runner.apart is None
    requests = random_requests(rng, (9, 9, 10, 10), max_tokens=20)
    together = [sink.tokens for sink in run(loop, *requests)]
    assert loop.runner.apart is not None and not loop.runner.prompts.can_feed_together
    assert failing_batches["decode"] <= 2 * MOST_FAILED_BATCHES  # with overlap each is tried twice
    assert [r.message for r in caplog.records if "from now on" in r.message and "one by one" in r.message]
    for one, tokens in zip(requests, together, strict=True):
        alone = run(make_loop(make_parts(model, fmt=fmt)), one)[0].tokens
        assert_same_answer(parts, one.messages[0]["content"], tokens, alone)
    caplog.clear()
    again = run(loop, *random_requests(rng, (9, 9, 10, 10), max_tokens=20))
    assert all(len(sink.tokens) == 20 for sink in again)
    assert loop.runner.speculation is None and loop.speculation_line.startswith("off (")
    assert not [r for r in caplog.records if r.exc_info]
    parts.memory.check_integrity()


def test_batches_that_fail_now_and_then_stay(
    model: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, whole, calls = make_loop(make_parts(model)), qwen2.Attention.__call__, [0]

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        if x.shape[0] > 1 and self is model.layers[0].self_attn:
            calls[0] += 1
            if calls[0] % 2:
                raise ValueError("injected")
        return whole(self, x, mask, cache)

    monkeypatch.setattr(qwen2.Attention, "__call__", call)
    run(loop, *random_requests(rng, (5, 5), max_tokens=20))
    assert calls[0] > 4 and loop.runner.apart is None


def test_a_row_that_fails_among_rows_apart_is_the_only_one(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = odd_models.absolute()
    parts = make_parts(model, fmt=FORMAT)
    loop = make_loop(parts)
    requests = random_requests(rng, (20, 30, 40))
    attention = type(model.layers[0].attn)
    whole = attention.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        if self is model.layers[1].attn and x.shape[1] == 1 and cache is not None and cache.offset == 36:
            raise ValueError("injected")  # in the middle of the second request's answer
        return whole(self, x, mask, cache)

    monkeypatch.setattr(attention, "__call__", call)
    sinks = run(loop, *requests)
    assert sinks[1].error.status == 500
    for i in (0, 2):
        alone = run(make_loop(make_parts(model, fmt=FORMAT)), requests[i])[0].tokens
        assert_same_answer(parts, requests[i].messages[0]["content"], sinks[i].tokens, alone)
    parts.memory.check_integrity()


def test_rows_apart_are_what_the_runner_holds() -> None:
    loop = make_loop(make_parts(odd_models.reusing()))
    assert all(isinstance(cache, RowsApart) for cache in loop.runner._merge([loop._parts.runtime.make_cache()]))


def test_a_model_that_cannot_compute_a_token_is_one_line(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make_parts(model)
    monkeypatch.setattr(qwen2.Attention, "__call__", lambda *args, **options: 1 / 0)
    with pytest.raises(StartupError, match=r"cannot compute a token \(ZeroDivisionError\)"):
        make_loop(parts)


@pytest.mark.parametrize("is_odd", [True, False])
def test_start_up_says_it_once(model: Any, is_odd: bool) -> None:
    lines: list[str] = []
    served = odd_models.reusing() if is_odd else model
    engine = TurboEngine(make_settings(), lambda *_: make_parts(served), model_id="odd", progress=lines.append)
    engine.start()
    try:
        engine.wait_until_ready(60)
        assert engine.stats().rows_apart == is_odd
    finally:
        engine.stop()
    told = [line for line in lines if line.startswith("batching")]
    assert len(told) == is_odd and all("one by one (" in line for line in told)
