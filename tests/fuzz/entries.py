"""A stored or exported conversation whose JSON is changed behind its checksums, read the whole way into caches.

Checksums hide most of the reader from changed bytes, so here they are made to fit each change: what is refused must
be refused because of what it says.
"""

from __future__ import annotations

import base64
import copy
import itertools
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash
from tests.turboquant_kv import small_models

from turboquant_kv.cache.model_runtimes import KVFamily
from turboquant_kv.codec.format import KVFormat
from turboserve.cache.disk.container import Array, DamagedFileError, pack, slices
from turboserve.cache.disk.folder import File
from turboserve.cache.disk.layout import open_store_folder
from turboserve.cache.disk.reading import read_entry
from turboserve.cache.disk.scan import entry_fields, scan
from turboserve.cache.disk.session_file import (
    FIRST_BYTES,
    SessionFile,
    head_bytes,
    parse_head,
    read_contents,
)
from turboserve.cache.disk.writing import Job
from turboserve.cache.interfaces import ServedModel, StoredEntry
from turboserve.cache.persistence import conversation_of
from turboserve.cache.transfers import Transfers
from turboserve.engine.served_formats import ServedFormats
from turboserve.errors import TurboServeError
from turboserve.messages import ImportSession

KEY, FORMAT, NUM_TOKENS = "key", "4/3", 70
SCALARS = (None, True, -1, 0, 1, 2, 3, 16, 70, 2**31, 2**63, 2**70, -(2**70), 1e308, float("inf"), float("nan"))
WORDS = ("", "x", "F32", "U8", "f16", "float16", "uint8", "0", "4/3", "entry", "piece", "k" * 40, "\x00", "9" * 5000)
EMPTY: tuple[Any, ...] = ([], {}, [0], [0, 0], [1, 2**70], [[0, 1]], {"0": 0}, [[]])
VALUES = (*SCALARS, *WORDS, *EMPTY)


class Stored:
    """One conversation of a small model on disk: its own file and one piece, as they were written."""

    def __init__(self, root: Path) -> None:
        # The same weights in every process, so that an input that was found can be repeated.
        mx.random.seed(1)
        model = small_models.dense()
        self.family = KVFamily(model, base=KVFormat(page_tokens=16, sink_tokens=8), backend="cpu-numpy")
        caches = self.family.runtime(FORMAT).make_cache()
        tokens = np.arange(NUM_TOKENS, dtype="<i4") % 50
        mx.eval(model(mx.array(tokens[None]), cache=caches))
        header, arrays = self.family.export_caches(caches)
        self.served = ServedFormats(model, KVFormat(page_tokens=16, sink_tokens=8, centred=False))
        served = self.served.runtime(FORMAT).make_cache()
        mx.eval(model(mx.array(tokens[None]), cache=served))
        self.header, self.arrays = self.served.export_caches(served)
        self.served.runtime(FORMAT).release(served)
        self.folder = open_store_folder(root)
        job = Job(KEY, _meta(tokens.tobytes()), header, arrays)
        self.pieces, self.rest = job.parts
        sizes = [(name, 1) for name, _ in self.pieces]
        self.fields = entry_fields(KEY, "print", job.meta, job.header, sizes)
        for name, piece in self.pieces:
            _write(self.folder.piece(name), "piece", {"name": name}, piece)

    def write(self, kind: str, fields: Any, arrays: dict[str, Array]) -> None:
        _write(self.folder.entry(KEY), kind, fields, arrays)


def transfer(data: bytes) -> None:
    """The same conversation as an exported session, changed behind its checksums, the whole way into a memory."""
    stored = _stored()
    choices = iter(data)
    header, arrays = stored.header, dict(enumerate(stored.arrays))
    fields = {
        "session_id": "s",
        "kv_format": FORMAT,
        "wanted_format": FORMAT,
        "adapter": "",
        "model": "",
        "model_name": "",
    }
    fields |= stored.served.fingerprints(FORMAT)
    changed: dict[str, Any] = {"fields": copy.deepcopy({"session": fields, "header": header})}
    for _ in range(1 + next(choices, 0) % 3):
        _change(changed, choices)
    if next(choices, 0) % 4 == 1:
        _change_arrays(arrays, choices)
    tokens = np.arange(next(choices, NUM_TOKENS) if next(choices, 0) % 4 == 1 else NUM_TOKENS, dtype=np.int32)
    try:
        told = changed["fields"]
        # what the head says need not be how the parts were cut
        file = SessionFile(told["session"], header, list(arrays.values()), tokens)
        _, *packed = _parts_of(b"".join(file.slices()))
        data = _joined(told["session"], told["header"], packed)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return  # such a file cannot be written
    _take_in(stored, data)


def _take_in(stored: Stored, data: bytes) -> None:
    """As the importing route and the engine do it: a session, or an error that is known, and no page too many."""
    used = stored.served.totals().compressed
    memory = Transfers(stored.served, ServedModel(), None)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        try:
            head = parse_head(data[: head_bytes(data[:FIRST_BYTES])])
            if head.num_bytes != len(data):
                return
            memory.check(head.fields)
            arrays, tokens = read_contents(file, head)
            command = ImportSession("", "s", head.fields, head.header, arrays, tokens)
            conversation = memory.restore(command, 0.0)
        except (DamagedFileError, TurboServeError):
            assert stored.served.totals().compressed == used, "what was refused holds pages"
            return
    runtime = stored.served.runtime(conversation.kv_format)
    assert conversation.caches is not None
    runtime.check_integrity()
    runtime.release(conversation.caches)


def _parts_of(data: bytes) -> list[bytes]:
    head = parse_head(data[: head_bytes(data[:FIRST_BYTES])])
    places = [0, *itertools.accumulate((head.head_bytes, *head.part_bytes))]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def _joined(fields: Any, header: Any, parts: list[bytes]) -> bytes:
    """A file with a head that says this, of these parts; its checksum at the end made to fit."""
    said = {"version": 1, "session": fields, "header": header, "parts": [len(part) for part in parts]}
    before = b"".join((*map(bytes, slices(*pack("session", said, {}))), *parts[:-1]))
    end = pack("end", {"checksum": xxhash.xxh3_128_hexdigest(before)}, {})
    return before + b"".join(map(bytes, slices(*end)))


def entry(data: bytes) -> None:
    """Bytes choose what is changed, and into what; then the store is scanned and the conversation restored."""
    stored = _stored()
    choices = iter(data)
    changed: dict[str, Any] = {"kind": "entry", "fields": copy.deepcopy(stored.fields)}
    for _ in range(1 + next(choices, 0) % 3):
        _change(changed, choices)
    arrays = dict(stored.rest)
    if next(choices, 0) % 4 == 1:
        _change_arrays(arrays, choices)
    stored.write(changed["kind"], changed["fields"], arrays)
    for found in scan(stored.folder, "print").entries:
        try:
            conversation_of(StoredEntry(found.key, found.meta, found.num_bytes), 0.0)
        except ValueError:
            continue
    try:
        fields, restored = read_entry(stored.folder, KEY)
        caches = stored.family.import_caches(fields["header"], restored)
    except ValueError:  # a DamagedFileError is one, too
        return
    runtime = stored.family.runtime(FORMAT if fields["header"]["format"] else "f16")
    runtime.check_integrity()
    runtime.release(caches)


@cache
def _stored() -> Stored:
    memory = Path("/dev/shm")  # files there cost no disk
    return Stored(Path(tempfile.mkdtemp(prefix="turboserve-fuzz-", dir=memory if memory.is_dir() else None)))


def _write(file: File, kind: str, fields: dict[str, Any], arrays: dict[str, Array]) -> None:
    head, data = pack(kind, fields, arrays)
    file.path.write_bytes(head + b"".join(array.tobytes() for array in data))


def _meta(tokens: bytes) -> dict[str, Any]:
    names = ("tokens", "compressed", "exact", "slack", "uncompressed", "raw_equivalent")
    return {
        "session_id": "s", "public_id": "s", "salt": "", "created_unix_s": 1.0, "last_used_unix_s": 2.0,
        "is_explicit": True, "is_pinned": False, "ttl_s": None, "hits": 0, "num_requests": 1, "cache_key": None,
        "kv_format": FORMAT, "wanted_format": FORMAT, "adapter": "", "version": "1", "kv": dict.fromkeys(names, 0),
        "tokens": base64.b85encode(zlib.compress(tokens, 1)).decode(),
    }  # fmt: skip


def _change(value: Any, choices: Iterator[int]) -> None:
    """Walk down as the bytes say, and put another value there, leave one out or add one."""
    parent: Any = value
    place: Any = "fields"
    while True:
        inner = parent[place]
        names = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        if not names or next(choices, 0) % 8 == 7:
            break
        parent, place = inner, names[next(choices, 0) % len(names)]
    how = next(choices, 0) % 8
    if how == 0 and parent is not value:
        del parent[place]
    elif how == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[place]))
    elif how == 2 and isinstance(parent, dict) and parent is not value:
        parent[VALUES[next(choices, 0) % len(WORDS) + len(SCALARS)]] = parent[place]
    else:
        parent[place] = copy.deepcopy(VALUES[next(choices, 0) % len(VALUES)])


def _change_arrays(arrays: dict[Any, Array], choices: Iterator[int]) -> None:
    """Another shape or type for one of them, none at all, or other numbers in it."""
    name = list(arrays)[next(choices, 0) % len(arrays)]
    array, how = arrays[name], next(choices, 0) % 5
    if how == 0:
        del arrays[name]
    elif how == 1:
        arrays[name] = array.reshape(-1)
    elif how == 2:
        arrays[name] = array[..., : array.shape[-1] // 2].copy() if array.ndim else array
    elif how == 3:
        arrays[name] = array.astype(np.float64)
    else:
        arrays[name] = np.full_like(array, next(choices, 0))


def seeds() -> list[bytes]:
    """Inputs to begin with: a change of each kind at the top, and nothing at all."""
    found = bytes.fromhex("1022ad849bdf954a921695b589bc0a56")
    changes: tuple[Iterable[int], ...] = (
        [],
        [0, 7, 3, 0],
        [2, 1, 4, 1, 0, 2, 9, 1, 3, 0, 0],
        range(40),
        [0, 0, 1] * 20,
    )
    return [*map(bytes, changes), found]
