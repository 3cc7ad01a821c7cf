"""What the store holds, in memory: entries, the pieces they share, total bytes, and who goes first.

Pure bookkeeping without files or threads. A piece's bytes count once, however many entries need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Entry:
    """One conversation on disk."""

    key: str
    meta: Mapping[str, Any]
    own_bytes: int  # of its own file
    pieces: Mapping[str, int]  # name -> bytes
    last_used_s: float  # Unix time
    is_foreign: bool = False  # of another model or format: it only takes room here
    num_readers: int = 0  # it must not vanish under these

    @property
    def is_pinned(self) -> bool:
        """By its caller, as its meta says."""
        return self.meta.get("is_pinned") is True

    @property
    def num_bytes(self) -> int:
        return self.own_bytes + sum(self.pieces.values())


def _stays(entry: Entry, but: str) -> bool:
    return bool(entry.num_readers) or entry.key == but


class Index:
    """Entries by key. `total_bytes` is what all files take together."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._references: dict[str, int] = {}
        self._piece_bytes: dict[str, int] = {}
        self.total_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def piece_bytes(self, name: str) -> int | None:
        """Bytes of a piece that some entry needs, or None."""
        return self._piece_bytes.get(name)

    def users_of(self, name: str) -> list[Entry]:
        """Entries that need a piece."""
        return [entry for entry in self if name in entry.pieces]

    def add(self, entry: Entry) -> list[str]:
        """Put in an entry, replacing one of the same key; returns pieces that nobody needs any more."""
        for name, num_bytes in entry.pieces.items():
            if name not in self._references:
                self._references[name], self._piece_bytes[name] = 0, num_bytes
                self.total_bytes += num_bytes
            self._references[name] += 1
        unused = self.remove(entry.key)
        self._entries[entry.key] = entry
        self.total_bytes += entry.own_bytes
        return unused

    def remove(self, key: str) -> list[str]:
        """Forget an entry if there is one; returns pieces that nobody needs any more."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return []
        self.total_bytes -= entry.own_bytes
        unused = []
        for name in entry.pieces:
            self._references[name] -= 1
            if self._references[name] == 0:
                del self._references[name]
                self.total_bytes -= self._piece_bytes.pop(name)
                unused.append(name)
        return unused

    def oldest(self, but: str) -> Entry | None:
        """Who makes room next: other models' entries first, pinned ones last, else the least recently used.

        Never one being read, nor `but`.
        """
        candidates = [entry for entry in self if not _stays(entry, but)]
        return min(candidates, key=lambda e: (not e.is_foreign, e.is_pinned, e.last_used_s), default=None)

    def staying(self, but: str) -> tuple[int, Mapping[str, int]]:
        """Bytes that remain once all have made room that can (`oldest`), and the pieces among them with theirs."""
        entries = [entry for entry in self if _stays(entry, but)]
        pieces = {name: num_bytes for entry in entries for name, num_bytes in entry.pieces.items()}
        return sum(entry.own_bytes for entry in entries) + sum(pieces.values()), pieces

    def check(self) -> None:
        """Raises AssertionError when the totals are not those of the entries: a bug in this project."""
        pieces = {name: num_bytes for entry in self for name, num_bytes in entry.pieces.items()}
        needed = {name: len(self.users_of(name)) for name in pieces}
        assert needed == self._references, "pieces and their users disagree"
        assert self.total_bytes == sum(e.own_bytes for e in self) + sum(pieces.values()), "bytes do not add up"
