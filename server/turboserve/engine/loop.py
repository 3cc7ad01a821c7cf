"""One engine step after another: admit, prefill a chunk, decode everyone, deliver, free.

Owns all running requests until their last event; those that wait are in admission.py. Runs on the
engine thread only (or a test's). What to do is decided in scheduler.py, done in runner.py; memory
is the cache manager's. An exception that leaves `step` is a bug of the engine itself and ends it;
whatever one request's data can cause ends that request alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from turboserve.cache.disk.store import DEFAULT_PENDING_BYTES
from turboserve.cache.manager import Lease
from turboserve.engine import scheduler
from turboserve.engine.admission import Admission
from turboserve.engine.commands import SessionCommands
from turboserve.engine.failures import as_failure, is_out_of_memory
from turboserve.engine.loaded_model import EngineParts
from turboserve.engine.prepare import Preparer, tokens_to_reserve
from turboserve.engine.protocol import EngineTelemetry, EventSink
from turboserve.engine.runner import Runner
from turboserve.engine.running import RunningSequence
from turboserve.engine.sequence import Sequence, Stage
from turboserve.engine.snapshot import kv_bytes, take_snapshot
from turboserve.errors import EngineFailureError, RequestCancelledError, TurboServeError
from turboserve.messages import EngineStats, Event, Failed, Finished, FinishReason, Request, TextDelta, Usage
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
        preparer = Preparer(parts.loaded, parts.manager, self.runner.warm_up())
        self._waiting = Admission(parts.manager, preparer, clock, self._start, self._fail)
        self._running: list[Sequence] = []
        self._num_steps = 0
        self.sessions = SessionCommands(parts.manager, clock)
        parts.manager.on_preempt(self._preempt)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(len(self._waiting) or self._running)

    def add(self, request: Request, sink: EventSink, submitted_s: float) -> None:
        self._waiting.add(Sequence(request, sink, submitted_s))

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
        ended, self._running = [*self._running, *self._waiting], []
        self._waiting.clear()
        for sequence in ended:
            sequence.stage = Stage.ENDED
            self._send(sequence, Failed(error))

    def close(self) -> None:
        """After the last request: what is idle goes to disk, as far as there is one."""
        self._parts.manager.close()

    def snapshot(self) -> EngineStats:
        now_s, num_waiting = self._clock(), len(self._waiting)
        return take_snapshot(self._parts, self.runner, self._running, num_waiting, now_s, self.scratch_bytes)

    @property
    def scratch_bytes(self) -> int:
        """The most that one step may hold beside the budget: a prompt's chunk, exact, and what is being written."""
        chunk = self._settings.prefill_chunk_tokens * self._parts.runtime.chunk_token_bytes
        return int(chunk) + (DEFAULT_PENDING_BYTES if self._parts.manager.disk is not None else 0)

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless pools, references, trees and accounting agree."""
        alone = [s.caches for s in self._running if s.caches is not None]
        views = self.runner.views()
        try:
            self._parts.manager.check_integrity([*alone, *views])
        finally:
            for view in views:
                self._parts.runtime.release(view)

    def step(self) -> None:
        """A bounded amount of work: at most one prompt prepared, one chunk prefilled, one token per row."""
        self._num_steps += 1
        self._waiting.admit(lambda: len(self._running), self._settings.max_running)
        self._prefill_one()
        self._extend_leases()
        self._decode()

    def tick(self) -> None:
        """What time alone asks for while there is nothing to do."""
        self._parts.manager.expire(self._clock())

    def _start(self, sequence: Sequence, lease: Lease) -> None:
        """A lease was found: prefill from where its caches end."""
        self._running.append(sequence)
        sequence.stage, sequence.lease = Stage.PREFILL, lease
        sequence.caches, sequence.cache_len = lease.caches, lease.cached_len
        sequence.last_prefill_step = self._num_steps
        self._parts.manager.attach(lease, RunningSequence(sequence, self.runner))
        if sequence.order is not None:  # it was preempted: its first admission counts
            return
        sequence.order, sequence.cached_len = lease.order, lease.cached_len
        self._telemetry.observe_queue_time(self._clock() - sequence.submitted_s)
        self._telemetry.add_prompt_tokens(len(sequence.prompt), lease.cached_len)

    def _preempt(self, lease: Lease) -> bool:
        """Queue the request of a lease again; what it computed stays as an idle conversation."""
        sequence = next((s for s in self._running if s.lease is lease), None)
        if sequence is None or sequence.stage not in (Stage.PREFILL, Stage.DECODE):
            return False
        if self.runner.has(sequence):
            self.runner.leave([sequence])
        assert sequence.caches is not None
        self._running.remove(sequence)
        held, caches = sequence.tokens(0, sequence.cache_len), sequence.caches
        sequence.stage, sequence.lease, sequence.caches, sequence.cache_len = Stage.WAITING, None, None, 0
        self._waiting.put_first(sequence)
        self._parts.manager.keep(lease, held, caches, self._clock(), has_ended=False)
        log.info("request %s was preempted after %d answer tokens", sequence.request_id, len(sequence.answer))
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
            self._take_better_start(sequence)
            num_tokens = scheduler.chunk_len(sequence.num_to_prefill, self._settings.prefill_chunk_tokens)
            if num_tokens:
                self.runner.prefill(sequence, num_tokens)
            if sequence.num_to_prefill == 0:
                self.runner.join(sequence)
                sequence.stage = Stage.DECODE
        except Exception as exc:
            log.exception("prefill failed for request %s", sequence.request_id)
            self._fail(sequence, exc)

    def _take_better_start(self, sequence: Sequence) -> None:
        """Of requests with a common beginning that came together, one computes it and the others follow."""
        assert sequence.lease is not None and sequence.caches is not None
        if sequence.num_to_prefill <= 0:
            return
        better = self._parts.manager.better_start(sequence.lease)
        if better is None:
            return
        self._parts.runtime.release(sequence.caches)
        sequence.caches, num_cached = better
        if not sequence.answer:  # else it was preempted, and its prompt has been paid for
            sequence.cached_len += num_cached - sequence.cache_len
        sequence.cache_len = num_cached

    def _extend_leases(self) -> None:
        """Open-ended answers reserve as they grow, the oldest first; one that cannot grow makes way for now."""
        for sequence in sorted((s for s in self._running if s.stage is Stage.DECODE), key=lambda s: s.order or 0):
            lease = sequence.lease
            if sequence.stage is not Stage.DECODE or lease is None or sequence.num_tokens <= lease.reserved_tokens:
                continue
            if self._parts.manager.try_extend(lease, tokens_to_reserve(sequence), self._clock()):
                continue
            if len(self._running) > 1 and self._preempt(lease):
                self._parts.manager.counts.preemptions["growth"] += 1
                continue
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
        assert sequence.lease is not None
        sequence.caches, sequence.cache_len = sequence.lease.runtime.make_cache(), 0
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
        usage = replace(usage, session_id=self._end_keeping(sequence))
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
            cached_tokens=sequence.cached_len,
            kv=kv_bytes(self.runner.measure(sequence)),
            kv_format=sequence.lease.kv_format,
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

    def _end_keeping(self, sequence: Sequence) -> str:
        """End a request; what its cache holds becomes an idle conversation, whose id is returned ("": none)."""
        self._remove(sequence)
        lease, caches = sequence.lease, sequence.caches
        sequence.lease = sequence.caches = None
        if lease is None or caches is None:
            return ""
        kept = self._parts.manager.keep(lease, sequence.tokens(0, sequence.cache_len), caches, self._clock())
        return kept.conversation_id if kept is not None else ""

    def _remove(self, sequence: Sequence) -> None:
        if self.runner.has(sequence):
            self.runner.leave([sequence])
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
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
