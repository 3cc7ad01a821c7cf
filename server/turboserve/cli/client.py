"""What the command line says to a running server, and what it makes of its refusals. Prints nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import h11
import httpx

from turboserve.errors import StartupError, without_advice
from turboserve.settings import Settings

TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 600.0  # of silence; the server itself says something every few seconds
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SESSION_TYPE = "application/vnd.turboserve.session"
_PIECE_BYTES = 1 << 18
# h11's come through httpx as they are where a body is sent.
_TRANSPORT_ERRORS = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, h11.ProtocolError, ValueError)
_PAGE = 100  # sessions that the server lists at once, at most


class ServerError(StartupError):
    """No answer, or a refusal; the message is one line with a cure. `status` is 0 where nobody answered."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: its text, the model's reasoning, or at the end why it ended and what it took."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


def server_url(url: str | None, settings: Settings) -> str:
    """As given, or where a server of these settings listens; without a slash or /v1 at its end."""
    if url:
        bare = url.strip().rstrip("/").removesuffix("/v1")
        return bare if "://" in bare else f"http://{bare}"
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port or 8000}"


class ServerClient:
    """One server. Every method raises ServerError."""

    def __init__(self, url: str, api_key: str = "", timeout_s: float = TIMEOUT_S) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            host = httpx.URL(url).host
            self._http = httpx.Client(
                base_url=url, headers=headers, timeout=timeout_s, trust_env=host not in LOOPBACK
            )  # a proxy knows nothing of this machine
        except (httpx.InvalidURL, ValueError, TypeError) as exc:
            raise ServerError(f"--url {url}: {exc}; expected a URL such as http://127.0.0.1:8000") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def stats(self) -> dict[str, Any]:
        return self._ask("GET", "/v1/kv/stats")

    def models(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask("GET", "/v1/models")["data"]
        return found

    def unready_reason(self) -> str | None:
        """None when a request sent now would be worked on; without advice when to ask again."""
        try:
            self._ask("GET", "/ready")
        except ServerError as exc:
            if exc.status != 503:
                raise
            return without_advice(str(exc))[0]
        return None

    def sessions(self) -> Iterator[dict[str, Any]]:
        """All of this caller, newest first."""
        after = ""
        while True:
            page = self._ask("GET", f"/v1/sessions?limit={_PAGE}{after}")
            yield from page["data"]
            if not page["has_more"]:
                return
            after = f"&after={quote(page['last_id'], safe='')}"

    def session(self, name: str) -> dict[str, Any]:
        return self._ask("GET", _session_path(name), session=name)

    def fork(self, name: str, new_name: str | None) -> dict[str, Any]:
        body = {} if new_name is None else {"id": new_name}
        return self._ask("POST", f"{_session_path(name)}/fork", body, session=name)

    def pin(self, name: str, pinned: bool) -> dict[str, Any]:
        return self._ask("POST", f"{_session_path(name)}/{'pin' if pinned else 'unpin'}", {}, session=name)

    def delete(self, name: str) -> None:
        self._ask("DELETE", _session_path(name), session=name)

    def export(self, name: str, write: Callable[[bytes], object]) -> None:
        """A session's file, given to `write` as it comes."""
        with self._transfer("GET", f"{_session_path(name)}/export", headers=_for_gateways(name)) as reply:
            for piece in reply.iter_bytes():
                write(piece)

    def take_in(self, file: BinaryIO, num_bytes: int, name: str | None) -> dict[str, Any]:
        """Have an exported session imported, `num_bytes` from a seekable file's begin. The server's answer: it."""
        query = "" if name is None else f"?id={quote(name, safe='')}"
        headers = {"Content-Type": SESSION_TYPE, "Content-Length": str(num_bytes)}
        headers |= _for_gateways(name or _name_in(file))
        file.seek(0)
        content = _pieces(file, num_bytes)
        with self._transfer("POST", f"/v1/sessions/import{query}", content=content, headers=headers) as reply:
            found: dict[str, Any] = json.loads(reply.read())
        return found

    @contextmanager
    def _transfer(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """A reply of many bytes, or to many."""
        try:
            timeout = httpx.Timeout(TIMEOUT_S, read=ANSWER_TIMEOUT_S, write=ANSWER_TIMEOUT_S)
            with self._http.stream(method, path, timeout=timeout, **options) as reply:
                if not reply.is_success:
                    reply.read()
                    raise self._refusal(reply)
                yield reply
        except _TRANSPORT_ERRORS as exc:
            raise self._silence(exc) from exc

    def answer(self, body: dict[str, Any]) -> Generator[Piece, None, None]:
        """The pieces of a chat completion as they come. Closing the generator ends the answer on the server."""
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            timeout = httpx.Timeout(TIMEOUT_S, read=ANSWER_TIMEOUT_S)
            headers = _for_gateways(wanted.get("session_id"))
            with self._http.stream(
                "POST", "/v1/chat/completions", json=wanted, timeout=timeout, headers=headers
            ) as reply:
                if reply.status_code != 200:
                    reply.read()
                    raise self._refusal(reply)
                for line in reply.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _piece(json.loads(line[6:]))
        except _TRANSPORT_ERRORS as exc:
            raise self._silence(exc) from exc

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, session: str | None = None
    ) -> dict[str, Any]:
        try:
            reply = self._http.request(method, path, json=body, headers=_for_gateways(session))
            if not reply.is_success:
                raise self._refusal(reply)
            found: dict[str, Any] = reply.json()
        except _TRANSPORT_ERRORS as exc:
            raise self._silence(exc) from exc
        return found

    def _refusal(self, reply: httpx.Response) -> ServerError:
        status = reply.status_code
        try:
            said = str(reply.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return ServerError(f"{self.url} answered {status}, and not as a turboserve does: check --url", status)
        if status == 401:
            return ServerError(f"{self.url} answered 401: {said} Set TURBOSERVE_API_KEY to the server's key.", status)
        return ServerError(said, status)

    def _silence(self, exc: Exception) -> ServerError:
        if isinstance(exc, httpx.TimeoutException):
            return ServerError(f"{self.url} did not answer in time: look at its log, or name another --url")
        if isinstance(exc, httpx.RemoteProtocolError | httpx.ReadError):
            return ServerError(f"{self.url} hung up in the middle ({exc}): look at its log, and ask again")
        return ServerError(
            f"no turboserve answers at {self.url} ({exc}): start one with `turboserve serve`, or set --url"
        )


def _for_gateways(session: object) -> dict[str, str]:
    """The header by which gateways know which server has a session; the server takes it for what the body says."""
    return {"X-Session-Id": session} if isinstance(session, str) and session.isascii() and session else {}


def _name_in(file: BinaryIO) -> str:
    """The name that an exported session had; "" where the file cannot be read, which the server then says."""
    from turboserve.cache.disk.session_file import FIRST_BYTES, head_bytes, parse_head  # late: brings in NumPy

    with contextlib.suppress(OSError, ValueError):
        file.seek(0)
        first = file.read(FIRST_BYTES)
        name = parse_head(first + file.read(head_bytes(first) - FIRST_BYTES)).fields.get("session_id")
        return name if isinstance(name, str) and name.isprintable() else ""
    return ""


def _pieces(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    """Exactly so many bytes, as was announced, of a file that others may still write to. Raises ServerError."""
    while num_bytes:
        try:
            piece = file.read(min(num_bytes, _PIECE_BYTES))
        except OSError as exc:
            raise ServerError(f"the session cannot be read: {exc.strerror or exc}") from exc
        if not piece:
            raise ServerError("the session's file became shorter while it was sent: export it again")
        num_bytes -= len(piece)
        yield piece


def _session_path(name: str) -> str:
    return f"/v1/sessions/{quote(name, safe='')}"


def _piece(event: dict[str, Any]) -> Piece:
    if "error" in event:
        raise ServerError(str(event["error"].get("message", "the answer broke off")), 500)
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return Piece(
        text=delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or "",
        finish_reason=choices[0].get("finish_reason"),
        usage=event.get("usage"),
    )
