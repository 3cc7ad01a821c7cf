"""One exported session as a stream of bytes: the store's own containers back to back, each with its checksums.

    session  container without arrays: version, what gives the caches meaning, the caches' header, bytes of every part
    piece    one for each thousand tokens, as the store has them
    rest     what the pieces leave of the arrays, and the conversation's tokens
    end      container without arrays: a checksum of everything before it

Whoever reads knows from the first container what would come and how much of it, before anything else is taken.
Nothing in such a file is executed, allocated by a number from it, or believed before its checksum was verified. Knows
arrays and bytes, not MLX, sessions or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import xxhash

from turboserve.cache.disk import container, pieces
from turboserve.cache.disk.container import Array, Container, DamagedFileError, pack, packed_bytes, slices

VERSION = 1
FIRST_BYTES = container.LENGTH_BYTES
# The caches' header describes a few arrays a layer, and parts are one for a thousand tokens: a fifth of this at most.
MAX_HEAD_BYTES = 4 << 20
# Of a file that is to be believed: sixteen million tokens, and ten arrays for each of 1,600 layers.
MAX_PARTS = MAX_ARRAYS = 1 << 14
TOKENS = "tokens"
_HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class SessionHead:
    """What a file says before its contents. `fields` and `header` are the writer's words, not believed yet."""

    fields: Mapping[str, Any]  # session id, formats, adapter, what the caches mean
    header: Mapping[str, Any]  # of serialise.py
    part_bytes: tuple[int, ...]
    head_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return self.head_bytes + sum(self.part_bytes)


class SessionFile:
    """A session about to be written. Hashes all of it once: not on a thread that others wait for."""

    def __init__(self, fields: Mapping[str, Any], header: Mapping[str, Any], arrays: list[Array], tokens: Array):
        """tokens (T,) int32 are those that the caches hold."""
        cut, rest = pieces.split(header, arrays)
        self._parts = [pack("piece", {}, piece) for piece in cut]
        self._parts.append(pack("rest", {}, {**rest, TOKENS: tokens.astype("<i4")}))
        end = pack("end", {"checksum": "0" * 32}, {})  # of the same length whatever the checksum is
        sizes = [packed_bytes(*part) for part in (*self._parts, end)]
        said = {"version": VERSION, "session": dict(fields), "header": dict(header), "parts": sizes}
        self._head = pack("session", said, {})
        self.num_bytes = packed_bytes(*self._head) + sum(sizes)

    def slices(self) -> Iterator[memoryview]:
        """The whole file in pieces of at most 1 MiB."""
        digest = xxhash.xxh3_128()
        for part in (self._head, *self._parts):
            for piece in slices(*part):
                digest.update(piece)
                yield piece
        yield from slices(*pack("end", {"checksum": digest.hexdigest()}, {}))


def head_bytes(first: bytes) -> int:
    """Length of the head by a file's FIRST_BYTES. Raises DamagedFileError for what is no such file."""
    num_bytes = container.header_bytes(first)
    if not FIRST_BYTES + 2 <= num_bytes <= MAX_HEAD_BYTES:
        raise DamagedFileError("this is no exported session")
    return num_bytes


def parse_head(data: bytes) -> SessionHead:
    """The head, its checksum verified. Raises DamagedFileError."""
    head = container.parse_header(data, "the head")
    try:
        said = head.fields
        if head.kind != "session":
            raise DamagedFileError("this is no exported session")
        if said["version"] != VERSION:
            raise DamagedFileError(
                f"a session exported in version {said['version']!r:.20} of the format, not {VERSION}"
            )
        part_bytes = tuple(said["parts"])
        if not all(type(n) is int and 0 < n < 1 << 50 for n in part_bytes) or len(part_bytes) < 2:
            raise DamagedFileError("the head says no lengths of its parts")
        if len(part_bytes) > MAX_PARTS or len(said["header"]["arrays"]) > MAX_ARRAYS:
            raise DamagedFileError("it has more parts than any session")
        return SessionHead(dict(said["session"]), dict(said["header"]), part_bytes, len(data))
    except (KeyError, TypeError, ValueError) as exc:
        if isinstance(exc, DamagedFileError):
            raise
        raise DamagedFileError(f"the head cannot be understood ({type(exc).__name__})") from exc


def read_contents(file: BinaryIO, head: SessionHead) -> tuple[list[Array], Array]:
    """Arrays and tokens (T,) int32 of a whole file, every checksum verified.

    `file` is at its beginning and has exactly `head.num_bytes` bytes. Raises DamagedFileError, OSError.
    """
    before_end = head.num_bytes - head.part_bytes[-1]
    whole = _checksum(file, before_end)
    file.seek(head.head_bytes)
    parts = [_read_part(file, i, num_bytes) for i, num_bytes in enumerate(head.part_bytes)]
    (*cut, (rest, rest_arrays)), (end, _) = parts[:-1], parts[-1]
    if {part.kind for part, _ in cut} - {"piece"} or rest.kind != "rest" or end.kind != "end":
        raise DamagedFileError("its parts are in another order")
    if end.fields.get("checksum") != whole:
        raise DamagedFileError("its contents do not match the checksum at its end")
    tokens = rest_arrays.pop(TOKENS, None)
    if tokens is None or tokens.dtype != np.int32 or tokens.ndim != 1:
        raise DamagedFileError("it has no tokens")
    return pieces.join(head.header, [arrays for _, arrays in cut], rest_arrays), tokens


def _read_part(file: BinaryIO, number: int, num_bytes: int) -> tuple[Container, dict[str, Array]]:
    return container.read_part(file, num_bytes, f"part {number + 1}")


def _checksum(file: BinaryIO, num_bytes: int) -> str:
    digest = xxhash.xxh3_128()
    while num_bytes:
        piece = file.read(min(num_bytes, _HASHED_AT_ONCE))
        if not piece:
            raise DamagedFileError("it ends too early")
        digest.update(piece)
        num_bytes -= len(piece)
    return digest.hexdigest()
