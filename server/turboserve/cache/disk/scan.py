"""What lies in a store's folder: entries that can be used, files that cannot, and leftovers of a crash.

    <folder>/store.lock
    <folder>/entries/<hash of key>.safetensors   one conversation: meta, header, arrays' rests, names of pieces
    <folder>/pieces/<content hash>.safetensors   a thousand tokens, shared by entries with the same beginning

Reads headers only, so that opening a full store takes moments; contents are verified when they are used.
Changes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turboserve.cache.disk import container
from turboserve.cache.disk.container import Container, DamagedFileError
from turboserve.cache.disk.files import TEMPORARY
from turboserve.cache.disk.index import Entry

SUFFIX = ".safetensors"


@dataclass(slots=True)
class Found:
    """A folder's contents; every file in it is in exactly one place."""

    entries: list[Entry] = field(default_factory=list)
    damaged: dict[Path, str] = field(default_factory=dict)  # entries' files, and why
    leftovers: list[Path] = field(default_factory=list)  # unfinished files, pieces that no entry names


def entries_folder(store: Path) -> Path:
    return store / "entries"


def pieces_folder(store: Path) -> Path:
    return store / "pieces"


def entry_path(store: Path, key: str) -> Path:
    """An entry's file; keys never become file names as they are."""
    return entries_folder(store) / (hashlib.blake2b(key.encode(), digest_size=20).hexdigest() + SUFFIX)


def piece_path(store: Path, name: str) -> Path:
    return pieces_folder(store) / (name + SUFFIX)


def entry_fields(key: str, fingerprint: str, meta: Any, header: Any, pieces: list[tuple[str, int]]) -> dict[str, Any]:
    """What an entry's file says beside its arrays; pieces with their bytes, in order."""
    return {"key": key, "fingerprint": fingerprint, "meta": meta, "header": header, "pieces": pieces}


def scan(store: Path, fingerprint: str) -> Found:
    """Everything in the folder; entries under another fingerprint are foreign. Raises OSError."""
    found = Found()
    on_disk = {path.stem: path.stat().st_size for path in _files(pieces_folder(store), found)}
    for path in _files(entries_folder(store), found):
        try:
            entry = _entry(store, path, container.read_header(path), fingerprint)
            missing = [name for name, num_bytes in entry.pieces.items() if on_disk.get(name) != num_bytes]
            if missing:
                raise DamagedFileError(f"{len(missing)} of its {len(entry.pieces)} pieces are missing")
            found.entries.append(entry)
        except DamagedFileError as exc:
            found.damaged[path] = str(exc)
    needed = {name for entry in found.entries for name in entry.pieces}
    found.leftovers += [pieces_folder(store) / (name + SUFFIX) for name in on_disk if name not in needed]
    return found


def _files(folder: Path, found: Found) -> list[Path]:
    """A folder's finished files; the others are leftovers."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    found.leftovers += [path for path in files if path.name.endswith(TEMPORARY)]
    return [path for path in files if path.name.endswith(SUFFIX)]


def _entry(store: Path, path: Path, head: Container, fingerprint: str) -> Entry:
    try:
        key, pieces = str(head.fields["key"]), {str(name): int(n) for name, n in head.fields["pieces"]}
        is_foreign = head.fields["fingerprint"] != fingerprint
        meta = dict(head.fields["meta"])
    except (KeyError, TypeError, ValueError) as exc:
        raise DamagedFileError(f"its fields cannot be understood: {exc!r}") from exc
    if head.kind != "entry" or entry_path(store, key) != path:
        raise DamagedFileError("it is not the entry that its name says")
    status = path.stat()
    return Entry(key, meta, status.st_size, pieces, status.st_mtime, is_foreign)
