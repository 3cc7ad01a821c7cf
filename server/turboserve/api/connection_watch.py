"""What a server must know of its connections beyond their bytes: how many there are, and who takes what is sent.

Owns the count of connections, which idle one gives way when there are too many, and how far a reader has come. Says
nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, Protocol

# More could lie in the system's buffer for a reader who takes nothing, and nobody would notice for long.
SEND_BUFFER_BYTES = 128 * 1024
CHECKS = 4  # in the time that a reader has; so much later at most is a stall noticed
MACOS_SO_NWRITE = 0x1024


class Closable(Protocol):
    """A connection as the limit sees it."""

    @property
    def is_idle(self) -> bool:
        """Nothing is being answered on it."""
        ...

    def give_way(self) -> None:
        """Close at once."""
        ...


class ConnectionLimit:
    """The open connections of one server, in the order in which they last did something."""

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._open: dict[Closable, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Closable) -> bool:
        """Counts a new connection; the one that has been idle longest gives way. False: all are busy."""
        if len(self._open) >= self._max_connections:
            longest_idle = next((known for known in self._open if known.is_idle), None)
            if longest_idle is None:
                return False
            self.leave(longest_idle)
            longest_idle.give_way()
        self._open[connection] = None
        return True

    def touch(self, connection: Closable) -> None:
        """It did something: others are idle for longer."""
        if connection in self._open:
            self._open[connection] = self._open.pop(connection)

    def leave(self, connection: Closable) -> None:
        """It is closed, or will be; no matter if it was never counted."""
        self._open.pop(connection, None)


class CountingTransport:
    """A transport that knows how many bytes were written to it; everything else is the transport's."""

    def __init__(self, transport: asyncio.Transport, on_write: Callable[[], None]) -> None:
        self._transport, self._on_write = transport, on_write
        self.num_written = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """As the transport's."""
        self.num_written += len(data)
        self._transport.write(data)
        self._on_write()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class ReaderWatch:
    """Tells when a reader has not acknowledged for too long what there was to read.

    All of it counts: one who takes a byte now and then would keep a connection, and what is held for it, for ever.
    A transport takes a few kilobytes into the system's buffer at once, so that its own buffer, and with it
    `pause_writing`, says nothing about readers of short answers and slow streams.
    """

    def __init__(self, transport: CountingTransport, timeout_s: float, on_stall: Callable[[], None]) -> None:
        self._transport, self._timeout_s, self._on_stall = transport, timeout_s, on_stall
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._num_due, self._since_s = 0, 0.0  # bytes in all that should be taken, and since when

    def wrote(self) -> None:
        """Something was written: watch until it is taken."""
        if self._timer is None:
            self._num_due, self._since_s = self._transport.num_written, self._loop.time()
            self._timer = self._loop.call_later(self._timeout_s / CHECKS, self._check)

    def stop(self) -> None:
        """The connection is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        num_pending = self._transport.get_write_buffer_size() + num_unacknowledged(self._transport)
        num_taken = self._transport.num_written - num_pending
        now_s = self._loop.time()
        if num_taken >= self._num_due:
            self._num_due, self._since_s = self._transport.num_written, now_s
        if num_pending and now_s - self._since_s >= self._timeout_s:
            self._on_stall()
        elif num_pending and not self._transport.is_closing():
            self._timer = self._loop.call_later(self._timeout_s / CHECKS, self._check)


def num_unacknowledged(transport: Any) -> int:
    """Bytes in the system's send buffer that the other side has not acknowledged; 0 where that cannot be told."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0
    with contextlib.suppress(OSError, ImportError, ValueError):
        if sys.platform == "linux":
            import fcntl
            import termios

            answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
            return int(struct.unpack("i", answer)[0])
        if sys.platform == "darwin":
            return int(sock.getsockopt(socket.SOL_SOCKET, MACOS_SO_NWRITE))
    return 0


def bound_send_buffer(sock: Any) -> None:
    """Let the system hold no more than a little for a reader; it may refuse."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
