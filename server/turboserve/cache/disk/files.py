"""Files that are either as they were or as they should be: atomic writes, the folder's lock, a write rate.

Raises OSError as the system does; what a failure means is store.py's business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable

from turboserve.cache.disk.folder import FILE_MODE, File, Folder
from turboserve.errors import StartupError

TEMPORARY = ".tmp"
"""Suffix of files that are being written; those found at start-up are rubbish."""

LOCK_NAME = "store.lock"


class StoreLockedError(StartupError):
    """Another process uses this store."""


def write_atomically(file: File, parts: Iterable[memoryview], after_write: Callable[[int], None]) -> None:
    """Write beside `file`, flush to the device, rename. `after_write` learns each part's bytes.

    Until the rename, and after any failure, `file` is as it was. The rename itself is only lasting after the
    folder's `sync`.
    """
    temporary = File(file.folder, file.name + TEMPORARY)
    temporary.delete()  # of a failure that could not clean up
    out = temporary.create()
    try:
        with out:
            for part in parts:
                written = 0
                while written < len(part):
                    written += out.write(part[written:]) or 0
                after_write(len(part))
            os.fsync(out.fileno())
        temporary.rename(file.name)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.delete()
        raise


def lock_folder(folder: Folder, *, read_only: bool = False, is_shared: bool = False) -> tuple[int, bool]:
    """Take a store's lock: an open descriptor (closing it gives the lock back), and whether files can be written.

    read_only: even where they could, nothing will be. is_shared: beside others that share it.

    Raises StoreLockedError when another process holds it, OSError when there can be no lock at all.
    """
    handle, is_writable = _open_lock(folder, read_only)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode) or os.fstat(handle).st_nlink > 1:
            raise OSError(errno.EINVAL, f"{LOCK_NAME} is not a file of the store's own")
        fcntl.flock(handle, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if is_writable and not is_shared:
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
    except BlockingIOError as exc:
        owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise StoreLockedError(
            f"The session store {folder.path} is in use by process {owner}: stop that server or choose another folder"
            f"{'' if is_shared else ', or have all of them share it (kv_store_shared)'}."
        ) from exc
    except BaseException:
        os.close(handle)
        raise
    return handle, is_writable


def _open_lock(folder: Folder, read_only: bool) -> tuple[int, bool]:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if not read_only:
        with contextlib.suppress(OSError):
            return os.open(LOCK_NAME, flags | os.O_RDWR | os.O_CREAT, FILE_MODE, dir_fd=folder.handle), True
    return os.open(LOCK_NAME, flags | os.O_RDONLY, dir_fd=folder.handle), False


class RateLimit:
    """Bytes per second, kept on average: whoever spends waits until that many bytes were allowed."""

    def __init__(
        self, bytes_per_s: float, wait: Callable[[float], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """wait(seconds) sleeps, and may return early when the limit no longer matters."""
        self._bytes_per_s, self._wait, self._clock = bytes_per_s, wait, clock
        self._free_at = clock()

    def spend(self, num_bytes: int) -> None:
        """Wait until these bytes were allowed; time in which nothing was spent is not saved up."""
        now = self._clock()
        self._free_at = max(self._free_at, now) + num_bytes / self._bytes_per_s
        self._wait(self._free_at - now)
