"""Messages between rank 0 and the others, over TCP beside MLX's collectives.

A collective of MLX waits for ever for a rank that is gone, and can carry arrays alone. So what a step does, what ranks
agree upon and signs of life go another way, which notices at once when a process ends (its connection closes), within
seconds when a machine is gone (the system's keepalive, answered without this process's help), and a little later when a
process lives and says nothing more.

Messages are JSON arrays behind their length. Every connection begins with a secret that rank 0 has drawn and MLX's own
collective has carried. Owns sockets and the threads that read them; what messages mean is of no interest here.
"""

from __future__ import annotations

import hmac
import json
import logging
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Message = list[Any]

CONNECT_S = 30.0
BEAT_S = 1.0
SILENCE_S = 60.0  # a process that lives says something every second, unless it holds Python's lock in a long call
# A machine without power or network answers no probe: three of them, a second apart.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 1, 1, 3
_LENGTH = struct.Struct("!I")
_BEAT: Message = ["beat"]
_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps makes an encoder for each message


class PeerGoneError(Exception):
    """The other end is gone. The message says how that was noticed."""


class Connection:
    """One connection; messages may be sent from several threads, and are received by one."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._lock = sock, threading.Lock()
        sock.settimeout(SILENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
        if idle is not None:
            sock.setsockopt(socket.IPPROTO_TCP, idle, KEEPALIVE_IDLE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # the same for what was sent and nobody acknowledges
            lost_ms = 1000 * (KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_PROBES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, lost_ms)

    def send(self, message: Message) -> None:
        """Raises PeerGoneError."""
        content = _encode(message).encode()
        try:
            with self._lock:
                self._socket.sendall(_LENGTH.pack(len(content)) + content)
        except OSError as exc:
            raise PeerGoneError(_told(exc)) from exc

    def receive(self) -> Message:
        """The next message that is no sign of life. Raises PeerGoneError."""
        while True:
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            message: Message = json.loads(self._read(length))
            if message != _BEAT:
                return message

    def _read(self, num_bytes: int) -> bytes:
        parts, left = [], num_bytes
        while left:
            try:
                part = self._socket.recv(min(left, 1 << 20))
            except OSError as exc:
                raise PeerGoneError(_told(exc)) from exc
            if not part:
                raise PeerGoneError("its connection closed")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """A thread that waits for a message is told that the peer is gone."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("a connection was closed already")
        self._socket.close()


def _told(exc: OSError) -> str:
    if isinstance(exc, TimeoutError) and exc.errno is None:
        return f"it said nothing for {SILENCE_S:.0f} s"
    return exc.strerror or str(exc) or type(exc).__name__


class Inbox:
    """What one connection brings, read by a thread of its own, and signs of life sent by another."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        on_gone: Callable[[str], None],
        takes: Callable[[Message], bool] = lambda message: False,
    ) -> None:
        """on_gone: told once, on that thread, why nothing more comes. takes: messages that are not to be waited for."""
        self.connection, self._name, self._on_gone, self._takes = connection, name, on_gone, takes
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        for work in (self._read, self._beat):
            threading.Thread(target=work, name=f"{name} {work.__name__}", daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                message = self.connection.receive()
                if not self._takes(message):
                    self._messages.put(message)
        except PeerGoneError as exc:
            self._on_gone(str(exc))
        except Exception as exc:
            log.exception("%s sends what cannot be understood", self._name)
            self._on_gone(f"it sends what cannot be understood ({type(exc).__name__})")
        finally:
            self._messages.put(None)

    def _beat(self) -> None:
        try:
            while True:
                self.connection.send(_BEAT)
                time.sleep(BEAT_S)
        except PeerGoneError:
            return  # whoever reads hears of it as well

    def next(self, timeout_s: float | None = None) -> Message:
        """Waits for it. Raises PeerGoneError once nothing more comes, and TimeoutError when nothing came in time."""
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            self._messages.put(None)
            raise PeerGoneError("it is gone")
        return message


class Listener:
    """Rank 0's door, open until all others are there."""

    def __init__(self, host: str) -> None:
        """Raises OSError when this machine has no such address."""
        self._socket = socket.create_server((host, 0), backlog=64)
        self._socket.settimeout(1.0)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def accept(self, secret: str, num_others: int) -> dict[int, Connection]:
        """By rank, once all are there; nobody else comes in. Raises TimeoutError when one does not come.

        Strangers are sent away.
        """
        try:
            return self._accept(secret, num_others)
        finally:
            self._socket.close()

    def _accept(self, secret: str, num_others: int) -> dict[int, Connection]:
        found: dict[int, Connection] = {}
        ends_s = time.monotonic() + CONNECT_S
        while len(found) < num_others:
            if time.monotonic() > ends_s:
                missing = sorted(set(range(1, num_others + 1)) - found.keys())
                raise TimeoutError(f"rank {', '.join(map(str, missing))} did not connect within {CONNECT_S:.0f} s")
            try:
                sock, _ = self._socket.accept()
            except TimeoutError:
                continue
            connection = Connection(sock)
            rank = _rank_of(sock, connection, secret)
            if rank is None or rank in found or not 1 <= rank <= num_others:
                connection.close()
            else:
                found[rank] = connection
        return found


def _rank_of(sock: socket.socket, connection: Connection, secret: str) -> int | None:
    """Of who says the secret at once; None: a stranger."""
    sock.settimeout(2.0)
    try:
        said = connection.receive()
        is_right = len(said) == 3 and said[0] == "hello" and hmac.compare_digest(str(said[2]), secret)
        return int(said[1]) if is_right else None
    except (PeerGoneError, ValueError, TypeError, LookupError, MemoryError):
        return None
    finally:
        sock.settimeout(SILENCE_S)


def connect(host: str, port: int, rank: int, secret: str) -> Connection:
    """From another rank to rank 0. Raises OSError."""
    connection = Connection(socket.create_connection((host, port), timeout=CONNECT_S))
    connection.send(["hello", rank, secret])
    return connection
