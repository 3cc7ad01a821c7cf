"""Who may write which entry of a folder that several servers share: the system locks one byte of one file for each.

Byte-range locks belong to an open file of a living process. The kernel gives them back when the process ends, however
it ends, and a file server gives them back when a host's lease runs out; so no lock can be left behind, nothing has to
be found stale by its age, and no clock matters. A lock file for each entry would need all of that.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from turboserve.cache.disk.folder import FILE_MODE, Folder
from turboserve.errors import StartupError

LOCKS_NAME = "entries.lock"
# Bytes that stand for entries. Two entries on one byte only wait for each other.
_PLACES = 1 << 40
RETRY_S = 0.02
_TAKEN = (errno.EACCES, errno.EAGAIN)
# Linux: locks of the open file rather than of the process, so that two stores in one process are strangers too.
_SET = getattr(fcntl, "F_OFD_SETLK", None)


class EntryLockedError(Exception):
    """Another server is writing the entry."""


class EntryLocks:
    """The locks of one folder, for one server."""

    def __init__(self, root: Folder) -> None:
        """Raises StartupError where the file system has no such locks, OSError where the file cannot be made."""
        self._guard = threading.Lock()
        self._held: set[str] = set()  # for as long as something is done
        self._claimed: set[str] = set()  # until they are given back
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._handle = os.open(LOCKS_NAME, flags, FILE_MODE, dir_fd=root.handle)
        try:
            with self.hold("", wait_s=5.0):
                pass
        except (OSError, EntryLockedError) as exc:
            os.close(self._handle)
            raise StartupError(
                f"The folder {root.path} cannot be shared: its file system does not lock parts of files "
                f"({exc or type(exc).__name__}). Mount it with locks (NFS 4, or NFS 3 without `nolock`), or leave "
                "kv_store_shared off and give each server a folder of its own."
            ) from exc

    @contextmanager
    def hold(self, key: str, wait_s: float = 0.0) -> Iterator[None]:
        """While nobody else holds this key's lock. Raises EntryLockedError when that does not come about in time."""
        give_up_s = time.monotonic() + wait_s
        while not self._take(key, self._held):
            if time.monotonic() >= give_up_s:
                raise EntryLockedError
            time.sleep(RETRY_S)
        try:
            yield
        finally:
            self._leave(key, self._held)

    def claim(self, key: str) -> bool:
        """Keep others from this key until `disclaim`, beyond every `hold`; False: another server holds its lock now."""
        return self._take(key, self._claimed)

    def disclaim(self, key: str) -> None:
        """Others may have the key, once no `hold` goes on here."""
        self._leave(key, self._claimed)

    def claims(self) -> list[str]:
        """Keys that are claimed here."""
        with self._guard:
            return list(self._claimed)

    def _take(self, key: str, users: set[str]) -> bool:
        with self._guard:
            if not self._try(_place(key), fcntl.F_WRLCK):
                return False
            users.add(key)
            return True

    def _leave(self, key: str, users: set[str]) -> None:
        """The system knows one lock of ours on a key, however many there are of it here."""
        with self._guard:
            if key in users:
                users.discard(key)
                if key not in self._held and key not in self._claimed:
                    self._try(_place(key), fcntl.F_UNLCK)

    def _try(self, place: int, kind: int) -> bool:
        try:
            if _SET is not None:
                fcntl.fcntl(self._handle, _SET, struct.pack("@hhqqi4x", kind, os.SEEK_SET, place, 1, 0))
            else:
                how = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
                fcntl.lockf(self._handle, how, 1, place, os.SEEK_SET)
        except OSError as exc:
            if exc.errno in _TAKEN:
                return False
            raise
        return True

    def close(self) -> None:
        os.close(self._handle)


def _place(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % _PLACES
