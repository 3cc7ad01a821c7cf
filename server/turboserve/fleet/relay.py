"""Passes one answer through, from a model's process to the caller, as it comes.

Nothing is read from the process before the caller has taken what came earlier; a caller who leaves takes the
request along; an error before the first byte gets its proper status, a later one is the stream's last event.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any

import httpx
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from turboserve.api.answering import STREAM_HEADERS, wait_for_disconnect
from turboserve.errors import TurboServeError
from turboserve.fleet.context import FleetContext
from turboserve.fleet.plan import ModelPlan
from turboserve.fleet.process import ModelProcess
from turboserve.fleet.streams import StreamShape, WholeEvents, event_end, is_file
from turboserve.fleet.upstream import Question, error_in, lost, passed_back
from turboserve.messages import Event, Failed

logger = logging.getLogger("turboserve.fleet")


class _Ending:
    """Where the shutdown says that the time of answers under way is over."""

    def __init__(self) -> None:
        self._error: asyncio.Future[TurboServeError] = asyncio.get_running_loop().create_future()

    def put(self, event: Event) -> None:
        if isinstance(event, Failed) and not self._error.done():
            self._error.set_result(event.error)

    async def wait(self) -> TurboServeError:
        return await self._error


class RelayResponse(Response):
    """An ASGI response that asks the model's process when called, and loads the model before if need be."""

    def __init__(self, context: FleetContext, plan: ModelPlan, question: Question, shape: StreamShape | None) -> None:
        """`shape`: of the stream that the caller asked for; None: the answer comes in one piece."""
        super().__init__()
        self._context, self._plan, self._question, self._shape = context, plan, question, shape
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ending = _Ending()
        self._context.drain.enter(ending)
        answer = asyncio.create_task(self._answer(send))
        departure = asyncio.create_task(wait_for_disconnect(receive))
        expiry = asyncio.create_task(ending.wait())
        try:
            await asyncio.wait({answer, departure, expiry}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
            elif expiry.done():
                await _stop(answer)
                await self._fail(send, expiry.result())
            else:
                self._context.telemetry.http_disconnect("stream" if self._shape else "whole")
                logger.info("the client left")
        finally:
            self._context.drain.leave(ending)
            await _stop(answer, departure, expiry)

    async def _answer(self, send: Send) -> None:
        try:
            async with AsyncExitStack() as stack:
                reply = await self._asked(stack, send)
                await self._pass_on(reply, send)
        except TurboServeError as exc:
            await self._fail(send, exc)
        except httpx.TransportError as exc:
            logger.warning("lost %s: %s", self._plan.name, type(exc).__name__)
            await self._fail(send, lost(self._plan))
        except TimeoutError:
            self._context.telemetry.http_disconnect("stalled")
            logger.warning("the client stopped reading")

    async def _asked(self, stack: AsyncExitStack, send: Send) -> httpx.Response:
        """The reply's head. A process that is found dead has not seen the request: it goes to the next one."""
        process = await self._loaded(stack, send)
        try:
            return await self._ask(process, stack)
        except httpx.ConnectError:
            if process.is_alive:
                raise
            process = await self._loaded(stack, send)
            return await self._ask(process, stack)

    async def _loaded(self, stack: AsyncExitStack, send: Send) -> ModelProcess:
        """The model's process; a stream that waits for it long begins with signs of life."""
        loading = asyncio.create_task(stack.enter_async_context(self._context.fleet.use(self._plan)))
        try:
            if self._shape is not None and self._shape.keep_alive:
                while not loading.done():
                    done, _ = await asyncio.wait({loading}, timeout=self._context.keepalive_interval_s)
                    if not done:
                        await self._begin(
                            send, 200, [(b"content-type", self._shape.media_type.encode()), *STREAM_HEADERS]
                        )
                        await self._send(send, self._shape.keep_alive)
            return await loading
        finally:
            await _stop(loading)

    async def _ask(self, process: ModelProcess, stack: AsyncExitStack) -> httpx.Response:
        """The reply's head; its body is still to be read."""
        reply = await process.http.send(self._question.to(process), stream=True)
        stack.push_async_callback(reply.aclose)
        return reply

    async def _pass_on(self, reply: httpx.Response, send: Send) -> None:
        content_type = reply.headers.get("content-type", "")
        if is_file(content_type) and reply.status_code == 200:
            return await self._pass_on_file(reply, send)
        end = event_end(content_type)
        if end is None or reply.status_code != 200:
            body = await reply.aread()  # whole before its first byte is sent: then a lost process is an error reply
            if self._has_begun:
                return await self._fail(send, error_in(reply.status_code, body))
            await self._begin(send, reply.status_code, passed_back(reply.headers.raw))
            return await self._send(send, body, more=False)
        if not self._has_begun:
            await self._begin(send, reply.status_code, passed_back(reply.headers.raw))
        events = WholeEvents(end)
        async for data in reply.aiter_raw():
            await self._send(send, events.take(data))
        await self._send(send, events.rest(), more=False)

    async def _pass_on_file(self, reply: httpx.Response, send: Send) -> None:
        """With its length: a caller notices when the process dies before its end."""
        await self._begin(send, reply.status_code, passed_back(reply.headers.raw))
        async for data in reply.aiter_raw():
            await self._send(send, data)
        await self._send(send, b"", more=False)

    async def _fail(self, send: Send, error: TurboServeError) -> None:
        """Raises the error where it can still have a status, else tells it as the last event."""
        if not self._has_begun:
            raise error
        shape = self._shape or StreamShape(self._question.path, self._question.request_id)
        logger.warning("failed mid-stream: %s", error.code)
        await self._send(send, shape.failure(error), more=False)

    async def _begin(self, send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Raises TimeoutError when the caller has not taken earlier bytes for `send_timeout_s`."""
        if more and not body:
            return
        async with asyncio.timeout(self._context.send_timeout_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
