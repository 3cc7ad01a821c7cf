"""Which web pages may call the API from a browser: an allow-list of origins, empty by default.

A page's origin is no proof of who asks: the key is asked for all the same. Only the preflight is answered without
one, because browsers send none with it; it tells the page what it may send, and nothing of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from turboserve.api.security import RawHeaders, header

METHODS = b"GET, HEAD, POST, DELETE"
# What a script may read of our replies beside the few headers that it always may.
EXPOSED = b"x-request-id, retry-after, x-session-id, x-turboserve-ignored"
MAX_AGE_S = b"600"
# Header names as a browser lists them; the length bounds what we repeat.
HEADER_LIST = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,1000}")


class CorsGuard:
    """Tells which headers a reply needs so that a browser shows it to the page that asked."""

    def __init__(self, allowed_origins: Iterable[str]) -> None:
        self._allowed = {origin.encode() for origin in allowed_origins}

    def grants(self, headers: RawHeaders) -> list[tuple[bytes, bytes]]:
        """For any reply, errors included: the page's origin and what it may read. Empty for pages not allowed."""
        if not self._allowed:
            return []
        # Replies differ by origin, which a shared cache has to know even of those without a grant.
        vary = [(b"vary", b"Origin")]
        origin = header(headers, b"origin")
        if not self._is_allowed(origin):
            return vary
        return [*vary, (b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED)]

    def preflight(self, method: str, headers: RawHeaders) -> list[tuple[bytes, bytes]] | None:
        """The answer's headers beside `grants`, when this is an allowed page's question what it may send."""
        is_question = method == "OPTIONS" and header(headers, b"access-control-request-method")
        if not (is_question and self._is_allowed(header(headers, b"origin"))):
            return None
        answer = [(b"access-control-allow-methods", METHODS), (b"access-control-max-age", MAX_AGE_S)]
        wanted = header(headers, b"access-control-request-headers")
        if HEADER_LIST.fullmatch(wanted):  # clients' libraries add many of their own; none of them can do harm
            answer.append((b"access-control-allow-headers", wanted))
        if header(headers, b"access-control-request-private-network") == b"true":
            answer.append((b"access-control-allow-private-network", b"true"))
        return answer

    def _is_allowed(self, origin: bytes) -> bool:
        return bool(origin) and (b"*" in self._allowed or origin.lower() in self._allowed)
