"""Prompts are read beside the engine: what is long, hostile or stuck costs its own caller alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.turboserve.engine.fakes import RecordingTelemetry, Sink, make_parts, make_settings, request
from tests.turboserve.engine.tools import templates

from turboserve.engine import engine as engine_module
from turboserve.engine.engine import TurboEngine
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.progress import Progress
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.template import ChatTemplate
from turboserve.engine.template_process import Patience, TemplateProcess
from turboserve.errors import ContextLengthError, InvalidRequestError, RequestCancelledError
from turboserve.messages import Failed, Request, Tokenize, ToolUse
from turboserve.settings import Settings

TIMEOUT_S = 60.0  # generous: only a hang reaches it

LOOP = "{% for _ in range(99999) %}"
NESTED_LOOPS = 3 * LOOP + 3 * "{% endfor %}" + "x"
HOSTILE = {
    "nested loops": NESTED_LOOPS,
    "output without end": "{% for a in range(99999) %}{% for b in range(99999) %}"
    + "x" * 1000
    + "{% endfor %}{% endfor %}",
    "270 MB": "{% for a in range(27000) %}" + "x" * 10_000 + "{% endfor %}",
    "terabytes": "{{ 'x' * 1000000000000 }}",
    "doubling": "{% set n = namespace(s='x') %}" + LOOP + "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "padding": "{{ 'x'.ljust(9999999999) }}",
}


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


@pytest.mark.parametrize("name", [name for name in vars(templates) if name.isupper() and name != "EMBEDDED_DIR"])
def test_a_process_renders_what_the_tokenizer_would(process: TemplateProcess, name: str) -> None:
    tokenizer = templates.tokenizer_with(getattr(templates, name))
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    asked = Request(
        "r",
        (
            {"role": "system", "content": "Be brief 😀"},
            {"role": "user", "content": "<|im_end|>hi"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": "call_1", "content": "5"},
        ),
        tools=ToolUse((tool,)),
        template_kwargs={"enable_thinking": True},
    )

    def read(template: ChatTemplate) -> object:
        try:
            return template.prompt_of(asked)
        except InvalidRequestError as exc:
            return exc.message

    assert read(ChatTemplate(tokenizer, process)) == read(ChatTemplate(tokenizer))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_its_time(process: TemplateProcess, name: str) -> None:
    tokenizer = templates.tokenizer_with(HOSTILE[name])
    ChatTemplate(templates.tokenizer_with(templates.QWEN), process).encode([{"role": "user", "content": "x"}])
    began_s = time.monotonic()
    with pytest.raises(InvalidRequestError):
        ChatTemplate(tokenizer, process, max_chars=1 << 20).prompt_of(
            Request("r", ({"role": "user", "content": "x"},)), patience=Patience(1.0)
        )
    assert time.monotonic() - began_s < 10
    ids = ChatTemplate(templates.tokenizer_with(templates.QWEN), process).encode([{"role": "user", "content": "x"}])
    assert ids  # the next one is rendered again


def test_a_caller_who_leaves_ends_the_rendering(process: TemplateProcess) -> None:
    began_s, template = time.monotonic(), ChatTemplate(templates.tokenizer_with(NESTED_LOOPS), process)
    with pytest.raises(RequestCancelledError):
        template.prompt_of(
            Request("r", ({"role": "user", "content": "x"},)),
            patience=Patience(TIMEOUT_S, lambda: time.monotonic() - began_s > 0.3),
        )
    assert time.monotonic() - began_s < 30


# --- in the engine


@pytest.fixture
def start(model: Any) -> Iterator[Callable[..., TurboEngine]]:
    engines: list[TurboEngine] = []

    def make(**settings: Any) -> TurboEngine:
        def build(settings: Settings, progress: Progress) -> EngineParts:
            return make_parts(model)

        engine = TurboEngine(make_settings(**settings), build, model_id="random", telemetry=RecordingTelemetry())
        engines.append(engine)
        engine.start()
        engine.wait_until_ready(TIMEOUT_S)
        return engine

    yield make
    for engine in engines:
        engine.stop()


def submit(engine: TurboEngine, request_id: str, text: str = "hello there", **options: Any) -> Sink:
    sink = Sink()
    engine.submit(request(request_id, text, **options), sink)
    return sink


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reading a prompt with "slow" in it takes until this is set, or nobody waits for it."""
    go, original = threading.Event(), StepLoop.read_prompt

    def read(self: StepLoop, asked: Request, patience: Patience) -> object:
        while "slow" in str(asked.messages) and not go.is_set():
            patience.check()
            time.sleep(0.01)
        return original(self, asked, patience)

    monkeypatch.setattr(StepLoop, "read_prompt", read)
    yield go
    go.set()


def test_streams_go_on_while_a_prompt_is_read(start: Callable[..., TurboEngine], held: threading.Event) -> None:
    engine = start()
    running = submit(engine, "running", max_tokens=300)
    slow = submit(engine, "slow", "slow")
    assert running.ended.wait(TIMEOUT_S) and len(running.text) == 300
    assert not slow.ended.is_set() and engine.stats().num_waiting == 1
    held.set()
    assert slow.ended.wait(TIMEOUT_S) and slow.text


def test_a_prompt_that_is_read_is_cancelled_with_its_client(
    start: Callable[..., TurboEngine], held: threading.Event
) -> None:
    engine = start()
    slow = submit(engine, "slow", "slow")
    behind = submit(engine, "behind")
    time.sleep(0.1)
    engine.cancel("slow")
    assert slow.ended.wait(TIMEOUT_S) and behind.ended.wait(TIMEOUT_S)
    assert isinstance(slow.events[-1], Failed) and slow.events[-1].error.code == "request_cancelled"
    assert behind.text


def test_a_prompt_that_takes_too_long_is_refused(start: Callable[..., TurboEngine], held: threading.Event) -> None:
    engine = start(prompt_timeout_s=0.3)
    slow = submit(engine, "slow", "slow")
    assert slow.ended.wait(TIMEOUT_S)
    assert isinstance(slow.events[-1], Failed) and "takes over 0.3 s" in str(slow.events[-1].error)
    assert submit(engine, "next").ended.wait(TIMEOUT_S)


def test_short_prompts_are_read_before_long_ones(
    start: Callable[..., TurboEngine], held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, read = [], StepLoop.read_prompt

    def noting(self: StepLoop, asked: Request, patience: Patience) -> object:
        order.append(asked.request_id)
        return read(self, asked, patience)

    monkeypatch.setattr(StepLoop, "read_prompt", noting)
    engine = start()
    slow = submit(engine, "slow", "slow")
    while not order:
        time.sleep(0.001)
    long, short = submit(engine, "long", "word " * 100_000), submit(engine, "short")
    held.set()
    assert all(sink.ended.wait(TIMEOUT_S) for sink in (slow, long, short))
    assert order == ["slow", "short", "long"]
    assert isinstance(long.events[-1], Failed) and isinstance(long.events[-1].error, ContextLengthError)


def test_the_end_comes_to_all_that_is_being_read(start: Callable[..., TurboEngine], held: threading.Event) -> None:
    engine = start()
    slow = submit(engine, "slow", "slow")
    question = engine.ask(Tokenize(request("q", "x")))
    time.sleep(0.05)
    assert engine.stop()
    assert slow.ended.wait(TIMEOUT_S) and isinstance(slow.events[-1], Failed)
    assert question.exception(TIMEOUT_S) is not None


def test_a_stuck_step_is_told_and_given_up(start: Callable[..., TurboEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    go, original = threading.Event(), StepLoop.step

    def stuck(self: StepLoop) -> None:
        go.wait(TIMEOUT_S)
        original(self)

    engine = start(stuck_step_s=0.2)
    assert engine.unready_reason() is None
    time.sleep(0.4)
    assert engine.unready_reason() is None  # idle, however long
    monkeypatch.setattr(StepLoop, "step", stuck)
    monkeypatch.setattr(engine_module, "END_S", 0.3)
    sink = submit(engine, "r")
    deadline = time.monotonic() + TIMEOUT_S
    while (reason := engine.unready_reason()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "one step" in reason
    began_s = time.monotonic()
    assert not engine.stop() and time.monotonic() - began_s < 10
    go.set()
    assert sink.ended.wait(TIMEOUT_S)
