"""TurboEngine: the one thread that owns MLX, and the thread-safe door to it.

Everything that touches MLX, model loading included, happens on the engine thread. Callers leave
requests, cancellations and session commands in an inbox under one lock and get copies of state; events go
out through their sinks.
If the thread dies, the engine says so, ends every request and refuses new ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import mlx.core as mx

from turboserve.engine import scheduler
from turboserve.engine.answer_rules import RuleMaker, needs_rule
from turboserve.engine.distributed.ranks import RanksEndedError
from turboserve.engine.failures import known_cause
from turboserve.engine.fused_draw import draws_line
from turboserve.engine.garbage import GarbageTimes
from turboserve.engine.generation import Generation
from turboserve.engine.inbox import Call, Cancel, InboxItem, ReadInputs, Refused
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.progress import Progress, step
from turboserve.engine.prompt_jobs import PromptJobs
from turboserve.engine.prompt_texts import is_long
from turboserve.engine.protocol import EngineTelemetry, EventSink, NullTelemetry
from turboserve.engine.rule_jobs import RuleJobs
from turboserve.engine.step_loop import Clock, StepLoop
from turboserve.engine.template_process import TemplateProcess
from turboserve.engine.warm_up import Plan, warm_up
from turboserve.errors import (
    EngineUnavailableError,
    OverloadedError,
    RequestCancelledError,
    StartupError,
    TurboServeError,
)
from turboserve.messages import (
    EngineStats,
    Failed,
    Request,
    SamplingParams,
    SessionCommand,
    TextQuestion,
)
from turboserve.settings import Settings

log = logging.getLogger(__name__)

Build = Callable[[Settings, Progress], EngineParts]

# Measuring running conversations costs a few hundred microseconds each; dashboards do not need more.
SNAPSHOT_INTERVAL_S = 0.25
SNAPSHOT_SHARE = 0.02  # of the time, at most, while there is work

END_S = 5.0  # for the step that is under way when the engine is stopped
IDLE_TICK_S = 1.0  # how often an idle engine looks for sessions whose time is over


class TurboEngine:
    """Implements protocol.Engine over one StepLoop."""

    def __init__(
        self,
        settings: Settings,
        build: Build,
        *,
        model_id: str,
        telemetry: EngineTelemetry | None = None,
        progress: Progress = log.info,
        clock: Clock = time.monotonic,
        on_death: Callable[[], None] = lambda: None,
        garbage: GarbageTimes | None = None,
    ) -> None:
        """Starts nothing; `build` runs on the engine thread after `start`.

        garbage: in a process that is this engine's own, when Python looks for any.
        on_death: called on that thread when an engine that was loaded has died, and every request has been told.
        """
        self._settings, self._build, self._progress, self._clock = settings, build, progress, clock
        self._telemetry: EngineTelemetry = telemetry if telemetry is not None else NullTelemetry()
        self._model_id, self._on_death, self._garbage = model_id, on_death, garbage
        self._loop: StepLoop | None = None  # once the model is loaded
        self._created = int(time.time())
        self._sampling_defaults = SamplingParams()  # the model's own once it is loaded
        self._changed = threading.Condition()
        self._inbox: deque[InboxItem] = deque()
        self._rule_jobs = RuleJobs(self._changed, self._inbox, settings.grammar_timeout_s, clock)
        self._templates = TemplateProcess()
        self._prompt_jobs = PromptJobs(
            self._changed, self._inbox, self._has_read, settings.prompt_timeout_s, settings.log_prompts
        )
        self._busy_since_s: float | None = None  # since when the engine thread has been at one thing
        self._num_waiting = 0  # submitted and not yet admitted, inbox and those whose rule is being made included
        self._num_running = 0
        self._unready: str | None = "the model is still being loaded"
        self._is_ready_or_dead = threading.Event()
        self._startup_error: StartupError | None = None
        self._is_refusing = False  # shutting down: finish what runs, take nothing new
        self._must_end = False
        self._snapshot = EngineStats(model_id, settings.kv_format, kv_backend="", model_dtype="")
        self._snapshot_s = self._snapshot_cost_s = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def model_id(self) -> str:
        return self._model_id

    @property
    def created(self) -> int:
        return self._created

    @property
    def sampling_defaults(self) -> SamplingParams:
        return self._sampling_defaults

    def start(self) -> None:
        """Begin loading; returns at once."""
        self._thread.start()

    def wait_until_ready(self, timeout_s: float | None = None) -> None:
        """Block until requests are worked on. Raises StartupError when that cannot happen or takes too long."""
        if not self._is_ready_or_dead.wait(timeout_s):
            raise StartupError(f"the model was not ready within {timeout_s:g} s")
        if self._startup_error is not None:
            raise self._startup_error

    def submit(self, request: Request, sink: EventSink) -> None:
        takes_long = is_long(request)  # before the lock, for which the engine thread may wait
        with self._changed:
            if self._unready is not None:
                self._telemetry.request_refused("not_ready")
                raise EngineUnavailableError.not_ready(self._unready)
            limits = self._settings
            if not scheduler.can_queue(self._num_waiting, self._num_running, limits.max_queued, limits.max_running):
                self._telemetry.request_refused("queue_full")
                raise OverloadedError(
                    f"The server is busy: {self._num_waiting} requests are waiting already.",
                    retry_after_s=scheduler.retry_after_s(self._num_waiting, limits.max_running),
                )
            self._num_waiting += 1
            self._prompt_jobs.add(Generation(request, sink, self._clock()), is_long=takes_long)

    def _has_read(self, generation: Generation) -> None:
        """The request's prompt is there. With the lock."""
        if needs_rule(generation.request):
            self._rule_jobs.add(generation)
            return
        self._inbox.append(generation)
        self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            if self._prompt_jobs.cancel(request_id) or self._rule_jobs.cancel(request_id):
                return
            self._inbox.append(Cancel(request_id))
            self._changed.notify()

    def unready_reason(self) -> str | None:
        if self.is_stuck:
            return f"the engine has been at one step for {self._busy_s():.0f} s"
        return self._unready

    @property
    def is_stuck(self) -> bool:
        """Whether a step of an engine that was ready takes longer than it may."""
        return self._unready is None and self._busy_s() > self._settings.stuck_step_s

    def _busy_s(self) -> float:
        """How long the engine thread has been at what it does now; 0 while it waits."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def stats(self) -> EngineStats:
        """The latest copy; idle times are as of now, and so is how many requests run and wait."""
        with self._changed:
            snapshot, age_s = self._snapshot, self._clock() - self._snapshot_s
            num_running, num_waiting = self._num_running, self._num_waiting
        conversations = tuple(
            replace(c, idle_s=c.idle_s + age_s) if c.tier != "running" else c for c in snapshot.conversations
        )
        return replace(snapshot, conversations=conversations, num_running=num_running, num_waiting=num_waiting)

    def session(self, command: SessionCommand) -> Future[Any]:
        """Have a session command answered on the engine thread; see protocol.Engine."""
        return self._call(command)

    def ask(self, question: TextQuestion) -> Future[Any]:
        """Have a question answered beside the engine thread, embeddings computed on it; see protocol.Engine."""
        return self._call(question)

    def _call(self, asked: SessionCommand | TextQuestion) -> Future[Any]:
        call = Call(asked, Future())
        takes_long = isinstance(asked, TextQuestion) and is_long(asked)
        with self._changed:
            unready = self._unready
            if unready is None and isinstance(asked, TextQuestion):
                self._prompt_jobs.ask(call, is_long=takes_long)
            elif unready is None:
                self._inbox.append(call)
                self._changed.notify()
        if unready is not None:
            call.refuse(EngineUnavailableError.not_ready(unready))
        return call.future

    def stop(self, grace_s: float = 0.0) -> bool:
        """Take nothing new, let requests finish for `grace_s`, end the rest with an error, end the thread.

        False when the thread is stuck in a step, or in loading the model, which nothing can end but the process's end.
        """
        with self._changed:
            self._is_refusing = True
            self._unready = self._unready or "the server is shutting down"
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(grace_s)
        with self._changed:
            self._must_end = True
            self._changed.notify()
        asked_s = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.1)
            if self._busy_since_s is not None and time.monotonic() - asked_s > END_S:
                log.critical("the engine does not come to an end of its step; giving it up")
                self._rule_jobs.close()
                self._templates.close()
                return False
        return True

    def _run(self) -> None:
        """The engine thread."""
        loop: StepLoop | None = None
        try:
            self._busy_since_s = self._clock()
            self._loop = loop = self._load()
            self._serve(loop)
            self._busy_since_s = None  # what follows may write files, which takes its time
            self._end_all(loop, EngineUnavailableError("The server is shutting down."))
            loop.close()
        except BaseException as exc:  # whatever it is: waiting clients must hear of it
            self._busy_since_s = None
            if loop is None and (cause := known_cause(exc)) is not None:
                exc = StartupError(cause)
            if not isinstance(exc, StartupError):  # of which whoever started the engine is told
                log.critical("the engine thread died", exc_info=True)
            self._die(loop, exc)
        finally:
            self._loop = None
            self._is_ready_or_dead.set()
            self._rule_jobs.close()
            self._prompt_jobs.close()
            self._templates.close()
            if self._garbage is not None:
                self._garbage.release()
            mx.clear_streams()  # this thread's; left alive, their workers abort the process at exit (mlx 0.32)

    def _load(self) -> StepLoop:
        self._templates.start()  # while the model is loaded
        parts = self._build(self._settings, self._progress)
        loop = StepLoop(parts, self._settings, self._telemetry, self._clock, self._templates)
        can_read = self._prompt_jobs.open(loop, loop.get_ready_to_read)
        self._progress(f"overlap      {loop.overlap}")
        if loop.runner.apart is not None:
            self._progress(f"batching     {loop.runner.batching}")
        self._progress(f"speculation  {loop.speculation_line}")
        can_make_rules = self._rule_jobs.open(RuleMaker(parts.loaded, loop.vocab_len))  # while kernels compile
        plan = Plan.for_device(loop.prefill_tokens, self._settings.max_running, parts.loaded.max_context)
        with step(self._progress, "warming up"):
            warmed_s, graphs = warm_up(loop.runner, parts, loop.vocab_len, plan, self._settings.keep_graphs)
            can_make_rules.result()
            can_read.result()
        self._progress(f"warm-up      {warmed_s:.1f} s")
        if parts.compiled is not None:
            parts.compiled.finish(self._progress, warmed_s)
        self._progress(f"step graphs  {graphs}")
        self._progress(f"draws        {draws_line()}")
        loop.graphs_line = str(graphs)
        self._created, self._sampling_defaults = int(time.time()), parts.loaded.sampling_defaults
        self._publish(loop)
        if self._garbage is not None:
            self._garbage.settle()
        with self._changed:
            self._unready = "the server is shutting down" if self._is_refusing else None
        self._is_ready_or_dead.set()
        return loop

    def _serve(self, loop: StepLoop) -> None:
        while True:
            items = self._next_items(loop)
            if items is None:
                return
            self._take(loop, deque(items))
            if loop.has_work:
                loop.step()
            else:
                loop.tick()
            self._after_step(loop)
            if self._garbage is not None:
                self._garbage.after_step(has_work=loop.has_work)

    def _take(self, loop: StepLoop, items: deque[InboxItem]) -> None:
        try:
            while items:
                item = items.popleft()
                if isinstance(item, Generation):
                    loop.add(item)
                elif isinstance(item, Cancel):
                    loop.cancel(item.request_id)
                elif isinstance(item, Refused):
                    self._refuse(item)
                elif isinstance(item, ReadInputs):
                    loop.embeddings.add(item.call, item.tokens)
                else:
                    item.run(loop.answer)
        finally:
            with self._changed:  # where `_end_all` finds them
                self._inbox.extendleft(reversed(items))

    def _next_items(self, loop: StepLoop) -> list[InboxItem] | None:
        """What callers asked for since the last step, waiting a while if there is nothing to do; None: end."""
        with self._changed:
            is_due = self._rule_jobs or self._prompt_jobs or not self._is_refusing
            if is_due and not (self._inbox or loop.has_work or self._must_end):
                self._busy_since_s = None
                self._changed.wait(self._idle_s())
            self._busy_since_s = self._clock()
            self._rule_jobs.refuse_late()
            has_work = self._inbox or self._rule_jobs or self._prompt_jobs or loop.has_work
            if self._must_end or (self._is_refusing and not has_work):
                return None
            items = list(self._inbox)
            self._inbox.clear()
            return items

    def _idle_s(self) -> float:
        """How long an idle engine may wait."""
        deadline_s = self._rule_jobs.next_deadline_s()
        return IDLE_TICK_S if deadline_s is None else min(IDLE_TICK_S, max(0.0, deadline_s - self._clock()))

    def _refuse(self, refused: Refused) -> None:
        """End a request that the step loop never knew."""
        if isinstance(refused.error, RequestCancelledError):
            self._telemetry.request_cancelled(refused.generation.stage.value)
        else:
            self._telemetry.request_refused(refused.error.code or refused.error.type)
        _tell(refused.generation, refused.error)

    def _after_step(self, loop: StepLoop) -> None:
        age_s = self._clock() - self._snapshot_s
        is_wanted = age_s >= SNAPSHOT_INTERVAL_S or self._num_running != loop.num_running
        is_affordable = age_s * SNAPSHOT_SHARE >= self._snapshot_cost_s
        snapshot = self._taken(loop) if not loop.has_work or (is_wanted and is_affordable) else None
        with self._changed:  # at once: whoever finds that nothing runs finds what is held then
            num_queued = sum(isinstance(item, Generation) for item in self._inbox)
            self._num_waiting = loop.num_waiting + num_queued + len(self._rule_jobs) + len(self._prompt_jobs)
            self._num_running = loop.num_running
            if snapshot is not None:
                self._snapshot, self._snapshot_s = snapshot, self._clock()

    def _taken(self, loop: StepLoop) -> EngineStats:
        began_s = self._clock()
        snapshot = loop.snapshot()
        self._snapshot_cost_s = self._clock() - began_s
        return snapshot

    def _publish(self, loop: StepLoop) -> None:
        snapshot = self._taken(loop)
        with self._changed:
            self._snapshot, self._snapshot_s = snapshot, self._clock()

    def _end_all(self, loop: StepLoop | None, error: TurboServeError) -> None:
        """End what still lies in the inbox, which nothing can keep from being told, and what the loop holds."""
        with self._changed:
            left: list[InboxItem] = [
                *self._inbox,
                *self._prompt_jobs.take_all(),
                *self._rule_jobs.take_all(),
            ]
            self._inbox.clear()
            self._num_waiting = self._num_running = 0
        for item in left:
            if isinstance(item, Generation):
                _tell(item, error)
            elif isinstance(item, Refused):
                _tell(item.generation, item.error)
            elif isinstance(item, Call):
                item.refuse(error)
            elif isinstance(item, ReadInputs):
                item.call.refuse(error)
        if loop is not None:
            loop.fail_all(error)
            self._publish(loop)

    def _die(self, loop: StepLoop | None, cause: BaseException) -> None:
        is_divided = isinstance(cause, RanksEndedError)  # its message is for operators and callers alike
        with self._changed:
            self._unready = str(cause) if is_divided else f"the engine died ({type(cause).__name__})"
        if loop is None:
            reason = cause if isinstance(cause, StartupError) else None
            what = f"The model could not be started ({type(cause).__name__}): the log has details."
            self._startup_error = reason or StartupError(f"--distributed: {cause}." if is_divided else what)
            self._unready = "the model could not be loaded"
        error = _lost(str(cause)) if is_divided else EngineUnavailableError("The engine died; restart the server.")
        try:
            if is_divided and loop is not None:  # caches cannot be kept: the other ranks are gone
                loop.abandon(error)
            self._end_all(None if is_divided else loop, error)
        except Exception:  # the loop's state may be what broke; whoever was in the inbox has been told
            log.exception("requests could not be ended in order")
            if loop is not None:
                loop.abandon(error)
        if loop is not None:
            self._on_death()

    def give_up(self, why: str, within_s: float) -> None:
        """A rank of the model is gone: end every request, on whatever thread this is.

        The engine thread does so by itself when it sees it, unless it is in a collective, which never ends.
        """
        with self._changed:
            self._unready = why
        self._thread.join(within_s)
        if not self._thread.is_alive():
            return
        self._startup_error = self._startup_error or StartupError(f"--distributed: {why}.")
        self._is_ready_or_dead.set()
        if self._loop is not None:
            self._loop.abandon(_lost(why))
        self._end_all(None, _lost(why))


def _tell(generation: Generation, error: TurboServeError) -> None:
    """A sink that raises breaks its contract; nobody else notices."""
    try:
        generation.sink.put(Failed(error))
    except Exception:
        log.exception("the reader of request %s failed", generation.request_id)


def _lost(why: str) -> EngineUnavailableError:
    return EngineUnavailableError(f"The model's ranks do not go on together: {why}. The server ends.", retry_after_s=30)
