"""DiskStore: conversations on disk, written by one background thread that knows nothing of MLX.

Owns the folder (under a lock), the queue, the size limit and the failures. `put` only queues: what is
queued is held in memory, bounded by `max_pending_bytes`, and can already be had by `get`. A file is
complete or absent: written beside its place, flushed, renamed; an entry's own file comes last. Whatever
is damaged is dropped and counted, a full or read-only disk switches writing off with a reason; neither
is ever raised. Which conversation is worth a file is the memory's business.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from turboserve.cache.disk import files, layout, scan
from turboserve.cache.disk.container import Array, DamagedFileError
from turboserve.cache.disk.folder import File
from turboserve.cache.disk.index import Entry, Index
from turboserve.cache.disk.layout import StoreFolder
from turboserve.cache.disk.reading import DamagedPieceError, read_entry
from turboserve.cache.disk.switch import Switch
from turboserve.cache.disk.writing import Job, Stopped, new_bytes, write_job
from turboserve.cache.interfaces import OwnDisk, StoredEntry
from turboserve.messages import DiskStatus

log = logging.getLogger(__name__)

MiB = 1 << 20
DEFAULT_PENDING_BYTES = 256 * MiB  # the stated scratch of writing; one conversation alone may exceed it
CLOSE_S = 10.0
CLOCK_STEP_S = 1e-3  # between two uses at least: what file systems tell apart
STOP_S = 10.0  # for the piece that is being written when time is up
_NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class DiskCounts:
    """What the store did since it was opened."""

    written: int = 0
    written_bytes: int = 0
    read: int = 0
    refused: int = 0  # put() said no
    dropped: int = 0  # the least recently used, for room
    write_failures: int = 0
    integrity_failures: int = 0  # damaged files


class _Rubbish(NamedTuple):
    """A file to be deleted, unless its entry or piece is needed again by then."""

    file: File
    key: str | None = None
    piece: str | None = None


class DiskStore(OwnDisk):
    """The real SessionDisk (cache/interfaces.py). All methods may be called from any thread."""

    def __init__(
        self,
        path: Path,
        *,
        limit_bytes: int,
        write_rate: float,
        fingerprint: str,
        max_pending_bytes: int = DEFAULT_PENDING_BYTES,
        clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens or makes the folder and learns what is in it.

        limit_bytes: of all files together. write_rate: bytes per second, on average. fingerprint: of
        everything that gives stored caches their meaning; entries under another one are not offered. clock: Unix
        time, which orders entries by their last use across restarts, and may jump.
        Raises StoreLockedError when another process has the folder, StoreFolderError when it is something
        else than a store; any other trouble only shows in `status`.
        """
        self.path = path
        self._limit_bytes, self._max_pending_bytes = limit_bytes, max_pending_bytes
        self._fingerprint, self._clock = fingerprint, clock
        self._index, self._counts = Index(), DiskCounts()
        self._changed = threading.Condition()
        self._pending: dict[str, Job] = {}
        self._writing: Job | None = None
        self._trash: list[_Rubbish] = []
        self._switch = Switch(steady_clock)
        self._latest_s = 0.0  # the last use of any entry
        self._is_closing = False
        self._hurry, self._stop = threading.Event(), threading.Event()
        self._rate = files.RateLimit(write_rate, self._hurry.wait)
        self._folder: StoreFolder | None = None
        self._lock_handle: int | None = None
        self._thread: threading.Thread | None = None
        self._open()

    # The folder.

    def _open(self) -> None:
        try:
            self._folder = layout.open_store_folder(self.path)
            self._lock_handle, is_writable = files.lock_folder(self._folder.root, is_shared=self.is_shared)
            if is_writable:
                self._folder.make_private()
            found = self._look_around(self._folder, is_writable=is_writable)
        except files.StoreLockedError:
            self._close_folder()
            raise
        except OSError as exc:
            self._close_folder()
            self._switch.turn_off(exc.strerror or str(exc))
            log.warning("the session store %s is off: %s", self.path, self._switch.reason)
            return
        for entry in found.entries:
            self._index.add(entry)
            self._latest_s = max(self._latest_s, entry.last_used_s)
        for file, why in found.damaged.items():
            log.warning("the session store drops %s: %s", file.name, why)
        self._count(integrity_failures=len(found.damaged))
        self._trash = [_Rubbish(file) for file in (*found.damaged, *found.leftovers)]
        if not is_writable:
            self._trash = []
            self._switch.turn_off("the folder is read-only")
            return
        self._thread = threading.Thread(target=self._work, name="kv-store", daemon=True)
        self._thread.start()

    def _look_around(self, folder: StoreFolder, *, is_writable: bool) -> scan.Found:
        """What is there when the folder is opened."""
        return scan.scan(folder, self._fingerprint)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what is queued, no longer at a limited rate, for at most `timeout_s`; give the lock back."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._hurry.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._stop.set()
            self._thread.join(STOP_S)
        if not (self._thread and self._thread.is_alive()):
            with self._changed:
                self._close_folder()

    def _close_folder(self) -> None:
        if self._lock_handle is not None:
            os.close(self._lock_handle)
        if self._folder is not None:
            self._folder.close()
        self._lock_handle = self._folder = None

    # What the memory sees.

    def put(self, key: str, meta: Mapping[str, Any], header: Mapping[str, Any], arrays: Sequence[Array]) -> bool:
        """Queue a conversation. Arrays must not change afterwards.

        Its pieces are shared on disk only with entries whose meta has the same `salt`. An entry of this key stays
        until the new one is durable. False: the store is off, closing, or has too much queued.
        """
        job = Job(key, dict(meta), dict(header), list(arrays), scope=self._scope(key, meta))
        with self._changed:
            too_much = self._pending and self.pending_bytes + job.num_bytes > self._max_pending_bytes
            if not self._accepts() or too_much or job.num_bytes > self._limit_bytes:
                self._count(refused=1)
                return False
            self._pending.pop(key, None)
            self._pending[key] = job
            self._changed.notify_all()
        return True

    def _scope(self, key: str, meta: Mapping[str, Any]) -> str | None:
        """Within which pieces are shared; None: the caller's."""
        return None

    def get(self, key: str) -> tuple[Mapping[str, Any], Mapping[str, Any], list[Array]] | None:
        """Meta, header and arrays as they were put; None when they are gone or damaged."""
        with self._changed:
            if key in self._pending:
                job = self._pending[key]
                return job.meta, job.header, list(job.arrays)
            entry = self._index.get(key)
            if entry is None or entry.is_foreign or self._folder is None:
                return None
            entry.num_readers += 1
            folder = self._folder
        try:
            fields, arrays = self._read(folder, key)
        except (DamagedFileError, OSError) as exc:
            self._drop_damaged(entry, exc)
            return None
        except MemoryError:
            log.warning("a stored conversation does not fit into memory now")
            return None
        finally:
            with self._changed:
                entry.num_readers -= 1
        self._note_use(entry)
        self._count(read=1)
        return fields["meta"], fields["header"], arrays

    def _read(self, folder: StoreFolder, key: str) -> tuple[dict[str, Any], list[Array]]:
        """An entry's fields and arrays. Raises DamagedFileError, OSError."""
        return read_entry(folder, key)

    def delete(self, key: str) -> None:
        """Forget an entry, written or queued; its files go in the background."""
        with self._changed:
            for job in (self._pending.pop(key, None), self._writing):  # they differ when a key was put twice
                if job is not None and job.key == key:
                    job.is_cancelled = True
            self._drop(key)

    def entries(self) -> list[StoredEntry]:
        """What is on disk under this fingerprint."""
        with self._changed:
            return [StoredEntry(e.key, e.meta, e.num_bytes) for e in self._index if not e.is_foreign]

    def entry(self, key: str) -> StoredEntry | None:
        """What is on disk under a key and this fingerprint, whatever is queued for it."""
        with self._changed:
            entry = self._index.get(key)
            return None if entry is None or entry.is_foreign else StoredEntry(key, entry.meta, entry.num_bytes)

    def entry_bytes(self, key: str) -> int | None:
        """Bytes of an entry, shared pieces included; None when it is gone."""
        with self._changed:
            if key in self._pending:
                return self._pending[key].num_bytes
            entry = self._index.get(key)
            return None if entry is None or entry.is_foreign else entry.num_bytes

    def status(self) -> DiskStatus:
        with self._changed:
            num_entries = sum(not entry.is_foreign for entry in self._index)
            return DiskStatus(
                is_enabled=True,
                is_writable=self._accepts(),
                reason=self._switch.reason,
                num_bytes=self._index.total_bytes,
                limit_bytes=self._limit_bytes,
                num_entries=num_entries,
                num_damaged=self._counts.integrity_failures,
                pending_bytes=self.pending_bytes,
            )

    @property
    def counts(self) -> DiskCounts:
        return self._counts

    @property
    def pending_bytes(self) -> int:
        """Held in memory until written."""
        with self._changed:
            writing = self._writing
            held = sum(job.num_bytes for job in self._pending.values())
            is_extra = writing is not None and self._pending.get(writing.key) is not writing
            return held + (writing.num_bytes if writing is not None and is_extra else 0)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or to be deleted; whether that happened in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._pending or self._has_trash or self._writing), timeout_s)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not add up."""
        with self._changed:
            self._index.check()

    # The background thread.

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                self._finish(job, self._write(job))
            except Stopped:
                self._finish(job, None)
            except OSError as exc:
                self._fail(job, exc)
            except Exception:  # nobody would see this thread end
                log.exception("a conversation could not be written to the session store")
                self._count(write_failures=1)
                self._finish(job, None)

    def _write(self, job: Job) -> Entry:
        """Make room and write it. Raises Stopped, OSError."""
        self._make_room(job)
        return write_job(self._opened, job, self._fingerprint, self._has_piece, self._after_write)

    def _next_job(self) -> Job | None:
        """Waits for one, deleting files in the meantime; None: the thread shall end."""
        while True:
            with self._changed:
                self._writing = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._pending or self._has_trash or self._is_closing)
                has_trash = self._has_trash
                if not has_trash:
                    if not self._pending or self._stop.is_set():
                        return None
                    self._writing = next(iter(self._pending.values()))
                    return self._writing
            self._empty_trash()

    def _after_write(self, num_bytes: int) -> None:
        writing = self._writing
        if self._stop.is_set() or (writing is not None and writing.is_cancelled):
            raise Stopped
        self._count(written_bytes=num_bytes)
        if not self._hurry.is_set():
            self._rate.spend(num_bytes)

    def _has_piece(self, name: str) -> int | None:
        with self._changed:
            return self._index.piece_bytes(name)

    def _make_room(self, job: Job) -> None:
        """Drop the least recently used entries until the job fits the limit; none if it cannot. Raises Stopped then.

        Never the entry that the job replaces: that goes when the new one is durable.
        """
        _ = job.parts  # hashed here, not under the lock
        with self._changed:
            least_bytes, pieces = self._index.staying(but=job.key)
            if least_bytes + new_bytes(job, pieces.get) > self._limit_bytes:
                self._count(refused=1)
                raise Stopped
            while self._index.total_bytes + new_bytes(job, self._has_piece) > self._limit_bytes:
                oldest = self._index.oldest(but=job.key)
                assert oldest is not None, "what stays leaves room"
                self._drop(oldest.key)
                self._count(dropped=1)
        self._empty_trash()

    def _finish(self, job: Job, entry: Entry | None) -> None:
        """Book what was written; of a job that was stopped, the files go."""
        with self._changed:
            if entry is not None:
                self._note_use(entry)
                self._throw_away(self._index.add(entry))
                self._count(written=1)
                self._switch.worked()
                if job.is_cancelled:
                    self._drop(job.key)
            self._throw_away(job.written_pieces)  # those that an entry needs stay
            if self._pending.get(job.key) is job:
                del self._pending[job.key]

    def _fail(self, job: Job, exc: OSError) -> None:
        """The disk does not take it: writing is off for a while, and nothing stays queued."""
        with self._changed:
            self._switch.fail(exc)
            self._count(write_failures=1)
            self._throw_away(job.written_pieces)
            num_lost = len(self._pending)
            self._pending.clear()
        log.warning("the session store is off, %d conversations were not written: %s", num_lost, self._switch.reason)

    def _empty_trash(self) -> None:
        with self._changed:
            trash = list(self._trash)
        for rubbish in trash:
            if not self._is_needed(rubbish):  # again, meanwhile; only this thread adds files
                with contextlib.suppress(OSError):
                    rubbish.file.delete()
        with self._changed:
            del self._trash[: len(trash)]  # only this thread takes anything out

    def _is_needed(self, rubbish: _Rubbish) -> bool:
        with self._changed:
            is_entry = rubbish.key is not None and self._index.get(rubbish.key) is not None
            return is_entry or (rubbish.piece is not None and self._index.piece_bytes(rubbish.piece) is not None)

    # Under the lock.

    @property
    def _has_trash(self) -> bool:
        return bool(self._trash)

    @property
    def _opened(self) -> StoreFolder:
        assert self._folder is not None, "nothing is written or deleted without a folder"
        return self._folder

    def _accepts(self) -> bool:
        return self._thread is not None and not self._is_closing and self._switch.is_on

    def _drop(self, key: str) -> None:
        if self._index.get(key) is not None and self._folder is not None:
            # The entry first: a process that is killed in between leaves pieces that nobody names, not a broken entry.
            self._trash.append(_Rubbish(self._folder.entry(key), key=key))
            self._throw_away(self._index.remove(key))

    def _throw_away(self, pieces: Sequence[str]) -> None:
        unused = [name for name in pieces if self._index.piece_bytes(name) is None]
        self._trash += [_Rubbish(self._opened.piece(name), piece=name) for name in unused]
        self._changed.notify_all()

    def _drop_damaged(self, entry: Entry, exc: Exception) -> None:
        """An entry could not be read; if a shared piece is to blame, all its users go."""
        with self._changed:
            if self._index.get(entry.key) is not entry:
                return  # deleted in the meantime
            if isinstance(exc, OSError) and exc.errno in _NOT_THE_FILES_FAULT:
                log.warning("a stored conversation cannot be read now: %s", exc)
                return
            victims = self._index.users_of(exc.name) if isinstance(exc, DamagedPieceError) else [entry]
            for victim in victims:
                self._drop(victim.key)
            self._count(integrity_failures=1)
        log.warning("a stored conversation cannot be read and is dropped (%d in all): %s", len(victims), exc)

    def _note_use(self, entry: Entry) -> None:
        """It is the last used one from now on, and its file says so; also when the clock was set back meanwhile."""
        with self._changed:
            entry.last_used_s = self._latest_s = max(self._clock(), self._latest_s + CLOCK_STEP_S)
            folder = self._folder
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.entry(entry.key).touch(entry.last_used_s)

    def _count(self, **more: int) -> None:
        with self._changed:
            now = {name: getattr(self._counts, name) + n for name, n in more.items()}
            self._counts = replace(self._counts, **now)
