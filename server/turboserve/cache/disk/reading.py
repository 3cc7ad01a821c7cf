"""Reading one entry whole: its own file and its pieces, every checksum verified, arrays put together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from turboserve.cache.disk import container, pieces
from turboserve.cache.disk.container import Array, DamagedFileError
from turboserve.cache.disk.layout import StoreFolder


class DamagedPieceError(DamagedFileError):
    """A piece is damaged, and with it every entry that needs it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def read_entry(store: StoreFolder, key: str) -> tuple[dict[str, Any], list[Array]]:
    """An entry's fields and arrays. Raises DamagedFileError, OSError."""
    head, rest = container.read(store.entry(key))
    try:
        if head.kind != "entry" or head.fields["key"] != key:
            raise DamagedFileError("the entry's file holds another entry")
        names = [str(name) for name, _ in head.fields["pieces"]]
        parts = list(_read_pieces(store, names))
        return head.fields, pieces.join(head.fields["header"], parts, rest)
    except (KeyError, TypeError) as exc:
        raise DamagedFileError(f"the entry's fields cannot be understood: {exc!r}") from exc


def _read_pieces(store: StoreFolder, names: Iterable[str]) -> Iterable[dict[str, Array]]:
    for name in names:
        try:
            head, arrays = container.read(store.piece(name))
        except (DamagedFileError, FileNotFoundError) as exc:
            raise DamagedPieceError(name, str(exc)) from exc
        if head.kind != "piece" or head.fields.get("name") != name:
            raise DamagedPieceError(name, "a piece's file holds another piece")
        yield arrays
