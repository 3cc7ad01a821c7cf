"""SharedDiskStore: one folder for several servers, on one host or on a volume that many mount.

What differs from a folder of one's own:

    keys      a named session has one key, by which every server finds it; its last stored turn counts
    locks     whoever writes or deletes an entry holds its lock (entry_locks.py); readers hold none and look again
    claims    who makes a session under a new name holds its lock until that is written: one server makes it
    pieces    belong to one entry each, so that nobody needs to know who else might want one
    index     others' entries are learnt by looking at the folder, now and then and whenever a session is asked for
    budget    every server counts all files; between two looks each may add what it writes in that time

A turn never replaces a later one: the number of a session's ended requests decides, not a clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from turboserve.cache.disk import container, scan
from turboserve.cache.disk.container import Array, DamagedFileError
from turboserve.cache.disk.entry_locks import LOCKS_NAME, EntryLockedError, EntryLocks
from turboserve.cache.disk.folder import File
from turboserve.cache.disk.index import Entry
from turboserve.cache.disk.layout import StoreFolder, files_of
from turboserve.cache.disk.reading import read_entry
from turboserve.cache.disk.scan import entry_of
from turboserve.cache.disk.store import CLOSE_S, DiskStore
from turboserve.cache.disk.writing import Job, Stopped, write_job
from turboserve.cache.interfaces import StoredEntry

log = logging.getLogger(__name__)

LOOK_S = 2.0  # between two looks at the folder: what others added is counted, listed and shared that late
LOCK_WAIT_S = 30.0  # for another server that writes the same entry; it writes as fast as its rate lets it
# A piece comes before the entry that names it. One that nobody names so long is of a server that was killed.
LEFTOVER_AGE_S = 3600.0
_READS = 5  # of an entry that others replace meanwhile
_Identity = tuple[int, int, int]  # inode, bytes, time: another one for every state of a file


class SharedDiskStore(DiskStore):
    """As DiskStore, for a folder that other servers use too."""

    is_shared = True

    def _open(self) -> None:
        self._known: dict[str, _Identity] = {}  # files of entries, by name, as they were when last looked at
        self._keys: dict[str, str] = {}  # their keys
        self._news: list[StoredEntry | str] = []
        self._dropped: list[Entry] = []  # whose files are to be deleted
        self._watcher: threading.Thread | None = None
        self._is_unwatched = threading.Event()
        self._locks: EntryLocks | None = None
        self._making: set[str] = set()  # keys of sessions that are being made, of which nothing is queued yet
        super()._open()

    def _look_around(self, folder: StoreFolder, *, is_writable: bool) -> scan.Found:
        self._locks = EntryLocks(folder.root) if is_writable else None
        found = scan.Found()
        for file in files_of(folder.entries):
            entry = self._learn(file)
            if entry is not None:
                found.entries.append(entry)
        if is_writable:
            found.leftovers = _leftovers(folder, {name for entry in found.entries for name in entry.pieces})
            self._watcher = threading.Thread(target=self._watch, name="kv-store-watch", daemon=True)
            self._watcher.start()
        return found

    def close(self, timeout_s: float = CLOSE_S) -> None:
        self._is_unwatched.set()
        if self._watcher is not None:
            self._watcher.join()  # it looks into folders that are about to be closed
        super().close(timeout_s)
        if self._locks is not None and self._folder is None:
            self._locks.close()
            self._locks = None

    # --- what others do

    def key_for(self, salt: str, session_id: str) -> str | None:
        """The same on every server of the same model."""
        said = "\0".join((self._fingerprint, salt, session_id))
        return hashlib.blake2b(said.encode(), digest_size=20).hexdigest()

    def refresh(self, key: str) -> StoredEntry | None:
        folder = self._folder
        if folder is None:
            return None
        self._see(folder.entry(key))
        with self._changed:
            mine = [one for one in self._news if isinstance(one, StoredEntry) and one.key == key]
            self._news = [one for one in self._news if one not in mine]
        return mine[-1] if mine else None

    def changes(self) -> list[StoredEntry | str]:
        with self._changed:
            news, self._news = self._news, []
        return news

    def _watch(self) -> None:
        while not self._is_unwatched.wait(LOOK_S):
            try:
                self._forget_claims()
                self._look()
            except OSError as exc:
                log.warning("the shared session store cannot be looked at now: %s", exc)

    def _look(self) -> None:
        folder = self._folder
        if folder is None:
            return
        there = list(files_of(folder.entries))
        names = {file.name for file in there}
        for file in there:
            self._see(file)
        for name in set(self._known) - names:
            self._see(File(folder.entries, name))

    def _see(self, file: File) -> None:
        """Learn what became of one entry's file, if it is not as it was."""
        try:
            identity = _identity(file)
        except OSError:
            self._lose(file.name)
            return
        if self._known.get(file.name) == identity:
            return
        entry = self._learn(file)
        if entry is None:
            return
        with self._changed:
            if any(dropped.key == entry.key and _version(dropped) == _version(entry) for dropped in self._dropped):
                return
            known = self._index.get(entry.key)
            if known is not None and known.num_readers:
                self._known.pop(file.name, None)  # looked at again when nobody reads it
                return
            self._index.add(entry)
            self._latest_s = max(self._latest_s, entry.last_used_s)
            if not entry.is_foreign and (known is None or _version(known) != _version(entry)):
                self._news.append(StoredEntry(entry.key, entry.meta, entry.num_bytes))

    def _lose(self, name: str) -> None:
        """A file that was there is gone; who deleted it took its pieces along."""
        with self._changed:
            self._known.pop(name, None)
            key = self._keys.pop(name, None)
            if key is None or self._index.get(key) is None:
                return
            self._index.remove(key)
            self._news = [one for one in self._news if not (isinstance(one, StoredEntry) and one.key == key)]
            if not self._is_written_here(key):
                self._news.append(key)

    def _is_written_here(self, key: str) -> bool:
        """Whether this server is about to put something in the place of what others did."""
        return key in self._pending or (self._writing is not None and self._writing.key == key)

    def put(self, key: str, meta: Mapping[str, Any], header: Mapping[str, Any], arrays: Sequence[Array]) -> bool:
        """As of DiskStore; that others have deleted what was there no longer matters."""
        is_taken = super().put(key, meta, header, arrays)
        if is_taken:
            with self._changed:
                self._news = [one for one in self._news if one != key]
        return is_taken

    def _learn(self, file: File) -> Entry | None:
        """Read an entry's header; None for what is no entry, or is being replaced."""
        try:
            identity = _identity(file)
            entry = entry_of(self._opened, file, container.read_header(file), self._fingerprint)
        except (DamagedFileError, OSError):
            return None
        with self._changed:
            self._known[file.name], self._keys[file.name] = identity, entry.key
        return entry

    # --- names of new sessions

    def claim(self, key: str) -> bool:
        """As SessionDisk. The claim is the entry's lock, so that it ends with this process, whatever becomes of it."""
        locks = self._locks
        if locks is None:
            return True
        with self._changed:
            self._making.add(key)
        is_mine = locks.claim(key)
        if not is_mine:
            with self._changed:
                self._making.discard(key)
        return is_mine

    def settle(self, key: str) -> None:
        with self._changed:
            self._making.discard(key)
            if not self._is_written_here(key):
                self._give_back(key)

    def _give_back(self, key: str) -> None:
        if self._locks is not None and key not in self._making:
            self._locks.disclaim(key)

    def _finish(self, job: Job, entry: Entry | None) -> None:
        super()._finish(job, entry)
        with self._changed:
            if job.key not in self._pending:
                self._give_back(job.key)

    def _forget_claims(self) -> None:
        """Of what was queued, and is not any more although nobody wrote it: deleted, or lost to a full disk."""
        for key in self._locks.claims() if self._locks is not None else ():
            with self._changed:
                if not self._is_written_here(key):
                    self._give_back(key)

    # --- reading and writing

    def _read(self, folder: StoreFolder, key: str) -> tuple[dict[str, Any], list[Array]]:
        """Others may replace it meanwhile, and delete what the version that was begun with needs: then again."""
        for _ in range(_READS):
            before = _identity(folder.entry(key))
            try:
                return read_entry(folder, key)
            except (DamagedFileError, OSError):
                if before == _identity(folder.entry(key)):
                    raise
        return read_entry(folder, key)

    def _scope(self, key: str, meta: Mapping[str, Any]) -> str | None:
        return f"{meta.get('salt', '')}\0{key}"

    def _write(self, job: Job) -> Entry:
        """Under the entry's lock. Raises OSError, and Stopped when a later turn is there or another server is at it."""
        assert self._locks is not None, "nothing is written into a folder that cannot be"
        try:
            with self._locks.hold(job.key, LOCK_WAIT_S):
                return self._write_locked(job)
        except EntryLockedError:
            log.warning("another server keeps a conversation locked that is to be stored here; it is left out")
            raise Stopped from None

    def _write_locked(self, job: Job) -> Entry:
        file = self._opened.entry(job.key)
        with self._changed:
            if any(dropped.key == job.key for dropped in self._dropped):
                self._dropped = [dropped for dropped in self._dropped if dropped.key != job.key]
                self._known.pop(file.name, None)
        self._see(file)
        with self._changed:
            before = self._index.get(job.key)
        if before is not None and _turns(before.meta) > _turns(job.meta):
            self._count(refused=1)
            raise Stopped
        if self._index.total_bytes + job.num_bytes > self._limit_bytes:
            self._look()  # whoever makes room must know what others have added and dropped a moment ago
        self._make_room(job)
        try:
            entry = write_job(self._opened, job, self._fingerprint, self._has_piece, self._after_write)
        except BaseException:
            self._delete_pieces(name for name in job.written_pieces if before is None or name not in before.pieces)
            raise
        self._delete_pieces(name for name in (before.pieces if before is not None else ()) if name not in entry.pieces)
        with self._changed:
            self._known[file.name], self._keys[file.name] = _identity(file), job.key
        return entry

    def _delete_pieces(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                self._opened.piece(name).delete()

    def _has_piece(self, name: str) -> int | None:
        """Of the version that is there; others may have dropped it with its pieces."""
        num_bytes = super()._has_piece(name)
        try:
            return (
                num_bytes if num_bytes is not None and self._opened.piece(name).status().st_size == num_bytes else None
            )
        except OSError:
            return None

    def _drop(self, key: str) -> None:
        """From the folder as well, as far as it is still what was known of it; a locked one is somebody's work."""
        entry = self._index.get(key)
        if entry is None or self._folder is None:
            return
        self._index.remove(key)
        self._dropped.append(entry)
        name = self._folder.entry(key).name
        self._known.pop(name, None)
        self._keys.pop(name, None)
        self._changed.notify_all()

    def _throw_away(self, pieces: Any) -> None:
        """They are their entry's, and go with it."""
        self._changed.notify_all()

    @property
    def _has_trash(self) -> bool:
        return super()._has_trash or bool(self._dropped)

    def _empty_trash(self) -> None:
        super()._empty_trash()
        with self._changed:
            dropped = list(self._dropped)
        for entry in dropped:
            with contextlib.suppress(OSError, EntryLockedError):
                self._delete_files(entry)
        with self._changed:  # until now, so that they are not taken for new ones
            self._dropped = [entry for entry in self._dropped if entry not in dropped]

    def _delete_files(self, entry: Entry) -> None:
        """Raises EntryLockedError, OSError: then somebody else has them, or nobody any more."""
        assert self._locks is not None, "nothing is deleted from a folder that cannot be written"
        writing = self._writing
        if writing is not None and writing.key == entry.key:
            return  # what replaces it takes its pieces along
        file = self._opened.entry(entry.key)
        with self._locks.hold(entry.key):
            pieces: Iterable[str] = ()
            with contextlib.suppress(DamagedFileError):  # without a header nobody knows its pieces: they are leftovers
                there = entry_of(self._opened, file, container.read_header(file), self._fingerprint)
                if _version(there) != _version(entry):
                    return
                pieces = there.pieces
            file.delete()
            self._delete_pieces(pieces)


def _identity(file: File) -> _Identity:
    status = file.status()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _version(entry: Entry) -> object:
    return entry.meta.get("version"), entry.own_bytes


def _turns(meta: Mapping[str, Any]) -> int:
    value = meta.get("num_requests", 0)
    return value if isinstance(value, int) else 0


def _leftovers(folder: StoreFolder, needed: set[str]) -> list[File]:
    """Unfinished files and unnamed pieces that are old by the file system's own clock."""
    unfinished = [*files_of(folder.entries, unfinished=True), *files_of(folder.pieces, unfinished=True)]
    unnamed = [file for file in files_of(folder.pieces) if file.name.partition(".")[0] not in needed]
    clock = File(folder.root, LOCKS_NAME)
    clock.touch(None)  # the time that a file written now has
    found = []
    for file in (*unfinished, *unnamed):
        with contextlib.suppress(OSError):
            if clock.status().st_mtime - file.status().st_mtime > LEFTOVER_AGE_S:
                found.append(file)
    return found
