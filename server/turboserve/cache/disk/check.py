"""Is a store whole? Every file read, every checksum verified, every entry put together. Changes nothing.

For `turboserve doctor --store`; needs neither the model nor MLX, so it vouches for bytes, not for their
meaning: whether entries fit a model, their fingerprint decides when the server opens them.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from turboserve.cache.disk import files, layout, scan
from turboserve.cache.disk.container import DamagedFileError
from turboserve.cache.disk.folder import File
from turboserve.cache.disk.layout import StoreFolder, StoreFolderError
from turboserve.cache.disk.reading import read_entry


@dataclass(slots=True)
class StoreReport:
    """What a store holds. `damaged`: entries that cannot be read, and why."""

    num_entries: int = 0
    num_pieces: int = 0
    total_bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    num_leftovers: int = 0  # of a crash or a kill; the next server that opens the store removes them
    leftover_bytes: int = 0
    fingerprints: Counter[str] = field(default_factory=Counter)  # entries per model and format family
    is_in_use: bool = False  # by a server: files may come and go while they are read


def check_store(path: Path) -> StoreReport:
    """Verify a whole store. Raises OSError, StoreFolderError when the folder is none or cannot be read."""
    with contextlib.closing(layout.open_to_read(path)) as store:
        return _check(store)


def _check(store: StoreFolder) -> StoreReport:
    report = StoreReport(is_in_use=_is_in_use(store))
    found = scan.scan(store, fingerprint="")
    for entry in found.entries:
        try:
            fields, _ = read_entry(store, entry.key)
            report.fingerprints[str(fields["fingerprint"])] += 1
        except (DamagedFileError, OSError) as exc:
            if not (report.is_in_use and not store.entry(entry.key).is_plain()):
                report.damaged.append(f"{store.entry(entry.key).name}: {exc}")
    report.damaged += [f"{file.name}: {why}" for file, why in found.damaged.items()]
    report.num_entries = len(found.entries) + len(found.damaged)
    pieces = {name: num_bytes for entry in found.entries for name, num_bytes in entry.pieces.items()}
    report.num_pieces = len(pieces)
    report.total_bytes = sum(entry.own_bytes for entry in found.entries) + sum(pieces.values())
    report.num_leftovers = len(found.leftovers)
    report.leftover_bytes = sum(file.status().st_size for file in found.leftovers if file.is_plain())
    return report


def _is_in_use(store: StoreFolder) -> bool:
    """Whether a server has the folder. Takes its lock for a moment if nobody has."""
    if not File(store.root, files.LOCK_NAME).is_plain():
        return False
    try:
        handle, _ = files.lock_folder(store.root, read_only=True)
    except files.StoreLockedError:
        return True
    os.close(handle)
    return False


def is_store(folder: Path) -> bool:
    """Whether a folder looks like a store at all."""
    try:
        layout.open_to_read(folder).close()
    except (OSError, StoreFolderError):
        return False
    return True
