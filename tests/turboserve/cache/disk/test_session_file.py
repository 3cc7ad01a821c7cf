"""Exported sessions as bytes: what was written comes back, and nothing else is ever believed."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import numpy as np
import pytest
from tests.turboserve.cache.disk.conversations import conversation

from turboserve.cache.disk import container, session_file
from turboserve.cache.disk.container import DamagedFileError, pack, slices
from turboserve.cache.disk.session_file import (
    FIRST_BYTES,
    MAX_HEAD_BYTES,
    SessionFile,
    SessionHead,
    head_bytes,
    parse_head,
    read_contents,
)

TOKENS = np.arange(40, dtype=np.int32)
FIELDS = {"session_id": "s", "kv_format": "4/3"}


def whole(number: int = 1, num_pages: int = 10) -> bytes:
    _, header, arrays = conversation(number, num_pages)
    file = SessionFile(FIELDS, header, arrays, TOKENS)
    data = b"".join(file.slices())
    assert len(data) == file.num_bytes
    return data


def read(data: bytes) -> tuple[SessionHead, list[Any], Any]:
    """As the importing route does it."""
    if len(data) < FIRST_BYTES:
        raise DamagedFileError("too short")
    head = parse_head(data[: head_bytes(data[:FIRST_BYTES])])
    if head.num_bytes != len(data):
        raise DamagedFileError("another length")
    with tempfile.TemporaryFile() as file:  # arrays are read by the file's number
        file.write(data)
        file.seek(0)
        return head, *read_contents(file, head)


@pytest.mark.parametrize("num_pages", [0, 3, 10, 40])
def test_what_was_exported_comes_back(num_pages: int) -> None:
    _, header, arrays = conversation(3, num_pages)
    head, got, tokens = read(whole(3, num_pages))
    assert (head.fields, head.header) == (FIELDS, header)
    assert np.array_equal(tokens, TOKENS)
    for mine, its in zip(got, arrays, strict=True):
        assert mine.dtype == its.dtype and np.array_equal(mine, its)
    assert len(head.part_bytes) == num_pages // 4 + 2, "a part for each piece, one for the rest, one for the end"


def test_every_flipped_byte_is_noticed(rng: np.random.Generator) -> None:
    data = whole(num_pages=5)
    head_len = head_bytes(data[:FIRST_BYTES])
    places = {*range(0, head_len, 7), *range(len(data) - 300, len(data), 3), *rng.integers(0, len(data), 300).tolist()}
    for place in sorted(places):
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(DamagedFileError):
            read(bytes(changed))


def test_every_torn_file_is_noticed(rng: np.random.Generator) -> None:
    data = whole()
    for length in (0, 1, FIRST_BYTES, 100, len(data) - 1, *rng.integers(0, len(data), 50).tolist()):
        with pytest.raises(DamagedFileError):
            read(data[:length])
        with pytest.raises(DamagedFileError):
            read(data[:length] + data[length + 1 :])


def test_parts_in_another_order_or_of_another_file_are_noticed() -> None:
    data, other = whole(1), whole(2)
    head, foreign = (parse_head(x[: head_bytes(x[:FIRST_BYTES])]) for x in (data, other))
    assert head.part_bytes == foreign.part_bytes
    first, second = head.head_bytes, head.head_bytes + head.part_bytes[0]
    end = second + head.part_bytes[1]
    swapped = data[:first] + data[second:end] + data[first:second] + data[end:]
    mixed = data[:first] + other[first:second] + data[second:]
    for changed in (swapped, mixed):
        with pytest.raises(DamagedFileError, match="checksum"):
            read(changed)


def head_of(said: Any) -> bytes:
    return b"".join(slices(*pack("session", said, {})))


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"version": 2, "session": {}, "header": {}, "parts": [1, 1]},
        {"version": 1, "session": {}, "header": {}, "parts": [1]},
        {"version": 1, "session": {}, "header": {}, "parts": [1, -1]},
        {"version": 1, "session": {}, "header": {}, "parts": [1, 2**60]},
        {"version": 1, "session": {}, "header": {}, "parts": [True, True]},
        {"version": 1, "session": {}, "header": {}, "parts": "12"},
        {"version": 1, "session": [], "header": 7, "parts": [1, 1]},
        {"version": 1, "session": "ab", "header": {}, "parts": [1, 1]},
        {"version": 1, "session": {}, "header": {}, "parts": {}},
    ],
)
def test_a_head_that_says_nonsense_is_refused_whatever_its_checksum(said: Any) -> None:
    with pytest.raises(DamagedFileError):
        parse_head(head_of(said))


def test_a_head_that_says_it_is_huge_is_not_waited_for() -> None:
    for length in (MAX_HEAD_BYTES, 2**63):
        with pytest.raises(DamagedFileError, match="no exported session"):
            head_bytes(length.to_bytes(8, "little"))


def test_an_entry_of_the_store_is_no_exported_session() -> None:
    data = b"".join(slices(*pack("entry", {"key": "k"}, {"a": np.zeros(3, np.uint8)})))
    with pytest.raises(DamagedFileError):
        parse_head(data[: head_bytes(data[:FIRST_BYTES])])


def described(entries: list[tuple[list[int], list[int]]], num_bytes: int) -> bytes:
    """A container whose arrays are said to lie at these places, with right checksums."""
    head, _ = pack("rest", {}, {str(i): np.zeros(1, np.uint8) for i in range(len(entries))})
    length = int.from_bytes(head[:8], "little")
    said = json.loads(head[8 : 8 + length])
    metadata = said.pop("__metadata__")
    for i, (place, shape) in enumerate(entries):
        said[str(i)] = {"dtype": "U8", "shape": shape, "data_offsets": place}
    body = np.zeros(num_bytes, np.uint8)
    metadata["data_checksum"] = container._checksum([body])
    del metadata["header_checksum"]
    metadata["header_checksum"] = container._header_checksum(metadata, said)
    text = json.dumps({"__metadata__": metadata, **said}, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + body.tobytes()


@pytest.mark.parametrize(
    "entries",
    [
        [([0, 8], [8]), ([0, 8], [8])],  # both of the same bytes
        [([0, 4], [4]), ([5, 8], [3])],
        [([4, 8], [4]), ([0, 4], [4])],
        [([0, 4], [4])],
        [(["0", 8], [8])],
    ],
)
def test_arrays_that_do_not_follow_each_other_are_refused(entries: Any) -> None:
    """Overlapping ones would be copied into many times the file's bytes."""
    for whole_ones, is_fine in ((entries, False), ([([0, 3], [3]), ([3, 8], [5])], True)):
        data = described(whole_ones, 8)
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            if is_fine:
                assert len(container.read_part(file, len(data), "part")[1]) == 2
                continue
            with pytest.raises(DamagedFileError):
                container.read_part(file, len(data), "part")


@pytest.mark.parametrize("too_many", ["parts", "arrays"])
def test_a_head_of_more_parts_or_arrays_than_any_session_is_refused(too_many: str) -> None:
    parts = [100] * (session_file.MAX_PARTS + 1) if too_many == "parts" else [100, 100]
    arrays: list[Any] = [{}] * (session_file.MAX_ARRAYS + 1) if too_many == "arrays" else []
    head, _ = pack("session", {"version": 1, "session": {}, "header": {"arrays": arrays}, "parts": parts}, {})
    with pytest.raises(DamagedFileError, match="more parts"):
        parse_head(head)
