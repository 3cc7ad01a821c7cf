"""The engine thread: readiness, overload, cancelling, shutdown and death, from other threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.turboserve.engine.fakes import RecordingTelemetry, Sink, make_parts, make_settings, request

from turboserve.engine import engine as engine_module
from turboserve.engine.engine import Build, TurboEngine
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.progress import Progress
from turboserve.engine.protocol import Engine
from turboserve.errors import (
    EngineUnavailableError,
    OverloadedError,
    RequestCancelledError,
    SessionNotFoundError,
    StartupError,
)
from turboserve.messages import DeleteSession, Event, ForkSession, GetSession, ListSessions, UpdateSession
from turboserve.settings import Settings

TIMEOUT_S = 60.0  # generous: only a hang reaches it


@pytest.fixture
def make_engine(model: Any) -> Iterator[Callable[..., TurboEngine]]:
    engines: list[TurboEngine] = []

    def build(settings: Settings, progress: Progress) -> EngineParts:
        return make_parts(model)

    def make(build: Build = build, **settings: Any) -> TurboEngine:
        engine = TurboEngine(make_settings(**settings), build, model_id="random", telemetry=RecordingTelemetry())
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture
def engine(make_engine: Callable[..., TurboEngine]) -> TurboEngine:
    engine = make_engine()
    engine.start()
    engine.wait_until_ready(TIMEOUT_S)
    return engine


def submit(engine: TurboEngine, request_id: str, **options: Any) -> Sink:
    sink = Sink()
    engine.submit(request(request_id, "hello there", **options), sink)
    return sink


def submit_slow(engine: TurboEngine, request_id: str) -> Sink:
    """A request of seconds: its reader holds the engine at every event, so that a busy machine misses nothing."""
    sink = Sink()
    put = sink.put

    def slow_put(event: Event) -> None:
        time.sleep(0.01)
        put(event)

    sink.put = slow_put  # type: ignore[method-assign]
    engine.submit(request(request_id, "hello there", max_tokens=450), sink)
    return sink


def test_who_finds_nothing_running_finds_what_is_held_then(
    engine: TurboEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy is taken in between, as under load; the last event comes before the copy that holds the conversation."""
    monkeypatch.setattr(engine_module, "SNAPSHOT_SHARE", 0.0)
    sink, at_events = Sink(), []
    put = sink.put

    def watching_put(event: Event) -> None:
        at_events.append(engine.stats())
        put(event)

    sink.put = watching_put  # type: ignore[method-assign]
    engine.submit(request("a", "hello there", max_tokens=5), sink)
    assert sink.ended.wait(TIMEOUT_S)
    assert all(stats.num_running + stats.num_waiting for stats in at_events)
    while (stats := engine.stats()).num_running:
        time.sleep(0.002)
    assert stats.kv.total > 0 and len(stats.conversations) == 1


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.002)


def test_it_is_an_engine(engine: Engine) -> None:
    assert engine.unready_reason() is None and engine.model_id == "random" and engine.created > 0


def test_requests_from_many_threads_all_finish(engine: TurboEngine) -> None:
    sinks: list[Sink] = []
    threads = [threading.Thread(target=lambda i=i: sinks.append(submit(engine, f"r{i}"))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(sink.ended.wait(TIMEOUT_S) for sink in sinks)
    assert len({sink.text for sink in sinks}) == 1 and len(sinks[0].text) == 8
    wait_for(lambda: engine.stats().num_running == 0)
    assert engine.stats().num_waiting == 0 and len(engine.stats().conversations) == 1


def test_before_it_is_ready_it_refuses(make_engine: Callable[..., TurboEngine], model: Any) -> None:
    go = threading.Event()

    def build(settings: Settings, progress: Progress) -> EngineParts:
        go.wait(TIMEOUT_S)
        return make_parts(model)

    engine = make_engine(build)
    engine.start()
    assert engine.unready_reason() is not None
    with pytest.raises(EngineUnavailableError) as caught:
        submit(engine, "early")
    assert caught.value.told == "The engine is not ready: the model is still being loaded. Try again in 5 seconds."
    assert engine.stats().num_running == 0
    go.set()
    engine.wait_until_ready(TIMEOUT_S)
    assert submit(engine, "a").ended.wait(TIMEOUT_S)


def test_a_full_queue_refuses_with_retry_after(make_engine: Callable[..., TurboEngine]) -> None:
    engine = make_engine(max_queued=2, max_running=1)
    engine.start()
    engine.wait_until_ready(TIMEOUT_S)
    release, is_stuck = threading.Event(), threading.Event()
    stuck = Sink()
    put = stuck.put

    def slow_put(event: Event) -> None:  # breaks the contract on purpose: holds the engine thread
        is_stuck.set()
        release.wait(TIMEOUT_S)
        put(event)

    stuck.put = slow_put  # type: ignore[method-assign]
    engine.submit(request("stuck", "x"), stuck)
    assert is_stuck.wait(TIMEOUT_S)
    sinks, refused = [], None
    for i in range(5):
        try:
            sinks.append(submit(engine, f"r{i}"))
        except OverloadedError as error:
            refused = error
    assert refused is not None and refused.retry_after_s and refused.code == "server_overloaded"
    assert 1 <= len(sinks) <= 3
    release.set()
    assert all(sink.ended.wait(TIMEOUT_S) for sink in [stuck, *sinks])
    assert submit(engine, "later").ended.wait(TIMEOUT_S)


def test_cancel_ends_a_long_request(engine: TurboEngine) -> None:
    sink = submit_slow(engine, "long")
    wait_for(lambda: len(sink.events) > 2)
    engine.cancel("long")
    assert sink.ended.wait(TIMEOUT_S)
    assert isinstance(sink.error, RequestCancelledError)
    wait_for(lambda: engine.stats().num_running == 0)


def test_session_commands_are_answered_from_any_thread(engine: TurboEngine) -> None:
    assert submit(engine, "a", session_id="mine").ended.wait(TIMEOUT_S)
    assert engine.session(GetSession("", "mine")).result(TIMEOUT_S).tokens > 0
    forked = engine.session(ForkSession("", "mine", "branch")).result(TIMEOUT_S)
    assert (forked.session_id, forked.is_explicit) == ("branch", True)
    pinned = engine.session(UpdateSession("", "branch", is_pinned=True)).result(TIMEOUT_S)
    assert pinned.is_pinned and pinned.ttl_s is None
    page = engine.session(ListSessions("", limit=1)).result(TIMEOUT_S)
    assert len(page.sessions) == 1 and page.has_more
    assert engine.session(DeleteSession("", "mine")).result(TIMEOUT_S) is None
    with pytest.raises(SessionNotFoundError):
        engine.session(GetSession("", "mine")).result(TIMEOUT_S)
    with pytest.raises(SessionNotFoundError):
        engine.session(GetSession("somebody else", "branch")).result(TIMEOUT_S)
    engine.stop()
    with pytest.raises(EngineUnavailableError):
        engine.session(ListSessions("", limit=1)).result(TIMEOUT_S)


def test_stop_lets_requests_finish_and_refuses_new_ones(engine: TurboEngine) -> None:
    sink = submit(engine, "a", max_tokens=40)
    stopping = threading.Thread(target=engine.stop, args=(TIMEOUT_S,))
    stopping.start()
    wait_for(lambda: engine.unready_reason() is not None)
    with pytest.raises(EngineUnavailableError):
        submit(engine, "late")
    stopping.join(TIMEOUT_S)
    assert sink.finished.usage.completion_tokens == 40


def test_stop_without_grace_ends_requests_with_an_error(engine: TurboEngine) -> None:
    sink = submit_slow(engine, "a")
    wait_for(lambda: len(sink.events) > 0)
    engine.stop(0)
    assert isinstance(sink.error, EngineUnavailableError)


def test_a_dead_thread_says_so_and_fails_everyone(engine: TurboEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from turboserve.engine.step_loop import StepLoop

    sinks = [submit_slow(engine, "a"), submit_slow(engine, "b")]
    wait_for(lambda: all(len(s.events) > 0 for s in sinks))

    def broken(self: StepLoop) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(StepLoop, "_prefill", broken)
    assert all(sink.ended.wait(TIMEOUT_S) for sink in sinks)
    assert all(isinstance(sink.error, EngineUnavailableError) for sink in sinks)
    reason = engine.unready_reason()
    assert reason is not None and "died" in reason
    with pytest.raises(EngineUnavailableError):
        submit(engine, "late")
    engine._thread.join(TIMEOUT_S)
    assert engine.stats().num_running == 0


def test_whatever_breaks_nobody_is_left_waiting(engine: TurboEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that run, one in the inbox, a command behind it: the loop is broken, and so is ending its requests."""
    from turboserve.engine.step_loop import StepLoop

    sinks = [submit_slow(engine, "a")]
    wait_for(lambda: len(sinks[0].events) > 0)

    def broken(self: StepLoop, *args: object) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(StepLoop, "fail_all", broken)
    monkeypatch.setattr(StepLoop, "cancel", broken)
    with engine._changed:  # all of it comes at once
        engine.cancel("a")
        sinks.append(submit(engine, "b"))
        answer = engine.session(ListSessions("", 10))
    assert all(sink.ended.wait(TIMEOUT_S) for sink in sinks)
    assert all(isinstance(sink.error, EngineUnavailableError) for sink in sinks)
    assert isinstance(answer.exception(TIMEOUT_S), EngineUnavailableError)


@pytest.mark.parametrize(
    ("error", "told"), [(StartupError("no such model"), "no such model"), (RuntimeError("a bug"), "RuntimeError.*log")]
)
def test_a_failing_start_is_reported(make_engine: Callable[..., TurboEngine], error: Exception, told: str) -> None:
    def build(settings: Settings, progress: Progress) -> EngineParts:
        raise error

    engine = make_engine(build)
    engine.start()
    with pytest.raises(StartupError, match=told):
        engine.wait_until_ready(TIMEOUT_S)
    assert engine.unready_reason() is not None
