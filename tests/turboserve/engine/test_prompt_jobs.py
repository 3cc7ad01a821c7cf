"""Prompts are read beside the engine: what is long, hostile or stuck costs its own caller alone."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.turboserve.engine.fakes import RecordingTelemetry, Sink, make_parts, make_settings, request
from tests.turboserve.engine.tools import templates

from turboserve.engine import engine as engine_module
from turboserve.engine import template_process
from turboserve.engine.engine import TurboEngine
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.progress import Progress
from turboserve.engine.prompt_texts import LONG_CHARS, is_long
from turboserve.engine.step_loop import StepLoop
from turboserve.engine.template import ChatTemplate
from turboserve.engine.template_process import Patience, TemplateProcess
from turboserve.errors import (
    ContextLengthError,
    EngineUnavailableError,
    InvalidRequestError,
    RequestCancelledError,
)
from turboserve.logs import JsonFormatter
from turboserve.messages import Embed, Failed, Request, TextQuestion, Tokenize, ToolUse
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
    assert time.monotonic() - began_s < TIMEOUT_S
    ids = ChatTemplate(templates.tokenizer_with(templates.QWEN), process).encode([{"role": "user", "content": "x"}])
    assert ids  # the next one is rendered again


def test_a_caller_who_leaves_ends_the_rendering(process: TemplateProcess) -> None:
    began_s, template = time.monotonic(), ChatTemplate(templates.tokenizer_with(NESTED_LOOPS), process)
    with pytest.raises(RequestCancelledError):
        template.prompt_of(
            Request("r", ({"role": "user", "content": "x"},)),
            patience=Patience(TIMEOUT_S, lambda: time.monotonic() - began_s > 0.3),
        )
    assert time.monotonic() - began_s < TIMEOUT_S / 2


USUAL_SCRIPT = template_process.SCRIPT
AS_USUAL = "exec(open({script!r}).read())"
READY_LATE = "import time; time.sleep(4); " + AS_USUAL
HANGS = "import time; time.sleep(99)"
ENDS = "import sys; sys.exit(3)"
HI = Request("r", ({"role": "user", "content": "x"},))


class AnotherProgram:
    """A process that runs another program in place of the one that renders; `pid` once it runs."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        self.process = TemplateProcess()

    def run(self, program: str) -> TemplateProcess:
        first = f"import os; open({str(self._folder / 'pid')!r}, 'w').write(str(os.getpid())); "
        script = self._folder / "script.py"
        script.write_text(first + program.format(script=str(USUAL_SCRIPT)))
        self._monkeypatch.setattr(template_process, "SCRIPT", script)
        self.process.start()
        return self.process

    @property
    def pid(self) -> int:
        deadline = time.monotonic() + TIMEOUT_S
        while not (text := (self._folder / "pid").read_text() if (self._folder / "pid").exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return int(text)


@pytest.fixture
def another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnotherProgram]:
    program = AnotherProgram(tmp_path, monkeypatch)
    yield program
    program.process.close()


def test_the_time_of_a_prompt_begins_when_the_process_is_there(another: AnotherProgram) -> None:
    tokenizer = templates.tokenizer_with("{{ messages[0].content }} is rendered")
    prompt = ChatTemplate(tokenizer, another.run(READY_LATE)).prompt_of(HI, patience=Patience(3.0))
    assert prompt.text == "x is rendered"


def test_a_start_that_hangs_is_ended_and_not_the_prompts_fault(
    another: AnotherProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, pid = another.run(HANGS), another.pid
    monkeypatch.setattr(template_process, "START_TIMEOUT_S", 0.3)
    with pytest.raises(EngineUnavailableError, match=r"did not start in 0\.3 s"):
        ChatTemplate(templates.tokenizer_with(templates.QWEN), process).prompt_of(HI, patience=Patience(0.1))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_caller_who_leaves_does_not_wait_for_the_start(another: AnotherProgram) -> None:
    template = ChatTemplate(templates.tokenizer_with(templates.QWEN), another.run(HANGS))
    with pytest.raises(RequestCancelledError):
        template.prompt_of(HI, patience=Patience(TIMEOUT_S, lambda: True))


def test_a_process_that_ends_at_its_start_is_told_from_one_that_is_closed(another: AnotherProgram) -> None:
    template = ChatTemplate(templates.tokenizer_with(NESTED_LOOPS), another.run(ENDS))
    with pytest.raises(EngineUnavailableError, match=r"ended while it started \(status 3\)"):
        template.prompt_of(HI)
    another.process.close()
    with pytest.raises(EngineUnavailableError, match="shutting down"):
        template.prompt_of(HI)


def test_what_a_template_expects_is_not_learnt_from_a_start_that_hangs(
    another: AnotherProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = templates.tokenizer_with(templates.QWEN)
    with monkeypatch.context() as patched:
        template = ChatTemplate(tokenizer, another.run(HANGS))
        patched.setattr(template_process, "START_TIMEOUT_S", 0.1)
        template.try_out()
    another.run(AS_USUAL)
    assert template.dialect == ChatTemplate(tokenizer).dialect


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_process_that_dies_at_work_is_told_from_one_that_is_closed(another: AnotherProgram, is_killed: bool) -> None:
    process, began = another.run(AS_USUAL), threading.Event()

    def has_left() -> bool:
        began.set()
        return False

    ChatTemplate(templates.tokenizer_with(templates.QWEN), process).prompt_of(HI)
    template = ChatTemplate(templates.tokenizer_with(NESTED_LOOPS), process)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(template.prompt_of, HI, patience=Patience(TIMEOUT_S, has_left))
        assert began.wait(TIMEOUT_S)
        if is_killed:
            os.kill(another.pid, signal.SIGKILL)
        else:
            process.close()
        error = reading.exception(TIMEOUT_S)
    assert isinstance(error, InvalidRequestError if is_killed else EngineUnavailableError)
    assert ("its process ended (SIGKILL)" if is_killed else "shutting down") in error.message


def test_long_prompts_are_told_by_all_their_text(rng: np.random.Generator) -> None:
    """Keys and ids count, whatever they are in."""
    few, many = (
        LONG_CHARS - int(rng.integers(50, 1000)),
        LONG_CHARS + int(rng.integers(1, 1000)),
    )
    for num, expected in ((few, False), (many, True)):
        split = int(rng.integers(1, num))
        two = ("a" * split, "b" * (num - split))
        ids = tuple(int(i) for i in rng.integers(0, 99, num))
        schema = {"type": "object", "properties": {two[0]: [{"enum": [1, True, None, two[1]]}]}}
        asked: list[Request | TextQuestion] = [
            Request("r", prompt=two[0] + two[1]),
            Request("r", prompt=ids),
            Request("r", ({two[0]: two[1]},)),
            Request("r", tools=ToolUse((schema,))),
            Tokenize(Request("r", ({"content": [{"text": two[0]}, two[1]]},))),
            Embed(two),
            Embed((two[0], ids[split:])),
        ]
        assert [is_long(one) for one in asked] == [expected] * len(asked)


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
    assert not engine.stop() and time.monotonic() - began_s < TIMEOUT_S / 2
    go.set()
    assert sink.ended.wait(TIMEOUT_S)


@pytest.mark.parametrize("asked", [False, True])
def test_texts_are_logged_where_the_operator_asks_for_it(
    start: Callable[..., TurboEngine], asked: bool, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """Of requests under their ids, of embeddings each input; not one letter of them otherwise, at any level."""
    words = [f"w{rng.integers(1 << 40):x}" for _ in range(3)]
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.getLogger("turboserve").addHandler(handler)
    try:
        with caplog.at_level("DEBUG", logger="turboserve"):
            engine = start(log_prompts=asked)
            assert submit(engine, "chat-1", words[0]).ended.wait(TIMEOUT_S)
            engine.ask(Embed((words[1], words[2]))).result(TIMEOUT_S)
            engine.stop()
    finally:
        logging.getLogger("turboserve").removeHandler(handler)
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = [(record.get("request_id"), record["prompt"]) for record in records if "prompt" in record]
    assert told == ([("chat-1", "u" + words[0]), (None, words[1]), (None, words[2])] if asked else [])
    assert any(word in stream.getvalue() + caplog.text for word in words) == asked
