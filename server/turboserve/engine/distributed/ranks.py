"""The processes that serve one model together: what they agree upon, and what happens when one is gone.

Agreement goes through rank 0: every rank says something under a name and gets what all have said. The names have to
come in the same order everywhere, which is checked. `ALONE` is a process by itself, which agrees with itself.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from turboserve.engine.distributed.channel import (
    Connection,
    Inbox,
    Listener,
    Message,
    PeerGoneError,
    connect,
)
from turboserve.engine.distributed.place import Place
from turboserve.errors import StartupError

log = logging.getLogger(__name__)

NOTICE_S = 1.0  # MLX's ring may fail a moment before the closed connection is read
_MOST_CHARS = 512  # of where rank 0 can be reached


def _nobody(*told: object) -> None:
    """Told, and does nothing."""


class RanksEndedError(BaseException):
    """The ranks do not go on together. No Exception: nobody recovers from it but the engine's end."""


class Ranks:
    """This process's view of all ranks. `exchange` on one thread only."""

    rank, size = 0, 1
    group: Any = None  # mx.distributed.Group

    def exchange(self, what: str, value: Any) -> list[Any]:
        """What each rank says under this name, by rank; a JSON value. Raises RanksEndedError."""
        return [value]

    def all_agree(self, what: str, verdict: bool) -> bool:
        """Whether it is so on every rank."""
        return all(self.exchange(what, verdict))

    def least(self, what: str, number: int) -> int:
        """The smallest of all ranks' numbers."""
        return int(min(self.exchange(what, number)))

    def check_same(self, what: str, value: Any, complaint: str) -> None:
        """Raises StartupError with this complaint unless every rank says the same."""
        said = self.exchange(what, value)
        other = next((rank for rank, one in enumerate(said) if one != said[0]), None)
        if other is not None:
            raise StartupError(f"--distributed: rank {other} {complaint}.")


ALONE = Ranks()


class FirstRank(Ranks):
    """Rank 0's."""

    def __init__(self, group: Any, connections: dict[int, Connection]) -> None:
        self.group, self.size = group, int(group.size())
        self.lost: str | None = None  # why the run is over
        self.on_lost: Callable[[str], None] = _nobody  # told once, on another thread
        self.on_leaving: Callable[[], None] = _nobody  # a rank was asked to end, and asks for everybody's end
        self._is_ending, self._is_lost = False, threading.Event()
        self._inboxes = {
            rank: Inbox(connection, f"rank {rank}", partial(self._lose, rank), partial(self._takes, rank))
            for rank, connection in sorted(connections.items())
        }

    def _lose(self, rank: int, why: str) -> None:
        if self._is_ending or self.lost is not None:
            return
        self._give_up(f"rank {rank} of {self.size} is gone: {why}")

    def _takes(self, rank: int, message: Message) -> bool:
        """What a rank says unasked."""
        if message[0] == "failed":
            self._give_up(f"rank {rank} of {self.size}: {message[1]}")
        elif message[0] == "leaving":
            self.on_leaving()
        return message[0] in ("failed", "leaving")

    def _give_up(self, why: str) -> None:
        self.lost = why
        self._is_lost.set()
        log.critical("%s; all ranks end", why)
        self.on_lost(why)

    def explain(self) -> None:
        """After a failure on this device. Raises RanksEndedError when another rank is gone, noticed or not yet."""
        if self._is_lost.wait(NOTICE_S):
            raise RanksEndedError(self.lost)

    def end_because(self, why: str) -> NoReturn:
        """End the run with a reason of this rank's. Raises RanksEndedError."""
        self.lost = self.lost or why
        log.critical("%s; all ranks end", self.lost)
        self._send_all(["end", self.lost])
        raise RanksEndedError(self.lost)

    def exchange(self, what: str, value: Any) -> list[Any]:
        values = [value]
        for rank in self._inboxes:
            said = self.receive(rank)
            if said[:2] != ["say", what]:
                self.end_because(f"rank {rank} is at {said[:2]} where rank 0 is at {what!r}")
            values.append(said[2])
        self.send(["said", what, values])
        return values

    def receive(self, rank: int) -> Message:
        """The next message of a rank. Raises RanksEndedError."""
        try:
            return self._inboxes[rank].next()
        except PeerGoneError as exc:
            raise RanksEndedError(self.lost or f"rank {rank}: {exc}") from exc

    def send(self, message: Message) -> None:
        """To all others. Raises RanksEndedError when one is gone."""
        if self.lost is not None:
            raise RanksEndedError(self.lost)
        try:
            for inbox in self._inboxes.values():
                inbox.connection.send(message)
        except PeerGoneError as exc:
            self.lost = self.lost or f"a rank is gone: {exc}"
            raise RanksEndedError(self.lost) from exc

    def _send_all(self, message: Message) -> None:
        for inbox in self._inboxes.values():
            try:
                inbox.connection.send(message)
            except PeerGoneError:
                log.debug("a rank is gone already")

    def close(self) -> None:
        """The others end, in order."""
        self._is_ending = True
        self._send_all(["close"])
        self.on_lost = self.on_leaving = _nobody  # threads that still read keep nothing alive


class OtherRank(Ranks):
    """Of a rank that follows rank 0. When that is gone the process ends, whatever it waits for."""

    def __init__(self, group: Any, connection: Connection) -> None:
        self.group, self.rank, self.size = group, int(group.rank()), int(group.size())
        self._connection, self._is_ending = connection, False
        self._inbox = Inbox(connection, "rank 0", self._on_gone)

    def _on_gone(self, why: str) -> None:
        if not self._is_ending:
            log.critical("rank 0 is gone: %s; rank %d ends", why, self.rank)
            logging.shutdown()
            os._exit(1)  # the main thread may be in a collective, which nothing else ends

    def exchange(self, what: str, value: Any) -> list[Any]:
        self.send(["say", what, value])
        answer = self.receive()
        if answer[:2] != ["said", what]:
            raise RanksEndedError(f"rank 0 is at {answer[:2]} where rank {self.rank} is at {what!r}")
        return list(answer[2])

    def receive(self, timeout_s: float | None = None) -> Message:
        """Rank 0's next message. Raises RanksEndedError, and TimeoutError when there is none by then."""
        try:
            message = self._inbox.next(timeout_s)
        except PeerGoneError as exc:
            raise RanksEndedError(str(exc)) from exc
        if message[0] == "end":
            self._is_ending = True
            raise RanksEndedError(str(message[1]))
        return message

    def send(self, message: Message) -> None:
        """To rank 0. Raises RanksEndedError."""
        try:
            self._connection.send(message)
        except PeerGoneError as exc:
            raise RanksEndedError(str(exc)) from exc

    def close(self, failure: str | None = None) -> None:
        """Tell rank 0 why, and be gone."""
        self._is_ending = True
        try:
            if failure is not None:
                self._connection.send(["failed", failure])
        except PeerGoneError:
            log.debug("rank 0 is gone already")
        self._connection.close()


def join(place: Place) -> FirstRank | OtherRank:
    """Find the others, by MLX's collectives and then over TCP. Blocks until all are there. Raises StartupError."""
    try:
        group: Any = mx.distributed.init(strict=True)
    except RuntimeError as exc:
        raise StartupError(
            f"--distributed: the ranks cannot be joined ({' '.join(str(exc).split())}): see docs/distributed.md."
        ) from exc
    if group.size() < 2:
        raise StartupError(
            "--distributed: there is one rank only: start two or more with mlx.launch, or leave the flag out."
        )
    if group.rank() == 0:
        return _as_first(group, place.first_host)
    host, port, secret = json.loads(_from_first(group, ""))
    try:
        return OtherRank(group, connect(host, port, int(group.rank()), secret))
    except (OSError, PeerGoneError) as exc:
        raise StartupError(f"--distributed: rank 0 cannot be reached at {host}:{port} ({exc}).") from exc


def _as_first(group: Any, host: str) -> FirstRank:
    try:
        listener = Listener(host)
    except OSError as exc:
        _from_first(group, json.dumps([host, 0, ""]))  # the others wait for it
        raise StartupError(
            f"--distributed: rank 0 cannot listen on {host} ({exc.strerror or exc}): name an address of its machine "
            "in the hostfile."
        ) from exc
    secret = secrets.token_hex(32)
    _from_first(group, json.dumps([host, listener.port, secret]))
    try:
        return FirstRank(group, listener.accept(secret, int(group.size()) - 1))
    except TimeoutError as exc:
        raise StartupError(f"--distributed: {exc}.") from exc


def _from_first(group: Any, text: str) -> str:
    """Rank 0's text, on every rank."""
    assert len(text) <= _MOST_CHARS and text.isascii()
    codes = [ord(char) for char in text] + [0] * (_MOST_CHARS - len(text))
    total: Any = mx.distributed.all_sum(mx.array(codes, mx.int32), group=group).tolist()
    return "".join(chr(code) for code in total if code)


def machine() -> str:
    """Tells machines apart: processes on one of them share its memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"
