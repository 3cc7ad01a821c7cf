"""How streams of each API look from outside: what bridges silence, where an event ends, how an error is told.

The router writes into streams of others: while a model is being loaded, and when its process has died.
"""

from __future__ import annotations

from dataclasses import dataclass

from turboserve.api.anthropic.replies import MessageReplies
from turboserve.api.anthropic_errors import anthropic_envelope, speaks_anthropic
from turboserve.api.replies import SSE_COMMENT, SSE_TYPE, dump, sse, sse_error
from turboserve.api.transfers import SESSION_TYPE
from turboserve.errors import TurboServeError

NDJSON_TYPE = "application/x-ndjson"
# By media type: what ends an event. Only whole events are passed on, so that one of ours can follow at any time.
EVENT_ENDS = {"text/event-stream": b"\n\n", NDJSON_TYPE: b"\n"}


# Passed on as they come, in pieces of whatever length.
FILES = frozenset({SESSION_TYPE})


def is_file(content_type: str) -> bool:
    """Whether a reply with this Content-Type may be large and has no events."""
    return content_type.partition(";")[0].strip().lower() in FILES


def event_end(content_type: str) -> bytes | None:
    """What ends an event of a reply with this Content-Type; None: it is no stream."""
    return EVENT_ENDS.get(content_type.partition(";")[0].strip().lower())


@dataclass(frozen=True, slots=True)
class StreamShape:
    """Of the stream that one request asks for."""

    path: str
    request_id: str

    media_type = SSE_TYPE

    @property
    def keep_alive(self) -> bytes:
        """Sent into a silent stream of server-sent events; b"": this API has nothing for that."""
        if self.path.startswith("/api/"):
            return b""
        return MessageReplies.keep_alive if speaks_anthropic(self.path) else SSE_COMMENT

    def failure(self, error: TurboServeError) -> bytes:
        """The error as the last event."""
        if speaks_anthropic(self.path):
            return b"event: error\ndata: " + dump(anthropic_envelope(error, self.request_id)) + b"\n\n"
        if self.path.startswith("/api/"):
            return dump({"error": error.told}) + b"\n"
        if self.path == "/v1/responses":
            told = {"code": error.code, "message": error.told, "param": error.param}
            return b"event: error\n" + sse({"type": "error", **told, "sequence_number": 0, **error.envelope()})
        return sse_error(error)


class WholeEvents:
    """Holds back the beginning of an event whose end has not come yet."""

    def __init__(self, end: bytes) -> None:
        self._end, self._rest = end, b""

    def take(self, data: bytes) -> bytes:
        """What of all bytes so far can be sent now."""
        data = self._rest + data
        cut = data.rfind(self._end) + len(self._end) if self._end in data else 0
        self._rest = data[cut:]
        return data[:cut]

    def rest(self) -> bytes:
        """What is left at the stream's end."""
        return self._rest
