"""Sessions out to a file and in from one: bytes of disk/session_file.py over HTTP, streamed in both directions.

An import is looked at in the order in which it arrives: what its head says decides before anything else is taken, its
declared length is held to the limit, and all of it waits in a nameless temporary file until every checksum is
verified. What it means is the engine's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from turboserve.api.answering import stop, wait_for_disconnect
from turboserve.api.context import Context, Tenant, engine_answer
from turboserve.api.held_bytes import IMPORT_PATH
from turboserve.api.kv_replies import session_object
from turboserve.api.kv_reply_models import SessionObject
from turboserve.api.mailbox import Mailbox
from turboserve.api.openapi import failures
from turboserve.api.route_errors import OF_A_SESSION
from turboserve.api.session_request import check_session_id, existing_session_id
from turboserve.api.transfers import RETRY_AFTER_S, SESSION_TYPE
from turboserve.errors import (
    BodyTooLargeError,
    KVFormatError,
    MediaTypeError,
    OverloadedError,
    QuotaExceededError,
    SessionBusyError,
    SessionExistsError,
    SessionImportError,
    SessionNotFoundError,
    TurboServeError,
    UnknownParameterError,
)
from turboserve.messages import CheckImport, ExportSession, ImportSession

if TYPE_CHECKING:  # brings in NumPy, which the server can do without until somebody moves a session
    from turboserve.cache.disk.session_file import SessionFile, SessionHead

log = logging.getLogger(__name__)

_WRITTEN_AT_ONCE = 1 << 20
_DISCARD_S = 0.5  # for what a client still sends of a file that was refused

transfer_router = APIRouter(redirect_slashes=False)

_FILE = {"schema": {"type": "string", "format": "binary"}}


class ImportQuery(BaseModel):
    """The query of `POST /v1/sessions/import`: the session's name here; absent, the one that it had."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | None = None


@transfer_router.get(
    "/v1/sessions/{session_id}/export",
    response_class=Response,
    responses=failures(SessionBusyError, *OF_A_SESSION)
    | {200: {"content": {SESSION_TYPE: _FILE}, "description": "The session's file, see docs/replicas.md."}},
)
async def export_session(session_id: str, context: Context, tenant: Tenant) -> Response:
    """One of the caller's sessions with its compressed cache, for `POST /v1/sessions/import` of another server."""
    context.admit()
    with ExitStack() as until_sent:
        until_sent.enter_context(context.transfers.one(tenant))
        command = ExportSession(tenant, existing_session_id(session_id))
        exported = await engine_answer(context.engine.session(command))

        def pack() -> SessionFile | None:
            from turboserve.cache.disk.session_file import SessionFile

            found = exported.read()
            return None if found is None else SessionFile(exported.fields, *found, exported.tokens)

        file = await asyncio.to_thread(pack)
        if file is None:
            raise SessionNotFoundError(session_id)
        under_way = Mailbox()  # of which the shutdown knows that it waits for this
        context.drain.enter(under_way)
        until_sent.callback(context.drain.leave, under_way)
        sent = until_sent.pop_all()
    headers = {
        "Content-Length": str(file.num_bytes),
        "Content-Disposition": f'attachment; filename="{session_id}.session"',
        "X-Accel-Buffering": "no",
    }
    return _ExportResponse(file, sent, headers)


class _ExportResponse(StreamingResponse):
    """Sends a file and then lets go of what it needed, also when the client leaves or the answer never begins.

    A client that has left ends it: what is sent to nobody would be made to its end, and warned of slice by slice.
    """

    def __init__(self, file: SessionFile, sent: ExitStack, headers: Mapping[str, str]) -> None:
        super().__init__(_pieces(file), media_type=SESSION_TYPE, headers=headers)
        self._sent = sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._sent:
            sending = asyncio.create_task(super().__call__(scope, receive, send))
            departure = asyncio.create_task(wait_for_disconnect(receive))
            try:
                await asyncio.wait({sending, departure}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
                else:
                    log.info("the client left")
            finally:
                await stop(sending, departure)


async def _pieces(file: SessionFile) -> AsyncIterator[bytes]:
    for piece in file.slices():
        # What is sent to somebody who has left waits for nothing, so that nobody else would run until the file's end.
        await asyncio.sleep(0)
        yield bytes(piece)


@transfer_router.post(
    IMPORT_PATH,
    responses=failures(
        SessionImportError,
        KVFormatError,
        SessionExistsError,
        QuotaExceededError,
        MediaTypeError,
        BodyTooLargeError,
        UnknownParameterError,
        *OF_A_SESSION,
    ),
    openapi_extra={"requestBody": {"required": True, "content": {SESSION_TYPE: _FILE}}},
)
async def import_session(
    request: Request, query: Annotated[ImportQuery, Query()], context: Context, tenant: Tenant
) -> SessionObject:
    """Take in what another server exported, as a session of the caller's own; an existing one stays as it is."""
    context.admit()
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != SESSION_TYPE:
        raise MediaTypeError(f"Send the exported file with the header 'Content-Type: {SESSION_TYPE}'.")
    arriving = _Arriving(request.stream(), context.max_import_bytes)
    try:
        with context.transfers.one(tenant):
            arriving.check_declared(request.headers.get("content-length", ""))
            head = await arriving.head()
            name = check_session_id(query.id if query.id is not None else str(head.fields.get("session_id")), "id")
            await engine_answer(context.engine.session(CheckImport(tenant, name, head.fields)))
            arrays, tokens = await _spooled(arriving, head)
            command = ImportSession(tenant, name, head.fields, head.header, arrays, tokens)
            return session_object(await engine_answer(context.engine.session(command)))
    except TurboServeError:
        await arriving.discard()
        raise


async def _spooled(arriving: _Arriving, head: SessionHead) -> tuple[list[Any], Any]:
    """Arrays and tokens once all of it was verified. Raises SessionImportError, OverloadedError."""
    try:
        with tempfile.TemporaryFile(prefix="turboserve-import-") as file:
            await arriving.spool(head, file)
            return await asyncio.to_thread(_contents, file, head)
    except OSError as exc:
        log.warning("an import could not be kept while it arrived: %s", exc)
        raise OverloadedError(
            f"The server has no place for the file while it arrives ({exc.strerror or exc}); nothing was taken.",
            retry_after_s=RETRY_AFTER_S,
        ) from exc


def _contents(file: BinaryIO, head: SessionHead) -> tuple[list[Any], Any]:
    from turboserve.cache.disk.container import DamagedFileError
    from turboserve.cache.disk.session_file import read_contents

    file.seek(0)
    try:
        return read_contents(file, head)
    except DamagedFileError as exc:
        raise SessionImportError.broken(str(exc)) from exc


class _Arriving:
    """A body on its way: its head first, then the rest into a file, never more of it than the head announced."""

    def __init__(self, chunks: AsyncIterator[bytes], max_bytes: int) -> None:
        self._chunks, self._max_bytes = chunks, max_bytes
        self._held = b""
        self._head = b""

    def check_declared(self, content_length: str) -> None:
        """Raises BodyTooLargeError."""
        if content_length.isdigit() and int(content_length) > self._max_bytes:
            raise self._too_large(int(content_length))

    async def head(self) -> SessionHead:
        """Raises SessionImportError, and BodyTooLargeError for a file that announces too much."""
        from turboserve.cache.disk.container import DamagedFileError
        from turboserve.cache.disk.session_file import FIRST_BYTES, head_bytes, parse_head

        try:
            first = await self._take(FIRST_BYTES)
            self._head = first + await self._take(head_bytes(first) - FIRST_BYTES)
            head = parse_head(self._head)
        except DamagedFileError as exc:
            raise SessionImportError.broken(str(exc)) from exc
        if head.num_bytes > self._max_bytes:
            raise self._too_large(head.num_bytes)
        return head

    async def _take(self, num_bytes: int) -> bytes:
        while len(self._held) < num_bytes:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                raise SessionImportError.broken("it ends within its head")
            self._held += chunk
        taken, self._held = self._held[:num_bytes], self._held[num_bytes:]
        return taken

    async def spool(self, head: SessionHead, file: Any) -> None:
        """All of it into the file. Raises SessionImportError when it ends early or goes on, OSError."""
        await asyncio.to_thread(file.write, self._head)
        num_left = head.num_bytes - len(self._head)
        buffer = io.BytesIO()
        buffer.write(self._held)
        if buffer.tell() > num_left:
            raise SessionImportError.broken("it goes on behind its end")
        async for chunk in self._chunks:
            if buffer.tell() + len(chunk) > num_left:
                raise SessionImportError.broken("it goes on behind its end")
            buffer.write(chunk)
            if buffer.tell() >= _WRITTEN_AT_ONCE:
                num_left -= buffer.tell()
                await asyncio.to_thread(file.write, buffer.getvalue())
                buffer = io.BytesIO()
        if buffer.tell() != num_left:
            raise SessionImportError.broken(f"it ends {num_left - buffer.tell():,} bytes too early")
        await asyncio.to_thread(file.write, buffer.getvalue())

    async def discard(self) -> None:
        """Read on for a while: who is cut off while sending may never see why."""
        with contextlib.suppress(ClientDisconnect, TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                async for _ in self._chunks:
                    pass

    def _too_large(self, num_bytes: int) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"The exported session has {num_bytes:,} bytes, this server takes {self._max_bytes:,}: raise "
            "max_import_bytes."
        )
