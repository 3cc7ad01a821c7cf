"""Requests whose rules are being made: counted, cancelled, refused in time, ended with the engine. Rules are fakes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.turboserve.engine.fakes import RecordingTelemetry, Sink, make_parts, make_settings, request

from turboserve.engine import engine as engine_module
from turboserve.engine import rule_jobs
from turboserve.engine.engine import TurboEngine
from turboserve.errors import (
    EngineFailureError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
)
from turboserve.messages import Constraint, Request

TIMEOUT_S = 60.0  # generous: only a hang reaches it
LONG_S = 30.0


class Maker:
    """Makes rules when it is told to, or raises."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.began: list[str] = []
        self.ended: list[str] = []
        self.error: Exception | None = None
        self.is_closed = False

    def prepare(self) -> None: ...

    def rule_of(self, request: Request, timeout_s: float, began: Callable[[], None]) -> None:
        began()
        self.began.append(request.request_id)
        try:
            if not request.request_id.startswith("easy"):
                self.go.wait(TIMEOUT_S)
            if self.error is not None:
                raise self.error
        finally:
            self.ended.append(request.request_id)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
    maker = Maker()
    monkeypatch.setattr(engine_module, "RuleMaker", lambda loaded, vocab_len: maker)
    yield maker
    maker.go.set()


@pytest.fixture
def make_engine(model: Any, maker: Maker) -> Iterator[Callable[..., TurboEngine]]:
    engines: list[TurboEngine] = []

    def make(**settings: Any) -> TurboEngine:
        settings = {"grammar_timeout_s": LONG_S, **settings}
        engine = TurboEngine(
            make_settings(**settings),
            lambda settings, progress: make_parts(model),
            model_id="random",
            telemetry=RecordingTelemetry(),
        )
        engines.append(engine)
        engine.start()
        engine.wait_until_ready(TIMEOUT_S)
        return engine

    yield make
    maker.go.set()
    for engine in engines:
        engine.stop()


def submit(engine: TurboEngine, request_id: str, *, is_constrained: bool = True) -> Sink:
    sink = Sink()
    asked = request(request_id, "hello there")
    engine.submit(replace(asked, constraint=Constraint("regex", "a", "guided")) if is_constrained else asked, sink)
    return sink


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.002)


def calls(engine: TurboEngine) -> list[tuple[str, object]]:
    assert isinstance(engine._telemetry, RecordingTelemetry)
    return [call for call in engine._telemetry.calls if call[0] != "prompt"]


def test_others_are_answered_while_a_rule_is_made(make_engine: Callable[..., TurboEngine], maker: Maker) -> None:
    engine = make_engine()
    hard = submit(engine, "hard")
    assert submit(engine, "free", is_constrained=False).ended.wait(TIMEOUT_S)
    assert submit(engine, "easy").ended.wait(TIMEOUT_S)
    assert not hard.events and engine.stats().num_waiting == 1
    maker.go.set()
    assert hard.ended.wait(TIMEOUT_S) and hard.finished.usage.completion_tokens == 8
    wait_for(lambda: engine.stats().num_waiting == 0)


def test_a_rule_that_cannot_be_made_ends_its_request(make_engine: Callable[..., TurboEngine], maker: Maker) -> None:
    engine = make_engine()
    maker.error = InvalidRequestError("no such keyword", param="guided")
    sink = submit(engine, "easy")
    assert sink.ended.wait(TIMEOUT_S)
    assert sink.error is maker.error and len(sink.events) == 1
    maker.error = ZeroDivisionError("a bug")
    sink = submit(engine, "easy too")
    assert sink.ended.wait(TIMEOUT_S) and isinstance(sink.error, EngineFailureError)
    wait_for(lambda: engine.stats().num_waiting == 0)
    assert calls(engine) == [("refused", "invalid_request"), ("refused", "engine_failure")]


def test_a_rule_that_takes_too_long_is_refused_in_time(make_engine: Callable[..., TurboEngine], maker: Maker) -> None:
    engine = make_engine(grammar_timeout_s=0.2)
    began_s = time.monotonic()
    sinks = [submit(engine, "a"), submit(engine, "b")]
    assert all(sink.ended.wait(TIMEOUT_S) for sink in sinks)
    assert 0.2 <= time.monotonic() - began_s < LONG_S
    assert all(isinstance(sink.error, InvalidRequestError) and sink.error.param == "guided" for sink in sinks)
    maker.go.set()
    wait_for(lambda: sorted(maker.ended) == ["a", "b"])
    assert submit(engine, "easy").ended.wait(TIMEOUT_S)
    assert [len(sink.events) for sink in sinks] == [1, 1]


def test_who_waits_behind_others_for_too_long_may_come_back(
    make_engine: Callable[..., TurboEngine], maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule_jobs, "MAX_QUEUED_S", 0.2)
    engine = make_engine()
    sinks = [submit(engine, f"r{i}") for i in range(2)]
    wait_for(lambda: len(maker.began) == 2)
    sinks.append(submit(engine, "r2"))
    assert sinks[2].ended.wait(TIMEOUT_S)
    assert isinstance(sinks[2].error, OverloadedError) and sinks[2].error.retry_after_s
    maker.go.set()
    assert all(sink.ended.wait(TIMEOUT_S) and sink.finished for sink in sinks[:2])
    assert sorted(maker.began) == ["r0", "r1"]


def test_cancelling_ends_it_once(make_engine: Callable[..., TurboEngine], maker: Maker) -> None:
    engine = make_engine()
    sinks = [submit(engine, f"r{i}") for i in range(3)]  # the third is not begun
    wait_for(lambda: len(maker.began) == 2)
    engine.cancel("r2")
    engine.cancel("r0")
    engine.cancel("r0")
    assert sinks[0].ended.wait(TIMEOUT_S) and sinks[2].ended.wait(TIMEOUT_S)
    assert all(isinstance(sinks[i].error, RequestCancelledError) for i in (0, 2))
    maker.go.set()
    assert sinks[1].ended.wait(TIMEOUT_S) and sinks[1].finished
    wait_for(lambda: sorted(maker.ended) == ["r0", "r1"])
    assert submit(engine, "easy").ended.wait(TIMEOUT_S)
    assert [len(sinks[i].events) for i in (0, 2)] == [1, 1]
    assert calls(engine).count(("cancelled", "queued")) == 2


def test_the_queue_counts_them(make_engine: Callable[..., TurboEngine], maker: Maker) -> None:
    engine = make_engine(max_queued=2, max_running=1)
    sinks = [submit(engine, f"r{i}") for i in range(3)]
    for is_constrained in (True, False):
        with pytest.raises(OverloadedError):
            submit(engine, "too many", is_constrained=is_constrained)
    maker.go.set()
    assert all(sink.ended.wait(TIMEOUT_S) and sink.finished for sink in sinks)


def test_stopping_lets_them_finish_or_ends_them(make_engine: Callable[..., TurboEngine], maker: Maker) -> None:
    engine = make_engine()
    sink = submit(engine, "a")
    stopping = threading.Thread(target=engine.stop, args=(TIMEOUT_S,))
    stopping.start()
    wait_for(lambda: engine.unready_reason() is not None)
    assert not sink.ended.wait(0.05)
    maker.go.set()
    stopping.join(TIMEOUT_S)
    assert sink.finished and maker.is_closed

    maker.go.clear()
    engine = make_engine()
    sinks = [submit(engine, f"r{i}") for i in range(3)]
    wait_for(lambda: len(maker.began) == 3)
    engine.stop(0)
    assert all(isinstance(sink.error, EngineUnavailableError) for sink in sinks)
    maker.go.set()
    wait_for(lambda: len(maker.ended) == 3)
    assert [len(sink.events) for sink in sinks] == [1, 1, 1] and "r2" not in maker.began


def test_a_dead_engine_ends_them(
    make_engine: Callable[..., TurboEngine], maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turboserve.engine.step_loop import StepLoop

    engine = make_engine()
    sink = submit(engine, "a")

    def broken(self: StepLoop) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(StepLoop, "_prefill", broken)
    free = submit(engine, "b", is_constrained=False)
    assert sink.ended.wait(TIMEOUT_S) and free.ended.wait(TIMEOUT_S)
    assert isinstance(sink.error, EngineUnavailableError)
    with pytest.raises(EngineUnavailableError):
        submit(engine, "late")


def test_a_tokenizer_that_cannot_be_constrained_refuses_constraints_alone(model: Any) -> None:
    engine = TurboEngine(make_settings(), lambda settings, progress: make_parts(model), model_id="random")
    engine.start()
    engine.wait_until_ready(TIMEOUT_S)
    try:
        sink = submit(engine, "a")
        assert sink.ended.wait(TIMEOUT_S)
        assert sink.error.code == "unsupported_parameter" and sink.error.param == "guided"
        free = submit(engine, "b", is_constrained=False)
        assert free.ended.wait(TIMEOUT_S) and free.finished
    finally:
        engine.stop()
