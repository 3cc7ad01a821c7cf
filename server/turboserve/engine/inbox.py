"""What callers leave for the engine thread, which takes all of it between two steps. Plain data and futures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from turboserve.engine.failures import as_failure
from turboserve.engine.generation import Generation
from turboserve.errors import TurboServeError
from turboserve.messages import SessionCommand, TextQuestion

log = logging.getLogger(__name__)

RETRY_AFTER_START_S = 5


@dataclass(frozen=True, slots=True)
class Cancel:
    """The request with this id shall end; one that has ended already is no matter."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that ends before the step loop knows it: its rule could not be made, or it was cancelled meanwhile."""

    generation: Generation
    error: TurboServeError


@dataclass(frozen=True, slots=True)
class Call:
    """A session command or a question, and whom to tell its answer. The future ends once, whatever happens."""

    asked: SessionCommand | TextQuestion
    future: Future[Any]

    def run(self, answer: Callable[[SessionCommand | TextQuestion], object]) -> None:
        """Answer it on the engine thread; what `answer` raises goes to the future as a TurboServeError."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(answer(self.asked))
        except Exception as exc:
            if not isinstance(exc, TurboServeError):
                log.exception("%s failed", type(self.asked).__name__)
            self.future.set_exception(as_failure(exc, RETRY_AFTER_START_S))

    def refuse(self, error: TurboServeError) -> None:
        """Any thread: it is not done."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class ReadInputs:
    """A question for embeddings, and the token ids of its inputs."""

    call: Call
    tokens: list[list[int]]


InboxItem = Generation | Refused | Cancel | Call | ReadInputs
"""A submitted request is there as the engine's own state of it."""
