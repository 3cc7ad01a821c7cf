"""Runs one chat completion: submit, wait, answer whole or as a stream, and always let go.

Owns the request from submission to its end. Whatever happens (an ending, a disconnect, a stalled
reader, shutdown, our own failure), the engine is told to free a request that has not finished.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from turboserve.api.chat_request import Delivery
from turboserve.api.context import ApiContext
from turboserve.api.mailbox import Mailbox
from turboserve.api.replies import JSON_TYPE, SSE_COMMENT, SSE_DONE, CompletionReplies, sse, sse_error
from turboserve.messages import Event, Failed, Finished, Request, TextDelta

logger = logging.getLogger("turboserve.api")

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
]


class CompletionResponse(Response):
    """An ASGI response that runs its request when called.

    Nothing is sent before the engine's first event, so an early failure is raised and gets its
    proper status; only after `keepalive_interval_s` of silence does a stream start with a comment.
    """

    def __init__(self, request: Request, delivery: Delivery, context: ApiContext) -> None:
        super().__init__()
        self._request, self._delivery, self._context = request, delivery, context
        self._replies = CompletionReplies(request.request_id, context.engine.model_id, delivery.include_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._context.submitted(self._request) as mailbox:
            run = self._stream(mailbox, send) if self._delivery.stream else self._whole(mailbox, scope, receive, send)
            answer = asyncio.create_task(run)
            departure = asyncio.create_task(wait_for_disconnect(receive))
            try:
                await asyncio.wait({answer, departure}, return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    answer.result()
                else:
                    self._context.telemetry.http_disconnect("stream" if self._delivery.stream else "whole")
                    logger.info("the client left")
            finally:
                await _stop(answer, departure)

    async def _whole(self, mailbox: Mailbox, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[str] = []
        while True:
            event = await mailbox.next()
            if isinstance(event, TextDelta):
                parts.append(event.text)
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Finished):
                body = self._replies.whole("".join(parts), event.reason, event.usage)
                return await Response(body.model_dump_json(), media_type=JSON_TYPE)(scope, receive, send)

    async def _stream(self, mailbox: Mailbox, send: Send) -> None:
        event = await mailbox.next(self._context.keepalive_interval_s)
        if isinstance(event, Failed):
            raise event.error
        try:
            await self._start_stream(send)
            while not isinstance(event, Finished | Failed):
                await self._send(send, self._chunk(event))
                event = await mailbox.next(self._context.keepalive_interval_s)
            await self._send(send, self._ending(event), more=False)
        except TimeoutError:
            self._context.telemetry.http_disconnect("stalled")
            logger.warning("the client stopped reading")

    async def _start_stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        await self._send(send, sse(self._replies.role_chunk()))

    def _chunk(self, event: Event | None) -> bytes:
        return sse(self._replies.delta_chunk(event.text)) if isinstance(event, TextDelta) else SSE_COMMENT

    def _ending(self, event: Finished | Failed) -> bytes:
        """The last bytes: an error event, or finish reason, usage if asked for, and [DONE]."""
        if isinstance(event, Failed):
            logger.warning("failed mid-stream: %s", event.error.code)
            return sse_error(event.error)
        usage = sse(self._replies.usage_chunk(event.usage)) if self._delivery.include_usage else b""
        return sse(self._replies.final_chunk(event.reason)) + usage + SSE_DONE

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Raises TimeoutError when the client has not taken earlier bytes for `send_timeout_s`."""
        async with asyncio.timeout(self._context.send_timeout_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns once the client has left, or our response is complete."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def _stop(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
