"""One file of the store: a safetensors container with a versioned header and checksums of its own.

safetensors readers accept flipped bits, so the header carries a checksum of itself and one of the
data; both must hold before anything is believed. Any safetensors tool can read these files. Nothing
in here is executed, allocated by a number from the file, or trusted before it was checked.

    8 bytes, little endian  length of the JSON that follows
    JSON                    {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets"}, ...}
    data                    arrays back to back, little endian, row major
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from turboserve.cache.disk.folder import File

Array = NDArray[Any]
Arrays = Mapping[str, Array]

MAGIC = "turboserve-kv-1"
"""Changes with everything that makes older files unreadable."""

_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
LENGTH_BYTES = 8
_SLICE_BYTES = 1 << 20  # what is written between two looks at the rate limit


class DamagedFileError(ValueError):
    """A file of the store is truncated, altered, or not one of its files."""


@dataclass(frozen=True, slots=True)
class Container:
    """A file's header: what it says about itself, and where its arrays lie."""

    kind: str  # "entry" or "piece"; of an exported session (session_file.py) others
    fields: dict[str, Any]
    arrays: dict[str, dict[str, Any]]
    data_start: int
    data_checksum: str


def pack(kind: str, fields: Mapping[str, Any], arrays: Arrays) -> tuple[bytes, list[Array]]:
    """A file's first bytes, and the arrays that must follow, contiguous and in this order."""
    data = [np.ascontiguousarray(a).reshape(a.shape) for a in arrays.values()]
    described: dict[str, Any] = {}
    position = 0
    for name, array in zip(arrays, data, strict=True):
        end = position + array.nbytes
        dtype = _NAMES[array.dtype]
        described[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    metadata = {"magic": MAGIC, "kind": kind, "fields": _dump(fields), "data_checksum": _checksum(data)}
    metadata["header_checksum"] = _header_checksum(metadata, described)
    text = _dump({"__metadata__": metadata, **described}).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, data


def packed_bytes(head: bytes, data: list[Array]) -> int:
    """Length of the file that `pack` describes."""
    return len(head) + sum(a.nbytes for a in data)


def slices(head: bytes, data: list[Array]) -> Iterator[memoryview]:
    """The whole file in pieces of bounded length."""
    for part in (np.frombuffer(head, np.uint8), *data):
        view = part.reshape(-1).view(np.uint8).data
        for start in range(0, len(view), _SLICE_BYTES):
            yield view[start : start + _SLICE_BYTES]


def read_header(file: File) -> Container:
    """A file's header alone, its checksum verified. Raises DamagedFileError, OSError."""
    with file.open() as stream:
        return _read_header(stream, os.fstat(stream.fileno()).st_size, file.name)


def read(file: File) -> tuple[Container, dict[str, Array]]:
    """A whole file, both checksums verified. Raises DamagedFileError, OSError."""
    with file.open() as stream:
        return read_part(stream, os.fstat(stream.fileno()).st_size, file.name)


def read_part(stream: BinaryIO, num_bytes: int, name: str) -> tuple[Container, dict[str, Array]]:
    """The container in the next `num_bytes` of a file, both checksums verified; `name` is for messages.

    Raises DamagedFileError, OSError.
    """
    head = _read_header(stream, num_bytes, name)
    data = np.fromfile(stream, np.uint8, num_bytes - head.data_start)
    if head.data_start + len(data) != num_bytes or _checksum([data]) != head.data_checksum:
        raise DamagedFileError(f"{name}: its data does not match its checksum")
    _check_places(head.arrays, len(data), name)
    return head, {key: _view(data, entry, name) for key, entry in head.arrays.items()}


def header_bytes(first: bytes) -> int:
    """How long the header is, by its first eight bytes, these included."""
    return LENGTH_BYTES + int.from_bytes(first[:LENGTH_BYTES], "little")


def parse_header(data: bytes, name: str) -> Container:
    """A header that is in memory, its checksum verified. Raises DamagedFileError."""
    return _read_header(io.BytesIO(data), len(data), name)


def _read_header(file: BinaryIO, num_bytes: int, name: str) -> Container:
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if num_bytes < LENGTH_BYTES + 2 or length > num_bytes - LENGTH_BYTES:
        raise DamagedFileError(f"{name}: too short for its header")
    try:
        described = json.loads(file.read(length))
        metadata = described.pop("__metadata__")
        claimed = metadata.pop("header_checksum")
        if metadata["magic"] != MAGIC or claimed != _header_checksum(metadata, described):
            raise DamagedFileError(f"{name}: its header does not match its checksum")
        fields = json.loads(metadata["fields"])
        return Container(metadata["kind"], fields, described, LENGTH_BYTES + length, metadata["data_checksum"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        if isinstance(exc, DamagedFileError):
            raise
        raise DamagedFileError(f"{name}: its header cannot be read ({type(exc).__name__})") from exc


def _check_places(described: Mapping[str, Any], num_bytes: int, name: str) -> None:
    """Raises DamagedFileError unless the arrays follow each other as `pack` places them.

    Arrays that overlapped would be copied into more memory than the file has bytes.
    """
    position = 0
    try:
        for entry in described.values():
            start, end = entry["data_offsets"]
            if start != position or end < start:
                raise DamagedFileError(f"{name}: its arrays do not follow each other")
            position = end
    except (KeyError, TypeError, ValueError) as exc:
        raise DamagedFileError(f"{name}: an array's description cannot be understood") from exc
    if position != num_bytes:
        raise DamagedFileError(f"{name}: its arrays are not all of its data")


def _view(data: Array, entry: Mapping[str, Any], name: str) -> Array:
    """An array of the file without copying it."""
    try:
        (start, end), dtype, shape = entry["data_offsets"], np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
        fits = 0 <= start <= end <= len(data) and all(n >= 0 for n in shape)
        if not fits or math.prod(shape) * dtype.itemsize != end - start:
            raise DamagedFileError(f"{name}: an array's place contradicts its shape")
        flat = np.frombuffer(data, dtype, math.prod(shape), start)
        return np.require(flat.reshape(shape), requirements="A")
    except DamagedFileError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise DamagedFileError(f"{name}: an array's description cannot be understood") from exc


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _header_checksum(metadata: Mapping[str, str], described: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_dump([metadata, described]).encode())


def _checksum(data: list[Array]) -> str:
    digest = xxhash.xxh3_128()
    for array in data:
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
