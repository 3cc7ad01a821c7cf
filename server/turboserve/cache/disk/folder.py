"""A folder held open: its files are reached through it, never through a path, and no link is followed.

Whoever exchanges a folder or a file for a link thus leads nobody anywhere else: what is read, written and deleted lies
in the folder that was opened. Raises OSError as the system does, for a link too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple

FOLDER_MODE, FILE_MODE = 0o700, 0o600  # prompts are in there
_OTHERS = 0o077
# A pipe would block whoever opens it for reading; a plain file takes no notice of O_NONBLOCK.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Folder:
    """An open folder. `path` is what it was called when it was opened, for messages."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self.handle = path, handle

    @classmethod
    def open(cls, path: Path) -> Folder:
        """The folder that an operator named, by a link if they like. Raises OSError."""
        return cls(path, os.open(path, _FOLDER))

    def subfolder(self, name: str, *, create: bool = False) -> Folder:
        """One in it. Raises OSError: NotADirectoryError or ELOOP for whatever else has that name."""
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, FOLDER_MODE, dir_fd=self.handle)
        return Folder(self.path / name, os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.handle))

    def names(self) -> list[str]:
        """Of everything in it, in order."""
        return sorted(os.listdir(self.handle))

    def make_private(self) -> None:
        """For its owner only from now on. Raises OSError."""
        if os.fstat(self.handle).st_mode & _OTHERS:
            os.fchmod(self.handle, FOLDER_MODE)

    def sync(self) -> None:
        """Make renames in it lasting."""
        os.fsync(self.handle)

    def close(self) -> None:
        os.close(self.handle)


class File(NamedTuple):
    """A place for a plain file in an open folder."""

    folder: Folder
    name: str

    @property
    def path(self) -> Path:
        """For messages."""
        return self.folder.path / self.name

    def status(self) -> os.stat_result:
        """Of what has this name, a link itself included."""
        return os.stat(self.name, dir_fd=self.folder.handle, follow_symlinks=False)

    def is_plain(self) -> bool:
        """Whether a plain file, and no link to one, has this name."""
        try:
            return stat.S_ISREG(self.status().st_mode)
        except FileNotFoundError:
            return False

    def open(self) -> BinaryIO:
        """For reading. Raises OSError, also when it is no plain file."""
        handle = os.open(self.name, _READ, dir_fd=self.folder.handle)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "not a plain file", self.name)
        return os.fdopen(handle, "rb")

    def create(self) -> BinaryIO:
        """For writing, unbuffered. Raises FileExistsError when anything has this name."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(self.name, flags, FILE_MODE, dir_fd=self.folder.handle)
        return os.fdopen(handle, "wb", buffering=0)

    def rename(self, name: str) -> None:
        """Take the place of whatever has that name."""
        os.replace(self.name, name, src_dir_fd=self.folder.handle, dst_dir_fd=self.folder.handle)

    def delete(self) -> None:
        """A plain file only: nothing else in a store's folders was put there by the store."""
        if self.is_plain():
            os.unlink(self.name, dir_fd=self.folder.handle)

    def touch(self, time_s: float | None) -> None:
        """Set its times; None: to now, by the file system's own clock."""
        times = None if time_s is None else (time_s, time_s)
        os.utime(self.name, times, dir_fd=self.folder.handle, follow_symlinks=False)

    def make_private(self) -> None:
        """For its owner only from now on. Raises OSError."""
        if self.status().st_mode & _OTHERS:
            with self.open() as file:
                os.fchmod(file.fileno(), FILE_MODE)
