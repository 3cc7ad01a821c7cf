"""The dashboard's files: the page at `/` for browsers, and what it loads from `/dashboard/`.

Owns their headers, their compression and which of them exist; what they do is in `turboserve/dashboard`. They are the
same on every server of this version and hold nothing of this one's, so they need no key. The page asks for it, because
a browser sends none for a page that a person opens; `key.json` tells it whether to.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from turboserve.api.security import RawHeaders, header
from turboserve.errors import RouteNotFoundError

PREFIX = "/dashboard/"
PAGE = "index.html"
KEY_NOTE = "key.json"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts and styles are files of ours alone: a text that slips through as HTML still cannot run or load anything.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file as it is sent. `etag` names the plain content; the compressed one has its own."""

    plain: bytes
    packed: bytes
    media_type: str
    etag: str


@cache
def assets() -> Mapping[str, Asset]:
    """All files that are served, by their path under PREFIX."""
    return dict(_found(files("turboserve").joinpath("dashboard"), ""))


def _found(folder: Traversable, prefix: str) -> list[tuple[str, Asset]]:
    found = []
    for entry in folder.iterdir():
        suffix = "." + entry.name.rpartition(".")[2]
        if entry.is_dir():
            found += _found(entry, f"{prefix}{entry.name}/")
        elif suffix in MEDIA_TYPES:
            plain = entry.read_bytes()
            etag = hashlib.sha256(plain).hexdigest()[:32]
            packed = gzip.compress(plain, compresslevel=9, mtime=0)
            found.append((prefix + entry.name, Asset(plain, packed, MEDIA_TYPES[suffix], etag)))
    return found


def wants_page(headers: RawHeaders) -> bool:
    """Whether who asks for `/` is a browser: API clients accept JSON or anything, and never name HTML."""
    return b"text/html" in header(headers, b"accept").lower()


def needs_no_key(method: str, path: str, headers: RawHeaders) -> bool:
    """Whether a request is for a file of the dashboard, the page included."""
    return method == "GET" and (path.startswith(PREFIX) or (path == "/" and wants_page(headers)))


def page_response(request: Request) -> Response:
    """The page itself; `/` answers others with JSON, so caches are told what the answer depends on."""
    return _response(request, PAGE, vary="Accept, Accept-Encoding")


def _response(request: Request, name: str, vary: str) -> Response:
    """The file, or 304 where the browser has it. Raises RouteNotFoundError."""
    asset = assets().get(name)
    if asset is None:
        raise RouteNotFoundError("There is no such file; GET / has the page.")
    is_packed = "gzip" in request.headers.get("accept-encoding", "").lower()
    etag = f'"{asset.etag}{"-gzip" if is_packed else ""}"'
    # Asked for again each time, because modules import each other by fixed names; unchanged ones cost a 304.
    headers = {**SECURITY_HEADERS, "ETag": etag, "Cache-Control": "no-cache", "Vary": vary}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if is_packed:
        headers["Content-Encoding"] = "gzip"
    return Response(asset.packed if is_packed else asset.plain, media_type=asset.media_type, headers=headers)


class AssetRoute(Route):
    """Files are no part of the API, so this is no APIRoute and `/openapi.json` has none of them."""

    def __init__(self, *, needs_key: bool) -> None:
        """`needs_key`: whether requests do, which the page asks before it is refused."""
        super().__init__(PREFIX + "{name:path}", self._answer, methods=["GET"])
        self._key_note = b'{"is_needed":true}' if needs_key else b'{"is_needed":false}'

    async def _answer(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == KEY_NOTE:
            headers = {**SECURITY_HEADERS, "Cache-Control": "no-store"}
            return Response(self._key_note, media_type="application/json", headers=headers)
        return _response(request, name, vary="Accept-Encoding")

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As usual; the log and the metrics know it by its template."""
        match, child_scope = super().matches(scope)
        return match, {**child_scope, "route": self}
