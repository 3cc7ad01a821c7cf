"""What is where in a store's folder, whose folder it is, and which files in it are the store's.

    <folder>/turboserve-store                    says that the folder is a session store
    <folder>/store.lock
    <folder>/entries.lock                        of a folder that several servers share: a byte for each entry
    <folder>/entries/<hash of key>.safetensors   one conversation: meta, header, arrays' rests, names of pieces
    <folder>/pieces/<content hash>.safetensors   a thousand tokens, shared by entries with the same beginning

A folder with anything else in it is only taken when the first of these files is there; what has not exactly
the form of the store's own names is never touched, wherever it lies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from turboserve.cache.disk.entry_locks import LOCKS_NAME
from turboserve.cache.disk.files import LOCK_NAME, TEMPORARY
from turboserve.cache.disk.folder import File, Folder
from turboserve.errors import StartupError

log = logging.getLogger(__name__)

MARKER_NAME = "turboserve-store"
MARKER = b"A session store of turboserve, version 1. The server writes and deletes files in here.\n"
ENTRIES, PIECES = "entries", "pieces"
SUFFIX = ".safetensors"

_OURS = re.compile(r"[0-9a-f]{40}" + re.escape(SUFFIX))
_UNFINISHED = re.compile(_OURS.pattern + re.escape(TEMPORARY))
_HARMLESS = ("lost+found", ".DS_Store")  # what systems put into every folder or volume
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class StoreFolderError(StartupError):
    """A folder is not to be used as a session store."""


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A store's folders, held open."""

    root: Folder
    entries: Folder
    pieces: Folder

    def entry(self, key: str) -> File:
        """An entry's file; keys never become file names as they are."""
        return File(self.entries, hashlib.blake2b(key.encode(), digest_size=20).hexdigest() + SUFFIX)

    def piece(self, name: str) -> File:
        return File(self.pieces, name + SUFFIX)

    def make_private(self) -> None:
        """Folders and files for their owner only, also those that are there already."""
        of_root = (File(self.root, MARKER_NAME), File(self.root, LOCK_NAME), File(self.root, LOCKS_NAME))
        folders = (self.root, self.entries, self.pieces)
        everything: tuple[Folder | File, ...]
        everything = (*folders, *of_root, *files_of(self.entries), *files_of(self.pieces))
        failed: list[str] = []
        for one in everything:
            try:
                one.make_private()
            except FileNotFoundError:
                continue
            except OSError as exc:
                failed.append(f"{one.path}: {exc.strerror or exc}")
        if failed:
            log.warning("others may read %d files or folders of the session store: %s", len(failed), failed[0])

    def close(self) -> None:
        for folder in (self.root, self.entries, self.pieces):
            folder.close()


def files_of(folder: Folder, *, unfinished: bool = False) -> Iterator[File]:
    """The store's own files in one of its folders: finished ones, or what a crash left of others."""
    pattern = _UNFINISHED if unfinished else _OURS
    return (file for name in folder.names() if pattern.fullmatch(name) and (file := File(folder, name)).is_plain())


def open_store_folder(path: Path) -> StoreFolder:
    """A store's folder, made if there is none. Raises OSError, StoreFolderError when it is something else."""
    with contextlib.suppress(PermissionError):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    root = Folder.open(path)
    try:
        if not File(root, MARKER_NAME).is_plain():
            _check_is_free(root)
            _mark(root)
        return _open_parts(root, create=True)
    except BaseException:
        root.close()
        raise


def open_to_read(path: Path) -> StoreFolder:
    """Open a store's folder and leave it as it is. Raises OSError, StoreFolderError."""
    root = Folder.open(path)
    try:
        return _open_parts(root, create=False)
    except BaseException:
        root.close()
        raise


def _open_parts(root: Folder, *, create: bool) -> StoreFolder:
    entries = _open_part(root, ENTRIES, create=create)
    try:
        return StoreFolder(root, entries, _open_part(root, PIECES, create=create))
    except BaseException:
        entries.close()
        raise


def _open_part(root: Folder, name: str, *, create: bool) -> Folder:
    try:
        return root.subfolder(name, create=create)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR):
            raise StoreFolderError(
                f"{root.path / name} is a link or a file, not the session store's folder: remove it, or choose another "
                "folder for the store."
            ) from exc
        raise


def _check_is_free(root: Folder) -> None:
    """Raises StoreFolderError unless nothing is in there but what a store without a marker has: older servers' do."""
    foreign = [name for name in root.names() if name not in (LOCK_NAME, ENTRIES, PIECES, *_HARMLESS)]
    if not _is_lock(File(root, LOCK_NAME)):
        foreign.append(LOCK_NAME)
    for name in (ENTRIES, PIECES):
        if not foreign and name in root.names():
            part = _open_part(root, name, create=False)
            with contextlib.closing(part):
                found = (n for n in part.names() if not (_OURS.fullmatch(n) or _UNFINISHED.fullmatch(n)))
                foreign += [f"{name}/{n}" for n in found]
    if foreign:
        raise StoreFolderError(
            f"The folder {root.path} is no session store, and there is something in it ({foreign[0]!r}): choose "
            "an empty folder, or one that does not exist yet."
        )


def _is_lock(file: File) -> bool:
    """Whether there is none, or one that a server wrote; it will be written over."""
    if LOCK_NAME not in file.folder.names():
        return True
    if not file.is_plain():
        return False
    with file.open() as stream:
        return re.fullmatch(rb"\d*\n?", stream.read(32)) is not None


def _mark(root: Folder) -> None:
    """Say whose folder it is; not where nothing can be written, for then nothing is deleted either."""
    try:
        with File(root, MARKER_NAME).create() as file:
            file.write(MARKER)
            os.fsync(file.fileno())
        root.sync()
    except FileExistsError:
        return  # another server that starts at the same moment; one of the two will have the lock
    except OSError as exc:
        if exc.errno not in _READ_ONLY:
            raise
