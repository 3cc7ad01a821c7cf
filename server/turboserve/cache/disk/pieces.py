"""Cutting a conversation's arrays into pieces that equal beginnings share, and putting them together again.

Every array's header entry may say `cut: [axis, items]`. Piece i of a conversation holds items
[i*items, (i+1)*items) of every array that has that many; what is left over stays with the entry. A
piece is named by its content, within one scope: two callers' equal pieces are different files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from turboserve.cache.disk.container import Array, DamagedFileError

_NAME_BYTES = 20  # 160 bits: nobody finds two contents with one name, on purpose or not


def split(header: Mapping[str, Any], arrays: Sequence[Array]) -> tuple[list[dict[str, Array]], dict[str, Array]]:
    """Pieces in order, and the rest of every array; names are the arrays' places. Views, nothing is copied."""
    pieces: list[dict[str, Array]] = []
    rest: dict[str, Array] = {}
    for i, (entry, array) in enumerate(zip(header["arrays"], arrays, strict=True)):
        axis, items = entry.get("cut") or (0, 0)
        num_pieces = array.shape[axis] // items if items else 0
        pieces += [{} for _ in range(num_pieces - len(pieces))]
        for p in range(num_pieces):
            pieces[p][str(i)] = _range(array, axis, p * items, (p + 1) * items)
        rest[str(i)] = _range(array, axis, num_pieces * items, None) if num_pieces else array
    return pieces, rest


def join(header: Mapping[str, Any], pieces: Sequence[Mapping[str, Array]], rest: Mapping[str, Array]) -> list[Array]:
    """Inverse of split. Raises DamagedFileError when parts are missing or do not fit."""
    arrays = []
    parts_of: dict[str, list[Array]] = {}
    for piece in (*pieces, rest):
        for name, part in piece.items():
            parts_of.setdefault(name, []).append(part)
    try:
        for i, entry in enumerate(header["arrays"]):
            parts = parts_of[str(i)]
            if str(i) not in rest:
                raise DamagedFileError(f"array {i} has no rest")
            axis = (entry.get("cut") or (0, 0))[0]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
            if list(array.shape) != entry["shape"]:
                raise DamagedFileError(f"an array came back as {array.shape}, {entry['shape']} was put")
            arrays.append(array)
    except DamagedFileError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as exc:
        raise DamagedFileError(f"the parts of an entry do not fit together: {exc}") from exc
    return arrays


def name_of(scope: str, piece: Mapping[str, Array]) -> str:
    """What a piece's file is called: a keyed hash of everything in it."""
    key = hashlib.blake2b(scope.encode(), digest_size=32).digest()
    digest = hashlib.blake2b(digest_size=_NAME_BYTES, key=key)
    for name, array in piece.items():
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _range(array: Array, axis: int, start: int, stop: int | None) -> Array:
    view: Array = array[(slice(None),) * axis + (slice(start, stop),)]
    return view
