"""The outermost ASGI layer: every request passes here before any route is chosen.

Gives the request its id and its path's one spelling, refuses oversized headers, ambiguous framing, foreign hosts
and callers without the key, answers browsers that ask what a page may send, bounds what all bodies together take,
counts and logs the outcome, and has bugs below answered with a plain 500.
"""

from __future__ import annotations

import logging
import time
import uuid

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turboserve.api.aliases import PathAliases
from turboserve.api.anthropic_errors import speaks_anthropic
from turboserve.api.cors import CorsGuard
from turboserve.api.dashboard import needs_no_key
from turboserve.api.exception_replies import answer_exception
from turboserve.api.held_bytes import CountedBody, HeldBytes
from turboserve.api.security import HostGuard, Introduction, KeyGuard, RouterGuard, header
from turboserve.api.tracing import Tracing
from turboserve.errors import AuthenticationError, HeadersTooLargeError, InvalidRequestError
from turboserve.logs import request_id as log_request_id
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

logger = logging.getLogger("turboserve.api")

MAX_HEADER_BYTES = 64 * 1024  # ample for any client; a giant header costs us memory before we know who asks
# Answer without a key: a supervisor needs no secret, and a browser cannot send one for a page that a person opens.
# The description of the routes is the same on every server of this version and holds nothing of this one's.
OPEN_PATHS = frozenset({"/health", "/docs", "/openapi.json"})
PROBES = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds; who looks for them logs at debug
# The id of a request that makes an answer is the answer's.
ID_PREFIXES = {
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/messages": "msg_",
    "/v1/responses": "resp_",
}


class Frontdoor:
    """Sets `scope["state"]["request_id"]` and `["tenant"]` for the routes."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        telemetry: Telemetry,
        aliases: PathAliases,
        router_key: str = "",
        tracing: Tracing | None = None,
    ) -> None:
        """With `router_key`, only the router that knows it is let in; it says whose a request is."""
        self._tracing = tracing
        self._app, self._aliases = app, aliases
        self._router = RouterGuard(router_key)
        self._cors = CorsGuard(settings.cors_allowed_origins)
        self._hosts = HostGuard(settings)
        self._keys = KeyGuard((settings.api_key, *settings.api_keys))
        self._telemetry = telemetry
        self._held = HeldBytes(settings.max_held_bytes, telemetry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope["path"] = self._aliases.canonical(scope["path"])
        introduced = self._router.introduction(scope["headers"])
        visit = Visit(scope, send, self._cors.grants(scope["headers"]), introduced.request_id if introduced else None)
        if self._tracing is None:
            return await self._answer(visit, introduced, scope, receive, send)
        with self._tracing.request(scope["headers"]) as span:
            try:
                await self._answer(visit, introduced, scope, receive, send)
            finally:
                span.end(visit.method, visit.route, visit.status or 499, visit.request_id)

    async def _answer(
        self, visit: Visit, introduced: Introduction | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        body = CountedBody(receive, self._held, scope["path"])
        log_context = log_request_id.set(visit.request_id)
        try:
            self._check_headers(scope)
            preflight = self._cors.preflight(scope["method"], scope["headers"])
            if preflight is not None:
                return await _send_empty(visit, preflight)
            self._check_key(scope, introduced)
            await self._app(scope, body.receive, visit.send)
        except Exception as exc:
            answer = await answer_exception(Request(scope), exc)
            if answer.status_code in (400, 431):
                answer.headers["Connection"] = "close"
            if visit.status is None:
                await answer(scope, receive, visit.send)
        finally:
            body.close()
            self._record(visit)
            log_request_id.reset(log_context)

    def _check_headers(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(key) + len(value) + 4 for key, value in headers) > MAX_HEADER_BYTES:
            raise HeadersTooLargeError(f"The headers are larger than {MAX_HEADER_BYTES} bytes.")
        if header(headers, b"content-length") and header(headers, b"transfer-encoding"):
            raise InvalidRequestError("Content-Length and Transfer-Encoding exclude each other.")
        if scope["http_version"] not in ("1.0", "1.1"):
            raise InvalidRequestError("This server speaks HTTP/1.1, and no other version.")
        self._hosts.check(headers)

    def _check_key(self, scope: Scope, introduced: Introduction | None) -> None:
        try:
            if introduced is not None:
                scope["state"]["tenant"] = introduced.tenant
            elif self._router.is_alone:
                scope["state"]["tenant"] = self._keys.tenant(scope["headers"])
            else:
                raise AuthenticationError("This process answers its router only; ask that.")
        except AuthenticationError:
            if not (scope["path"] in OPEN_PATHS or needs_no_key(scope["method"], scope["path"], scope["headers"])):
                raise

    def _record(self, visit: Visit) -> None:
        # 499: the client had left before a status was sent.
        status = visit.status or 499
        self._telemetry.http_request(visit.route, status)
        fields = {"method": visit.method, "route": visit.route, "status": status, "ms": round(visit.elapsed_ms, 1)}
        level = logging.DEBUG if visit.route in PROBES else logging.INFO
        logger.log(level, "%s %s %d %.1f ms", *fields.values(), extra={"fields": fields})


async def _send_empty(visit: Visit, headers: list[tuple[bytes, bytes]]) -> None:
    await visit.send({"type": "http.response.start", "status": 204, "headers": headers})
    await visit.send({"type": "http.response.body", "body": b""})


class Visit:
    """One request as the log sees it: never its path as typed, its query or its body."""

    def __init__(
        self, scope: Scope, send: Send, more_headers: list[tuple[bytes, bytes]], request_id: str | None = None
    ) -> None:
        """`request_id`: the router's, which has told it to the caller already; None: a new one."""
        scope.setdefault("state", {})
        self.request_id: str = request_id or ID_PREFIXES.get(scope["path"], "req-") + uuid.uuid4().hex
        scope["state"]["request_id"] = self.request_id
        self.status: int | None = None
        self._scope = scope
        self._send = send
        names = [b"x-request-id", *([b"request-id"] if speaks_anthropic(scope["path"]) else ())]
        self._headers = [*((name, self.request_id.encode()) for name in names), *more_headers]
        self._start = time.perf_counter()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._headers]
        await self._send(message)

    @property
    def method(self) -> str:
        """Bounded and printable: methods are tokens of the caller's choice."""
        return ascii(self._scope["method"])[1:17].rstrip("'")

    @property
    def route(self) -> str:
        """The route's template, so that labels and log lines stay few and harmless."""
        return str(getattr(self._scope.get("route"), "path", "unmatched"))

    @property
    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self._start) * 1000
