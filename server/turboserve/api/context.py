"""What all routes share: the engine, the shutdown, the counters and the limits; and how a request is submitted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from turboserve import messages
from turboserve.api.chat_request import ChatRules
from turboserve.api.drain import Drain
from turboserve.api.mailbox import Mailbox
from turboserve.api.model_names import ServedNames
from turboserve.api.running import RunningRequests
from turboserve.api.transfers import Transfers
from turboserve.engine.protocol import Engine
from turboserve.errors import OverloadedError
from turboserve.telemetry import Telemetry

# The engine answers between two steps; a step of a large model on a slow machine takes seconds, not this long.
ENGINE_TIMEOUT_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ApiContext:
    """The engine and what surrounds it, for one application; routes get it as the dependency `Context`."""

    engine: Engine
    drain: Drain
    telemetry: Telemetry
    max_body_bytes: int
    send_timeout_s: float
    keepalive_interval_s: float
    stream_interval_s: float
    chat_rules: ChatRules
    names: ServedNames
    max_import_bytes: int = 0
    running: RunningRequests = field(default_factory=RunningRequests)
    transfers: Transfers = field(default_factory=Transfers)

    def admit(self) -> None:
        """Raises EngineUnavailableError once the server is shutting down, and counts that."""
        if self.drain.draining:
            self.telemetry.request_refused("draining")
        self.drain.check()

    @contextmanager
    def submitted(self, request: messages.Request) -> Iterator[Mailbox]:
        """The mailbox of a submitted request. On the way out, a request that has not finished is cancelled.

        Raises OverloadedError or EngineUnavailableError when the engine takes no more.
        """
        mailbox = Mailbox(self.stream_interval_s)
        try:
            self.engine.submit(request, mailbox)
        except BaseException:
            mailbox.close()
            raise
        self.drain.enter(mailbox)
        self.running.enter(request)
        try:
            yield mailbox
        finally:
            mailbox.close()
            self.drain.leave(mailbox)
            self.running.leave(request)
            if not mailbox.finished:
                self.engine.cancel(request.request_id)


async def engine_answer(future: Future[T]) -> T:
    """What the engine answered. Raises what it raised, or OverloadedError when it does not get to it.

    The future is never cancelled: it belongs to the engine thread.
    """
    waiting = asyncio.wrap_future(future)
    done, _ = await asyncio.wait({waiting}, timeout=ENGINE_TIMEOUT_S)
    if not done:
        raise OverloadedError("The engine is busy and did not answer in time.")
    return waiting.result()


# Coroutines, because FastAPI sends plain functions through a thread pool.


async def _context(request: Request) -> ApiContext:
    context: ApiContext = request.app.state.context
    return context


async def _tenant(request: Request) -> str:
    """The caller as the front door established it."""
    return str(request.scope["state"]["tenant"])


Context = Annotated[ApiContext, Depends(_context)]
Tenant = Annotated[str, Depends(_tenant)]
