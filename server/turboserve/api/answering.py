"""Runs the requests behind one reply: submit, wait, answer whole or as a stream, and always let go.

Each kind of route has `Replies` of its own, which say how an answer is written; here is everything else. Owns the
requests from submission to their end. Whatever happens (an ending, a disconnect, a stalled reader, shutdown, our own
failure), the engine is told to free a request that has not finished.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from turboserve.api import tracing
from turboserve.api.context import ApiContext
from turboserve.api.mailbox import Mailbox, Outlet
from turboserve.api.stream_body import BODY_WRITER, BodyWriter, StreamBody
from turboserve.errors import TurboServeError
from turboserve.messages import (
    Delta,
    Event,
    Failed,
    Finished,
    ReasoningDelta,
    Request,
    TextDelta,
    TokenLogprob,
)

logger = logging.getLogger("turboserve.api")

STREAM_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
)


@dataclass(slots=True)
class ToolCall:
    """One complete tool call of an answer; `arguments` is a JSON object as text."""

    call_id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Answer:
    """One request's answer, collected from its deltas until `finished` is there."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None
    first_s: float | None = None  # of time.perf_counter, when the first delta came

    def add(self, delta: Delta) -> None:
        """The next delta."""
        if self.first_s is None:
            self.first_s = time.perf_counter()
        if isinstance(delta, TextDelta):
            self.text += delta.text
            self.logprobs += delta.logprobs
        elif isinstance(delta, ReasoningDelta):
            self.reasoning += delta.text
        elif delta.index == len(self.calls):
            self.calls.append(ToolCall(delta.call_id, delta.name, delta.arguments))
        else:
            self.calls[delta.index].arguments += delta.arguments

    @property
    def ending(self) -> Finished:
        """How it ended; only of a complete answer."""
        assert self.finished is not None, "the answer is not complete"
        return self.finished


class Replies(Protocol):
    """How a kind of route writes one reply, which may hold several answers. One object for one reply.

    The bytes of a stream are begin, then deltas and one finish for each answer, then end; or, instead of the rest,
    failure. Each may be empty.
    """

    media_type: ClassVar[str]  # of a stream
    keep_alive: ClassVar[bytes]  # sent into a silent stream

    def begin(self) -> bytes:
        """The first bytes of a stream."""
        ...

    def delta(self, choice: int, delta: Delta) -> bytes:
        """A piece of one answer."""
        ...

    def finish(self, choice: int, finished: Finished) -> bytes:
        """One answer is complete."""
        ...

    def end(self) -> bytes:
        """All answers are."""
        ...

    def failure(self, error: TurboServeError) -> bytes:
        """The last bytes of a stream that failed after its first."""
        ...

    def whole(self, answers: Sequence[Answer]) -> Response:
        """All answers in one piece."""
        ...


class AnswerResponse(Response):
    """An ASGI response that runs its requests when called.

    Nothing is sent before the engine's first event, so an early failure is raised and gets its
    proper status; only after `keepalive_interval_s` of silence does a stream start with a comment.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        replies: Replies,
        context: ApiContext,
        *,
        stream: bool,
        extra_headers: Mapping[str, str] | None = None,
    ) -> None:
        """One answer for each of `requests`, in their order. The reply has `extra_headers` unless it fails."""
        super().__init__()
        self._requests, self._replies, self._context, self._is_stream = requests, replies, context, stream
        self._extra_headers = extra_headers or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as stack:
            mailboxes = [stack.enter_context(self._context.submitted(request)) for request in self._requests]
            make = self._stream if self._is_stream else self._whole
            answer = asyncio.create_task(make(mailboxes, scope, receive, send))
            departure = asyncio.create_task(wait_for_disconnect(receive))
            try:
                await asyncio.wait({answer, departure}, return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    answer.result()
                else:
                    self._context.telemetry.http_disconnect("stream" if self._is_stream else "whole")
                    logger.info("the client left")
            finally:
                await stop(answer, departure)

    async def _whole(self, mailboxes: Sequence[Mailbox], scope: Scope, receive: Receive, send: Send) -> None:
        answers = [Answer() for _ in mailboxes]
        async for choice, event in self._events(mailboxes, [_Collector(answer) for answer in answers]):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                answers[choice].finished = event
            elif event is not None:
                answers[choice].add(event)
        reply = self._replies.whole(answers)
        reply.headers.update(self._extra_headers)
        await reply(scope, receive, send)

    async def _stream(self, mailboxes: Sequence[Mailbox], scope: Scope, receive: Receive, send: Send) -> None:
        writer: BodyWriter | None = scope.get("extensions", {}).get(BODY_WRITER)
        try:
            async with StreamBody(send, self._context.send_timeout_s, writer) as body:
                await self._stream_to(mailboxes, body)
        except TimeoutError:
            self._context.telemetry.http_disconnect("stalled")
            logger.warning("the client stopped reading")

    async def _stream_to(self, mailboxes: Sequence[Mailbox], body: StreamBody) -> None:
        has_begun = False
        outlets = [_Written(self._replies, i, body) for i in range(len(mailboxes))]
        async for choice, event in self._events(mailboxes, outlets):
            if isinstance(event, Failed) and not has_begun:
                raise event.error
            if not has_begun:
                await body.begin(self._stream_headers(), self._replies.begin())
                has_begun = True
            if isinstance(event, Failed):
                logger.warning("failed mid-stream: %s", event.error.code)
                return await body.end(self._replies.failure(event.error))
            await body.send(self._written(choice, event))
        await body.end(self._replies.end())

    def _written(self, choice: int, event: Delta | Finished | None) -> bytes:
        if event is None:
            return self._replies.keep_alive
        if isinstance(event, Finished):
            return self._replies.finish(choice, event)
        return self._replies.delta(choice, event)

    async def _events(
        self, mailboxes: Sequence[Mailbox], outlets: Sequence[Outlet]
    ) -> AsyncIterator[tuple[int, Event | None]]:
        """Events of all answers as they come, None in silence, until the last has ended; after a Failed, nothing.

        outlets: of each answer. What they take is not among the events.
        """
        silence_s = self._context.keepalive_interval_s if self._is_stream else None
        if len(mailboxes) == 1:  # nearly always, and without a task for each token
            event = None
            while not isinstance(event, Finished | Failed):
                event = await mailboxes[0].next(silence_s, outlets[0])
                tracing.saw(event)
                yield 0, event
            return
        waiting = {asyncio.ensure_future(box.next(silence_s, outlets[i])): i for i, box in enumerate(mailboxes)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=waiting.__getitem__):
                    choice, event = waiting.pop(task), task.result()
                    tracing.saw(event)
                    yield choice, event
                    if isinstance(event, Failed):
                        return
                    if not isinstance(event, Finished):
                        waiting[asyncio.ensure_future(mailboxes[choice].next(silence_s, outlets[choice]))] = choice
        finally:
            await stop(*waiting)

    def _stream_headers(self) -> list[tuple[bytes, bytes]]:
        extra = [(name.lower().encode(), value.encode()) for name, value in self._extra_headers.items()]
        return [(b"content-type", self._replies.media_type.encode()), *STREAM_HEADERS, *extra]


class _Collector:
    """Implements mailbox.Outlet: deltas of an answer that is sent as a whole wake nobody, but for the first."""

    __slots__ = ("_answer", "take")

    def __init__(self, answer: Answer) -> None:
        self._answer, self.take = answer, answer.add

    @property
    def is_open(self) -> bool:
        return self._answer.first_s is not None


class _Written:
    """Implements mailbox.Outlet: one answer's deltas go from the mailbox to the connection in one call."""

    __slots__ = ("_body", "_choice", "_replies")

    def __init__(self, replies: Replies, choice: int, body: StreamBody) -> None:
        self._replies, self._choice, self._body = replies, choice, body

    @property
    def is_open(self) -> bool:
        return self._body.can_write

    def take(self, delta: Delta) -> None:
        self._body.write(self._replies.delta(self._choice, delta))


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns once the client has left, or our response is complete."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def stop(*tasks: asyncio.Future[Any]) -> None:
    """Cancel them and wait until they have ended, however they end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
