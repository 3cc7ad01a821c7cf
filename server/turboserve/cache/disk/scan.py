"""What lies in a store's folder: entries that can be used, files that cannot, and leftovers of a crash.

Reads headers only, so that opening a full store takes moments; contents are verified when they are used.
Changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from turboserve.cache.disk import container
from turboserve.cache.disk.container import Container, DamagedFileError
from turboserve.cache.disk.folder import File
from turboserve.cache.disk.index import Entry
from turboserve.cache.disk.layout import SUFFIX, StoreFolder, files_of


@dataclass(slots=True)
class Found:
    """A folder's contents; every file of the store is in exactly one place, and nobody else's is in any."""

    entries: list[Entry] = field(default_factory=list)
    damaged: dict[File, str] = field(default_factory=dict)  # entries' files, and why
    leftovers: list[File] = field(default_factory=list)  # unfinished files, pieces that no entry names


def entry_fields(key: str, fingerprint: str, meta: Any, header: Any, pieces: list[tuple[str, int]]) -> dict[str, Any]:
    """What an entry's file says beside its arrays; pieces with their bytes, in order."""
    return {"key": key, "fingerprint": fingerprint, "meta": meta, "header": header, "pieces": pieces}


def scan(store: StoreFolder, fingerprint: str) -> Found:
    """Everything in the folder; entries under another fingerprint are foreign. Raises OSError."""
    found = Found()
    found.leftovers += [*files_of(store.entries, unfinished=True), *files_of(store.pieces, unfinished=True)]
    on_disk = {file.name.removesuffix(SUFFIX): file.status().st_size for file in files_of(store.pieces)}
    for file in files_of(store.entries):
        try:
            entry = entry_of(store, file, container.read_header(file), fingerprint)
            missing = [name for name, num_bytes in entry.pieces.items() if on_disk.get(name) != num_bytes]
            if missing:
                raise DamagedFileError(f"{len(missing)} of its {len(entry.pieces)} pieces are missing")
            found.entries.append(entry)
        except DamagedFileError as exc:
            found.damaged[file] = str(exc)
    needed = {name for entry in found.entries for name in entry.pieces}
    found.leftovers += [store.piece(name) for name in on_disk if name not in needed]
    return found


def entry_of(store: StoreFolder, file: File, head: Container, fingerprint: str) -> Entry:
    """What an entry's header says. Raises DamagedFileError, OSError."""
    try:
        key, pieces = str(head.fields["key"]), {str(name): int(n) for name, n in head.fields["pieces"]}
        is_foreign = head.fields["fingerprint"] != fingerprint
        meta = dict(head.fields["meta"])
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise DamagedFileError(f"its fields cannot be understood: {exc!r}") from exc
    if head.kind != "entry" or store.entry(key) != file:
        raise DamagedFileError("it is not the entry that its name says")
    status = file.status()
    return Entry(key, meta, status.st_size, pieces, status.st_mtime, is_foreign)
