"""Rules are made on threads of their own, in limited time, while streams go on; then their requests queue.

A request is in the engine's inbox, here, or with the step loop, and moves from one to the next under the engine's lock.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from turboserve.engine.failures import as_failure
from turboserve.engine.generation import Generation
from turboserve.engine.inbox import RETRY_AFTER_START_S, InboxItem, Refused
from turboserve.engine.token_rules import TokenRule
from turboserve.errors import InvalidRequestError, OverloadedError, RequestCancelledError, TurboServeError
from turboserve.messages import Request

log = logging.getLogger(__name__)

NUM_THREADS = 2  # one that is at a hard constraint leaves the other to easy ones
MAX_QUEUED_S = 10.0  # behind others' constraints, or until a process to try them in has started


class MakesRules(Protocol):
    """What is used of `answer_rules.RuleMaker`."""

    def prepare(self) -> None:
        """Whatever has to be there before the first rule."""
        ...

    def rule_of(self, request: Request, timeout_s: float, began: Callable[[], None]) -> TokenRule | None:
        """The answer's rule; `began` is called when the work on it begins."""
        ...

    def close(self) -> None:
        """Nothing more will be asked."""
        ...


@dataclass(slots=True)
class _Job:
    future: Future[None] | None = None
    started_s: float | None = None


class RuleJobs:
    """Requests whose rules are being made. Methods take the engine's lock, which their caller may hold already."""

    def __init__(
        self,
        changed: threading.Condition,
        inbox: deque[InboxItem],
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        """changed: the engine's lock, notified of every change; inbox: where requests go with their rules."""
        self._changed, self._inbox, self._timeout_s, self._clock = changed, inbox, timeout_s, clock
        self._jobs: dict[Generation, _Job] = {}
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="rules")
        self._maker: MakesRules | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def open(self, maker: MakesRules) -> Future[None]:
        """The model is there; the future ends when rules can be made."""
        self._maker = maker
        return self._pool.submit(maker.prepare)

    def add(self, generation: Generation) -> None:
        """Make this request's rule, then leave the request in the inbox; or the news that there is none."""
        with self._changed:
            job = self._jobs[generation] = _Job()
            job.future = self._pool.submit(self._work, generation, job)

    def cancel(self, request_id: str) -> bool:
        """Whether a request with this id was here; it is taken out, and the inbox told."""
        with self._changed:
            generation = next((g for g in self._jobs if g.request_id == request_id), None)
            if generation is not None:
                self._refuse(generation, RequestCancelledError("The request was cancelled."))
            return generation is not None

    def refuse_late(self) -> None:
        """Requests whose time is over go to the inbox with an error."""
        with self._changed:
            now_s = self._clock()
            for generation in [g for g, job in self._jobs.items() if self._deadline_s(g, job) <= now_s]:
                if self._jobs[generation].started_s is None:
                    error: TurboServeError = OverloadedError(
                        "The server is busy with other requests' constraints.", retry_after_s=RETRY_AFTER_START_S
                    )
                else:
                    constraint = generation.request.constraint
                    error = InvalidRequestError(
                        f"The answer's constraint cannot be enforced: compiling it takes over {self._timeout_s:g} s.",
                        param=constraint.param if constraint is not None else "tools",
                    )
                self._refuse(generation, error)

    def next_deadline_s(self) -> float | None:
        """When `refuse_late` may have something to do; None while nothing is here."""
        with self._changed:
            return min((self._deadline_s(g, job) for g, job in self._jobs.items()), default=None)

    def take_all(self) -> list[Generation]:
        """Everyone who is here; nothing will become of their rules."""
        with self._changed:
            left = list(self._jobs)
            for generation in left:
                self._forget(generation)
            return left

    def close(self) -> None:
        """Make no more rules. A thread that is at one ends after it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._maker is not None:
            self._maker.close()

    def _deadline_s(self, generation: Generation, job: _Job) -> float:
        if job.started_s is None:
            return generation.submitted_s + MAX_QUEUED_S
        return job.started_s + self._timeout_s

    def _work(self, generation: Generation, job: _Job) -> None:
        """On a thread of the pool."""
        assert self._maker is not None

        def began() -> None:
            with self._changed:
                job.started_s = self._clock()
                self._changed.notify()  # for the engine to see its deadline

        try:
            rule, error = self._maker.rule_of(generation.request, self._timeout_s, began), None
        except Exception as exc:
            if not isinstance(exc, TurboServeError):
                log.exception("the rule of request %s could not be made", generation.request_id)
            rule, error = None, as_failure(exc, RETRY_AFTER_START_S)
        with self._changed:
            if generation not in self._jobs:  # cancelled, late, or the engine has ended
                return
            if error is not None:
                self._refuse(generation, error)
                return
            self._forget(generation)
            generation.rule = rule
            self._inbox.append(generation)
            self._changed.notify()

    def _refuse(self, generation: Generation, error: TurboServeError) -> None:
        self._forget(generation)
        self._inbox.append(Refused(generation, error))
        self._changed.notify()

    def _forget(self, generation: Generation) -> None:
        future = self._jobs.pop(generation).future
        if future is not None:
            future.cancel()
