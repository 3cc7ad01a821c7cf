"""All requests that have not had their last event: who waits, who runs, and how each of them ends.

Each ends with exactly one Finished or Failed. What its cache holds then becomes an idle conversation,
unless it failed. Order of arrival counts; a preempted request goes to the head again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from turboserve.cache.interfaces import Caches
from turboserve.cache.memory import Lease, Memory
from turboserve.cache.sessions import Conversation
from turboserve.engine import scheduler
from turboserve.engine.failures import as_failure, is_out_of_memory
from turboserve.engine.generation import Generation, Stage
from turboserve.engine.protocol import EngineTelemetry
from turboserve.engine.runner import Runner
from turboserve.errors import RequestCancelledError, TurboServeError
from turboserve.messages import Delta, Event, Failed, Finished, FinishReason, Usage

log = logging.getLogger(__name__)


class OpenRequests:
    """Every request of one step loop, in one of two places."""

    def __init__(
        self,
        runner: Runner,
        memory: Memory,
        telemetry: EngineTelemetry,
        clock: Callable[[], float],
        max_running: int,
    ) -> None:
        self._runner, self._memory, self._telemetry, self._clock = runner, memory, telemetry, clock
        self._max_running = max_running
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []

    def everyone(self) -> tuple[Generation, ...]:
        """Running ones, then waiting ones in order."""
        return (*self.running, *self.waiting)

    # --- between the two places

    def start(self, generation: Generation) -> None:
        """From the queue to those that run."""
        self.waiting.remove(generation)
        self.running.append(generation)
        generation.roomless_since_s = generation.told_to_wait_at = None

    def preempt(self, generation: Generation) -> None:
        """Queue a running request again, at the head; what it computed stays as an idle conversation."""
        if self._runner.has(generation):
            self._runner.leave([generation])
        lease, caches = generation.lease, generation.caches
        assert lease is not None and caches is not None
        held = generation.tokens(0, generation.cache_len)
        self.running.remove(generation)
        self.waiting.appendleft(generation)
        generation.stage, generation.lease, generation.caches, generation.cache_len = Stage.WAITING, None, None, 0
        self._keep(generation, lease, held, caches, has_ended=False)
        log.info("request %s was preempted after %d answer tokens", generation.request_id, len(generation.answer))

    # --- the end

    def cancel(self, generation: Generation) -> None:
        """Its caller does not want it any more."""
        self._telemetry.request_cancelled(generation.stage.value)
        self._end_keeping(generation)
        self.send(generation, Failed(RequestCancelledError("The request was cancelled.")))

    def finish(
        self, generation: Generation, reason: FinishReason, *, flush: bool = True, stopped_by: str | int | None = None
    ) -> None:
        """Its answer is complete.

        flush: text that was held back comes first, in which a stop string may be found. stopped_by: what of the
        request ended it.
        """
        assert generation.text is not None and generation.lease is not None
        reader, rest = generation.reader, list[Delta]()
        try:
            if flush:
                result = generation.text.flush()
                rest = reader.add(result.text, result.logprobs, num_tokens=0)
                if result.stop is not None:
                    reason, stopped_by = "stop", result.stop
            rest += reader.finish()
        except Exception as exc:
            log.exception("text of request %s failed", generation.request_id)
            self.fail(generation, exc)
            return
        if reason == "stop" and reader.has_tool_calls:
            reason = "tool_calls"
        if self._runner.has(generation):
            self._runner.leave([generation])  # without the token that a step ahead may have fed
        kv, kv_format = self._runner.measure(generation), generation.lease.kv_format
        usage = Usage(
            prompt_tokens=len(generation.prompt),
            completion_tokens=len(generation.answer),
            cached_tokens=generation.cached_len,
            kv=kv,
            kv_format=kv_format,
            session_id=self._end_keeping(generation),
            reasoning_tokens=reader.num_reasoning_tokens,
            draft_tokens=generation.num_drafted,
            accepted_draft_tokens=generation.num_accepted,
        )
        self._telemetry.request_finished(reason)
        self._telemetry.observe_e2e(self._clock() - generation.submitted_s)
        for delta in rest:
            self.send(generation, delta)
        self.send(generation, Finished(reason, usage, stopped_by))

    def fail(self, generation: Generation, cause: Exception) -> None:
        """End a request with an error; its caches are not trusted any more."""
        if generation.stage is Stage.ENDED:
            return
        if is_out_of_memory(cause):
            self._memory.drop_idle()
        error = as_failure(cause, scheduler.retry_after_s(len(self.waiting), self._max_running))
        is_new = generation.stage is Stage.WAITING
        count = self._telemetry.request_refused if is_new else self._telemetry.request_failed
        self._remove(generation)
        lease, caches = generation.lease, generation.caches
        generation.lease = generation.caches = None
        if lease is not None:
            self._drop(generation, lease, caches)
        count(error.code or error.type)
        self.send(generation, Failed(error))

    def abandon(self, error: TurboServeError) -> None:
        """End all without touching a cache."""
        ended, self.running = self.everyone(), []
        self.waiting.clear()
        for generation in ended:
            generation.stage = Stage.ENDED
            self.send(generation, Failed(error))

    def send(self, generation: Generation, event: Event) -> None:
        """A sink that raises breaks its contract; its request ends, nobody else notices."""
        try:
            generation.sink.put(event)
        except Exception:
            log.exception("the reader of request %s failed", generation.request_id)
            if generation.stage is not Stage.ENDED:
                self._telemetry.request_cancelled(generation.stage.value)
                self._end_keeping(generation)

    def _end_keeping(self, generation: Generation) -> str:
        """What its cache holds becomes an idle conversation, whose id is returned ("": none)."""
        self._remove(generation)
        lease, caches = generation.lease, generation.caches
        generation.lease = generation.caches = None
        if lease is None or caches is None:
            return ""
        kept = self._keep(generation, lease, generation.tokens(0, generation.cache_len), caches)
        return kept.conversation_id if kept is not None else ""

    # Whatever keeping or freeing a cache runs into (no memory to write or convert one), the request has left both
    # places by then, and nobody else would send its last event.

    def _keep(
        self, generation: Generation, lease: Lease, held: list[int], caches: Caches, *, has_ended: bool = True
    ) -> Conversation | None:
        """As `Memory.keep`; a cache that cannot be kept is given up."""
        try:
            return self._memory.keep(lease, held, caches, self._clock(), has_ended=has_ended)
        except Exception as exc:
            log.exception("the cache of request %s could not be kept", generation.request_id)
            if lease in self._memory.leases:
                self._drop(generation, lease, caches)
            if is_out_of_memory(exc):
                self._memory.drop_idle()
            return None

    def _drop(self, generation: Generation, lease: Lease, caches: Caches | None) -> None:
        try:
            self._memory.drop(lease, caches)
        except Exception:
            log.exception("the cache of request %s could not be given back", generation.request_id)

    def _remove(self, generation: Generation) -> None:
        if self._runner.has(generation):
            self._runner.leave([generation])
        if generation in self.running:
            self.running.remove(generation)
        else:
            self.waiting.remove(generation)
        generation.stage = Stage.ENDED
