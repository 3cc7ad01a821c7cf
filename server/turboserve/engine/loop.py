"""One engine step after another: admit, prefill a chunk, decode everyone, deliver, free.

Owns all requests from the moment the engine thread sees them until their last event. Runs on the
engine thread only (or a test's). What to do is decided in scheduler.py, done in runner.py; memory
is the cache manager's. An exception that leaves `step` is a bug of the engine itself and ends it;
whatever one request's data can cause ends that request alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from turboserve.engine import scheduler
from turboserve.engine.failures import as_failure, is_out_of_memory
from turboserve.engine.parts import EngineParts
from turboserve.engine.prepare import Preparer, tokens_to_reserve
from turboserve.engine.protocol import (
    EngineStats,
    EngineTelemetry,
    Event,
    EventSink,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    TextDelta,
    Usage,
)
from turboserve.engine.runner import Runner
from turboserve.engine.sequence import Sequence, Stage
from turboserve.engine.snapshot import kv_bytes, kv_format_name, take_snapshot
from turboserve.errors import EngineFailureError, RequestCancelledError, TurboServeError
from turboserve.settings import Settings

log = logging.getLogger(__name__)

Clock = Callable[[], float]

MAX_RECOVERIES = 2  # a request whose cache is lost again and again would keep the engine busy for ever


class StepLoop:
    """All requests of one loaded model."""

    def __init__(self, parts: EngineParts, settings: Settings, telemetry: EngineTelemetry, clock: Clock) -> None:
        """Proves that the model works with one real forward pass; raises whatever that raises."""
        self._parts, self._settings, self._telemetry, self._clock = parts, settings, telemetry, clock
        self.runner = Runner(parts.loaded.model, parts.runtime)
        self._preparer = Preparer(parts.loaded, parts.manager, self.runner.warm_up())
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._num_steps = 0
        self._refused_at_change: int | None = None  # the manager's change count when the head last got no lease

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: GenerationRequest, sink: EventSink, submitted_s: float) -> None:
        self._waiting.append(Sequence(request, sink, submitted_s))

    def cancel(self, request_id: str) -> None:
        """End a request now; what was computed for it stays as an idle conversation."""
        sequence = next((s for s in (*self._running, *self._waiting) if s.request_id == request_id), None)
        if sequence is None:
            return
        self._telemetry.request_cancelled(sequence.stage.value)
        self._end_keeping(sequence)
        self._send(sequence, Failed(RequestCancelledError("The request was cancelled.")))

    def fail_all(self, error: TurboServeError) -> None:
        """End every request with the same error."""
        for sequence in (*self._running, *self._waiting):
            self._fail(sequence, error)

    def abandon(self, error: TurboServeError) -> None:
        """Tell every reader that it is over, without touching caches: for an engine beyond repair."""
        ended, self._running, self._waiting = [*self._running, *self._waiting], [], deque()
        for sequence in ended:
            sequence.stage = Stage.ENDED
            self._send(sequence, Failed(error))

    def snapshot(self) -> EngineStats:
        return take_snapshot(self._parts, self.runner, self._running, len(self._waiting), self._clock())

    def step(self) -> None:
        """A bounded amount of work: at most one prompt prepared, one chunk prefilled, one token per row."""
        self._num_steps += 1
        self._admit()
        self._prefill_one()
        self._extend_leases()
        self._decode()

    def _admit(self) -> None:
        """Start waiting requests in order of arrival; one that has no room yet is not overtaken."""
        prepared_one = False
        while self._waiting and scheduler.can_admit(len(self._running), self._settings.max_running):
            head = self._waiting[0]
            if not head.prompt:
                if prepared_one:
                    return
                prepared_one = True
                if not self._try_prepare(head):
                    continue
            if not self._try_start(head):
                return

    def _try_prepare(self, sequence: Sequence) -> bool:
        try:
            self._preparer.prepare(sequence)
        except Exception as exc:
            self._fail(sequence, exc)
            return False
        return True

    def _try_start(self, sequence: Sequence) -> bool:
        """Lease room and start prefill; False when there is no room now. A failing request is ended."""
        manager = self._parts.manager
        if self._refused_at_change == manager.changes:
            return False
        now_s = self._clock()
        try:
            lease = manager.try_lease(sequence.request.tenant, sequence.prompt, tokens_to_reserve(sequence), now_s)
        except Exception as exc:
            self._fail(sequence, exc)
            return True
        self._refused_at_change = manager.changes if lease is None else None
        if lease is None:
            return False
        self._waiting.remove(sequence)
        self._running.append(sequence)
        sequence.stage, sequence.lease = Stage.PREFILL, lease
        sequence.caches, sequence.cache_len = lease.caches, lease.cached_len
        sequence.last_prefill_step = self._num_steps
        self._telemetry.observe_queue_time(now_s - sequence.submitted_s)
        self._telemetry.add_prompt_tokens(len(sequence.prompt), lease.cached_len)
        return True

    def _prefill_one(self) -> None:
        prefilling = [s for s in self._running if s.stage is Stage.PREFILL]
        views = [scheduler.PrefillView(s.num_to_prefill, self._num_steps - s.last_prefill_step) for s in prefilling]
        chosen = scheduler.pick_prefill(views)
        if chosen is None:
            return
        sequence = prefilling[chosen]
        sequence.last_prefill_step = self._num_steps
        try:
            num_tokens = scheduler.chunk_len(sequence.num_to_prefill, self._settings.prefill_chunk_tokens)
            if num_tokens:
                self.runner.prefill(sequence, num_tokens)
            if sequence.num_to_prefill == 0:
                self.runner.join(sequence)
                sequence.stage = Stage.DECODE
        except Exception as exc:
            log.exception("prefill failed for request %s", sequence.request_id)
            self._fail(sequence, exc)

    def _extend_leases(self) -> None:
        """Open-ended answers reserve as they grow; one that cannot grow ends here."""
        for sequence in [s for s in self._running if s.stage is Stage.DECODE]:
            lease = sequence.lease
            assert lease is not None
            if sequence.num_tokens <= lease.reserved_tokens:
                continue
            if not self._parts.manager.try_extend(lease, tokens_to_reserve(sequence)):
                log.warning("no KV budget left to go on with request %s: ended by length", sequence.request_id)
                self._finish(sequence, "length")

    def _decode(self) -> None:
        for sequence, outcome in self.runner.step().items():
            if outcome is None:
                self._recover(sequence)
            elif isinstance(outcome, Exception):
                self._fail(sequence, outcome)
            else:
                self._accept(sequence, outcome)

    def _accept(self, sequence: Sequence, token: int) -> None:
        """One new token: into the answer, the text, and out to the reader."""
        assert sequence.sampler is not None and sequence.text is not None
        self._observe_token(sequence)
        sequence.answer.append(token)
        if token in self._parts.loaded.eos_ids:
            self._finish(sequence, "stop")
            return
        try:
            sequence.sampler.accept(token)
            result = sequence.text.add(token)
        except Exception as exc:
            log.exception("text of request %s failed", sequence.request_id)
            self._fail(sequence, exc)
            return
        if result.text:
            self._send(sequence, TextDelta(result.text))
        if sequence.stage is Stage.ENDED:  # its reader failed
            return
        if result.stopped:
            self._finish(sequence, "stop", flush=False)
        elif len(sequence.answer) >= sequence.max_answer_len:
            self._finish(sequence, "length")

    def _observe_token(self, sequence: Sequence) -> None:
        now_s = self._clock()
        if sequence.last_token_s is None:
            self._telemetry.observe_ttft(now_s - sequence.submitted_s)
        else:
            self._telemetry.observe_inter_token(now_s - sequence.last_token_s)
        sequence.last_token_s = now_s
        self._telemetry.add_generation_tokens(1)

    def _recover(self, sequence: Sequence) -> None:
        """A lost cache is computed again from the tokens, which are all still known."""
        if sequence.num_recoveries >= MAX_RECOVERIES:
            self._fail(sequence, EngineFailureError("The device failed repeatedly while answering this request."))
            return
        sequence.num_recoveries += 1
        sequence.stage = Stage.PREFILL
        sequence.caches, sequence.cache_len = self._parts.runtime.make_cache(), 0
        sequence.last_prefill_step = self._num_steps

    def _finish(self, sequence: Sequence, reason: FinishReason, *, flush: bool = True) -> None:
        assert sequence.text is not None and sequence.lease is not None
        rest = ""
        if flush:
            try:
                result = sequence.text.flush()
            except Exception as exc:
                log.exception("text of request %s failed", sequence.request_id)
                self._fail(sequence, exc)
                return
            rest, reason = result.text, "stop" if result.stopped else reason
        usage = self._usage(sequence)
        self._end_keeping(sequence)
        self._telemetry.request_finished(reason)
        self._telemetry.observe_e2e(self._clock() - sequence.submitted_s)
        if rest:
            self._send(sequence, TextDelta(rest))
        self._send(sequence, Finished(reason, usage))

    def _usage(self, sequence: Sequence) -> Usage:
        assert sequence.lease is not None
        return Usage(
            prompt_tokens=len(sequence.prompt),
            completion_tokens=len(sequence.answer),
            cached_tokens=sequence.lease.cached_len,
            kv=kv_bytes(self.runner.measure(sequence)),
            kv_format=kv_format_name(self._parts),
        )

    def _fail(self, sequence: Sequence, cause: Exception) -> None:
        """End a request with an error; its caches are not trusted any more."""
        if sequence.stage is Stage.ENDED:
            return
        if is_out_of_memory(cause):
            self._parts.manager.drop_idle()
        error = as_failure(cause, scheduler.retry_after_s(len(self._waiting), self._settings.max_running))
        count = self._telemetry.request_refused if sequence.stage is Stage.WAITING else self._telemetry.request_failed
        self._remove(sequence)
        if sequence.lease is not None:
            self._parts.manager.drop(sequence.lease, sequence.caches)
        sequence.lease = sequence.caches = None
        count(error.code or error.type)
        self._send(sequence, Failed(error))

    def _end_keeping(self, sequence: Sequence) -> None:
        """End a request; what its cache holds becomes an idle conversation."""
        self._remove(sequence)
        if sequence.lease is not None and sequence.caches is not None:
            held = sequence.tokens(0, sequence.cache_len)
            self._parts.manager.keep(sequence.lease, held, sequence.caches, self._clock())
        sequence.lease = sequence.caches = None

    def _remove(self, sequence: Sequence) -> None:
        if self.runner.has(sequence):
            self.runner.leave([sequence])
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
            self._refused_at_change = None  # another request is the head now
        sequence.stage = Stage.ENDED

    def _send(self, sequence: Sequence, event: Event) -> None:
        """A sink that raises breaks its contract; its request ends, nobody else notices."""
        try:
            sequence.sink.put(event)
        except Exception:
            log.exception("the reader of request %s failed", sequence.request_id)
            if sequence.stage is not Stage.ENDED:
                self._telemetry.request_cancelled(sequence.stage.value)
                self._end_keeping(sequence)
