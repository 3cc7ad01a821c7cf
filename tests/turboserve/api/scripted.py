"""An engine without a model: one real thread that plays scripts chosen by the last message's text.

Implements the Engine protocol strictly (every request ends exactly once, cancels take effect at the
next step), so that the HTTP layer meets the timing of the real one.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from tests.turboserve.api.scripted_answers import ANSWERS
from tests.turboserve.api.scripted_sessions import KV, ScriptedSessions

from turboserve.engine.protocol import EventSink
from turboserve.errors import (
    ContextLengthError,
    EngineFailureError,
    EngineUnavailableError,
    OverloadedError,
    RequestCancelledError,
)
from turboserve.messages import (
    AdmissionStats,
    CacheEvents,
    ConversationStats,
    Detokenize,
    DiskStatus,
    Embed,
    Embeddings,
    EngineStats,
    Event,
    Failed,
    FillInMiddle,
    Finished,
    KernelTrial,
    MiddlePrompt,
    ReasoningDelta,
    RenderTemplate,
    Request,
    SamplingParams,
    TextDelta,
    TextQuestion,
    Tokenize,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)

USAGE = Usage(prompt_tokens=12, completion_tokens=3, cached_tokens=8, kv=KV, kv_format="4/3", session_id="c1")
MODEL_ID = "scripted/model"
STEP_S = 0.002
WAIT_S = 60.0  # for what must come about: generous, so that only a hang reaches it

Script = Iterator[Event | None]  # None: a step in which this request has nothing to say


def hello() -> Script:
    for word in ("Hello", ", ", "world"):
        yield TextDelta(word)
    yield Finished("stop", USAGE)


def echo(text: str) -> Script:
    """Repeats the caller's words, a few at a time."""
    for word in text.split():
        yield TextDelta(word + " ")
    yield Finished("stop", USAGE)


def calls() -> Script:
    """Some text, then two calls, the first one's arguments in pieces that are no JSON by themselves."""
    yield TextDelta("Let me look.")
    yield ToolCallDelta(0, "call_a", "get_weather")
    for piece in ('{"city": "Z', "ü", 'rich"}'):
        yield ToolCallDelta(0, arguments=piece)
    yield None
    yield ToolCallDelta(1, "call_b", "get_time", "{}")
    yield Finished("tool_calls", USAGE)


def one_call() -> Script:
    """Nothing but a call, which arrives at once."""
    yield ToolCallDelta(0, "call_a", "get_weather", '{"city": "Bern"}')
    yield Finished("tool_calls", USAGE)


def thoughts() -> Script:
    for word in ("Well, ", "hm."):
        yield ReasoningDelta(word)
    yield TextDelta("Yes")
    yield Finished("stop", replace(USAGE, completion_tokens=5, reasoning_tokens=4))


LIKELY = (
    TokenLogprob("Hé", "Hé".encode(), -0.25, 7, (TokenLogprob("Hé", "Hé".encode(), -0.25, 7),)),
    TokenLogprob("", b"\xf0\x9f", -1.5, 8, (TokenLogprob("", b"\xf0\x9f", -1.5, 8),)),
    TokenLogprob("🙂", b"\x99\x82", -math.inf, 9, (TokenLogprob("x", b"x", 0.0, 3),)),
)


def likely() -> Script:
    """Three tokens, of which two make one character; the last one's logprobs come with the end of the text."""
    yield TextDelta("Hé", LIKELY[:1])
    yield TextDelta("🙂", LIKELY[1:])
    yield Finished("stop", USAGE)


def forever() -> Script:
    """A prefill that never ends."""
    while True:
        yield None


def chatter() -> Script:
    """A decode that never ends."""
    while True:
        yield TextDelta("word ")


def flood() -> Script:
    """Fills any socket buffer within a few steps."""
    while True:
        yield TextDelta("x" * 200_000)


def slow_start() -> Script:
    """A prefill longer than the keep-alive interval of the tests' server."""
    yield from (None for _ in range(300))
    yield from hello()


def slow_failure() -> Script:
    yield from (None for _ in range(300))
    yield Failed(EngineFailureError("The engine failed."))


def burst() -> Script:
    """Two seconds of words: long enough to be caught by a shutdown."""
    for index in range(100):
        yield from (None for _ in range(9))
        yield TextDelta(f"{index} ")
    yield Finished("length", USAGE)


def fail_first() -> Script:
    yield Failed(ContextLengthError("The prompt has 9000 tokens; the model takes 4096.", param="messages"))


def fail_full() -> Script:
    yield Failed(OverloadedError("No memory for this prompt now.", retry_after_s=7))


def fail_midway() -> Script:
    yield TextDelta("Hel")
    yield None
    yield Failed(EngineFailureError("The engine failed."))


SCRIPTS: Mapping[str, Callable[[], Script]] = {
    script.__name__: script
    for script in (
        *(forever, chatter, flood, slow_start, slow_failure, burst, fail_first, fail_full, fail_midway),
        *(calls, one_call, thoughts, likely),
        *ANSWERS,
    )
}


@dataclass
class Job:
    request: Request
    sink: EventSink
    script: Script


class ScriptedEngine(ScriptedSessions):
    """`received` keeps every submitted request; `unready`, `full` and `dead` inject faults."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[Request] = []
        self.asked: list[TextQuestion] = []
        self.extra: tuple[ConversationStats, ...] = ()  # in place of the two that statistics show
        self.cancelled: list[str] = []
        self.unready: str | None = None
        self.full = False
        self.dead = False
        self._inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._submitted = 0
        self._ended = 0
        self._cancels: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted-engine")
        self._thread.start()

    model_id = MODEL_ID
    created = 1_700_000_000
    sampling_defaults = SamplingParams()

    def ask(self, question: TextQuestion) -> Future[Any]:
        """Each word is a token, and its id its length."""
        future: Future[Any] = Future()
        self.asked.append(question)
        match question:
            case Tokenize(request):
                text = request.prompt if isinstance(request.prompt, str) else repr(request.messages)
                future.set_result(tuple(len(word) for word in text.split()))
            case Detokenize(tokens):
                future.set_result(" ".join("x" * token for token in tokens))
            case RenderTemplate(request):
                future.set_result("".join(f"<{m['role']}>{m['content']}" for m in request.messages))
            case FillInMiddle(prefix, suffix):
                future.set_result(MiddlePrompt((1, len(prefix), 2, len(suffix), 3), (9,)))
            case Embed(inputs):
                future.set_result(
                    Embeddings(tuple(array("f", (0.48, 0.64, 0.6)) for _ in inputs), num_tokens=len(inputs))
                )
        return future

    def submit(self, request: Request, sink: EventSink) -> None:
        if self.dead:
            raise EngineUnavailableError("The engine thread has died.")
        if self.full:
            raise OverloadedError("The queue is full.", retry_after_s=3)
        self.received.append(request)
        self._submitted += 1
        text = str(request.messages[-1]["content"] if request.messages else request.prompt)
        if text == "seed":
            script = echo(str(request.sampling.seed))
        else:
            script = echo(text) if text.startswith("echo ") else SCRIPTS.get(text, hello)()
        self._inbox.put(Job(request, sink, script))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self._cancels.put(request_id)

    def unready_reason(self) -> str | None:
        return self.unready

    def stats(self) -> EngineStats:
        held = ConversationStats("c1", "memory", KV, hits=2, idle_s=1.5, kv_format="4/3", is_pinned=True)
        return EngineStats(
            model_id=MODEL_ID,
            kv_format="4/3",
            kv_backend="scripted",
            model_dtype="float32",
            kv=KV,
            kv_budget_bytes=4000,
            kv_token_bytes=4.0,
            kv_token_raw_bytes=16.0,
            max_context_tokens=4096,
            num_running=self.num_live,
            num_waiting=0,
            conversations=self.extra or (held, replace(held, conversation_id="c2", tier="running")),
            layers_compressed=4,
            layers_uncompressed=1,
            details={"codec": "scripted"},
            num_conversations={"running": 1, "memory": 1, "disk": 3},
            kv_disk=KV,
            kv_committed_bytes=900,
            kv_scratch_bytes=50,
            events=CacheEvents(
                evictions={"memory": 4, "ttl": 1},
                preemptions={"memory": 2},
                prefix_query_tokens=120,
                prefix_hit_tokens=80,
            ),
            admission=AdmissionStats(5, 5000, 4000, 1000, 800),
            disk=DiskStatus(True, False, "No space left on device.", 700, 1000, 3),
            rows_apart=True,
            kernel_trial=KernelTrial(
                "gpu-metal", "mlx-ops", "slower", {("gpu-metal", 1024): 2e-4, ("mlx-ops", 1024): 1e-4}
            ),
        )

    @property
    def num_live(self) -> int:
        """Requests submitted and not yet ended."""
        return self._submitted - self._ended

    def wait_idle(self, timeout_s: float = WAIT_S) -> None:
        """Fails the test when a request is left behind."""
        deadline = time.monotonic() + timeout_s
        while self.num_live:
            assert time.monotonic() < deadline, f"{self.num_live} requests were left in the engine"
            time.sleep(0.002)

    def wait_live(self, count: int = 1, timeout_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while self.num_live < count:
            assert time.monotonic() < deadline, "the request never reached the engine"
            time.sleep(0.002)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._step()
            time.sleep(STEP_S)

    def _step(self) -> None:
        while not self._inbox.empty():
            job = self._inbox.get()
            self._jobs[job.request.request_id] = job
        while not self._cancels.empty():
            job_or_none = self._jobs.get(self._cancels.get())
            if job_or_none is not None:
                self._deliver(job_or_none, Failed(RequestCancelledError("cancelled")))
        for job in list(self._jobs.values()):
            event = next(job.script)
            if event is not None:
                self._deliver(job, event)

    def _deliver(self, job: Job, event: Event) -> None:
        job.sink.put(event)
        if isinstance(event, Finished | Failed):
            del self._jobs[job.request.request_id]
            self._ended += 1
