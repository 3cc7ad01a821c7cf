"""Shutting down without cutting anybody off silently.

Owns whether the server still takes requests and which answers are under way. It decides
nothing about signals or sockets; `http_server.py` tells it when to begin and when time is up.
"""

from __future__ import annotations

from turboserve.engine.protocol import EventSink
from turboserve.errors import EngineUnavailableError
from turboserve.messages import Failed

REASON = "The server is shutting down."


class Drain:
    """Belongs to the event loop, except `begin`, which a signal handler may call."""

    def __init__(self) -> None:
        self._draining = False
        self._running: set[EventSink] = set()

    @property
    def draining(self) -> bool:
        """Whether the shutdown has begun."""
        return self._draining

    @property
    def num_running(self) -> int:
        """Answers under way."""
        return len(self._running)

    def begin(self) -> None:
        """From now on `check` refuses; what runs may finish. Idempotent."""
        self._draining = True

    def check(self) -> None:
        """Raises EngineUnavailableError once the server is shutting down."""
        if self._draining:
            raise EngineUnavailableError(REASON, retry_after_s=10)

    def enter(self, mailbox: EventSink) -> None:
        """Counts an answer as under way until `leave`."""
        self._running.add(mailbox)

    def leave(self, mailbox: EventSink) -> None:
        """The answer is over, however it ended."""
        self._running.discard(mailbox)

    def expire(self) -> None:
        """Ends every answer under way with an explicit error."""
        for mailbox in self._running:
            mailbox.put(Failed(EngineUnavailableError(f"{REASON} The grace period is over.", retry_after_s=10)))
