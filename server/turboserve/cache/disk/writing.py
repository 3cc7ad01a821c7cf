"""Writing one entry: the pieces that are not there yet, then its own file, each whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from turboserve.cache.disk import files
from turboserve.cache.disk.container import Array, pack, packed_bytes, slices
from turboserve.cache.disk.folder import File
from turboserve.cache.disk.index import Entry
from turboserve.cache.disk.layout import StoreFolder
from turboserve.cache.disk.pieces import name_of, split
from turboserve.cache.disk.scan import entry_fields

# A file's header and what meta and header take as JSON, generously; used to plan, never to account.
_FILE_OVERHEAD_BYTES = 4096

PieceBytes = Callable[[str], int | None]
"""Bytes of a piece that is already there, or None."""


class Stopped(Exception):
    """The entry is not wanted any more, or the store is closing."""


@dataclass(eq=False)
class Job:
    """A conversation waiting for its file. `arrays` are held until it is written."""

    key: str
    meta: dict[str, Any]
    header: dict[str, Any]
    arrays: list[Array]
    is_cancelled: bool = False
    scope: str | None = None  # within which pieces are shared; None: the caller's
    written_pieces: list[str] = field(default_factory=list)

    @cached_property
    def num_bytes(self) -> int:
        return sum(a.nbytes for a in self.arrays) + _FILE_OVERHEAD_BYTES

    @cached_property
    def parts(self) -> tuple[list[tuple[str, dict[str, Array]]], dict[str, Array]]:
        """Pieces with their names, in order, and the arrays' rests. Hashes everything: not under a lock."""
        pieces, rest = split(self.header, self.arrays)
        scope = str(self.meta.get("salt", "")) if self.scope is None else self.scope
        return [(name_of(scope, piece), piece) for piece in pieces], rest


def new_bytes(job: Job, piece_bytes: PieceBytes) -> int:
    """Bytes that writing the job will add, at most."""
    pieces, rest = job.parts
    needed = [rest, *(piece for name, piece in pieces if piece_bytes(name) is None)]
    return sum(a.nbytes for part in needed for a in part.values()) + _FILE_OVERHEAD_BYTES * len(needed)


def write_job(
    store: StoreFolder, job: Job, fingerprint: str, piece_bytes: PieceBytes, after_write: Callable[[int], None]
) -> Entry:
    """Write what is not there yet; the entry as it now is on disk. Raises OSError, and what after_write raises."""
    pieces, rest = job.parts
    sizes: dict[str, int] = {}
    for name, piece in pieces:
        there = sizes.get(name) or piece_bytes(name)
        if there is None:
            head, data = pack("piece", {"name": name}, piece)
            files.write_atomically(store.piece(name), slices(head, data), after_write)
            job.written_pieces.append(name)
            there = packed_bytes(head, data)
        sizes[name] = there
    if job.written_pieces:
        store.pieces.sync()
    fields = entry_fields(job.key, fingerprint, job.meta, job.header, [(name, sizes[name]) for name, _ in pieces])
    own_bytes = _write_own(store.entry(job.key), fields, rest, after_write)
    return Entry(job.key, job.meta, own_bytes, sizes, last_used_s=0.0)


def _write_own(file: File, fields: dict[str, Any], rest: dict[str, Array], after_write: Callable[[int], None]) -> int:
    head, data = pack("entry", fields, rest)
    files.write_atomically(file, slices(head, data), after_write)
    file.folder.sync()
    return packed_bytes(head, data)
