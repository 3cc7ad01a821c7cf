"""What fuzzers call with bytes: it must not raise. Needs no fuzzer, so that tests run the same functions on seeds.

body    any bytes as the body of each API that takes one: a request, or one of our errors
store   any bytes as a file of the session store: its arrays, or DamagedFileError; and a good file with bytes changed
entry   a stored conversation with its JSON changed behind the checksums (entries.py): caches, or an error that is known
transfer  the same as an exported session that is imported: a conversation, or an error, and no page held for it
text    any tokens through incremental decoding and stop strings: what is sent is the text up to the first stop
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from pydantic import BaseModel
from tests.fuzz import entries

from turboserve.api.anthropic.body import MessagesBody
from turboserve.api.body import parse_object
from turboserve.api.chat_body import ChatBody
from turboserve.api.chat_request import parse_chat
from turboserve.api.completion_body import CompletionBody
from turboserve.api.model_names import ServedNames
from turboserve.api.ollama.bodies import OllamaChatBody
from turboserve.api.responses.body import ResponsesBody
from turboserve.api.validation import validated
from turboserve.cache.disk import container
from turboserve.cache.disk.container import DamagedFileError
from turboserve.cache.disk.folder import File, Folder
from turboserve.engine.text import REPLACEMENT, IncrementalDecoder, TextStream
from turboserve.errors import TurboServeError

MOST_MESSAGE_CHARS = 2000  # an error quotes no more of what a client sent
_MEMORY = Path("/dev/shm")  # files there cost no disk
_FOLDER = Folder.open(Path(tempfile.mkdtemp(prefix="turboserve-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None)))

Target = Callable[[bytes], None]


def body(data: bytes) -> None:
    """A request body, for every API: as it is, and as the choices of which a body with known names is made."""
    try:
        parsed = parse_object(data)
    except TurboServeError as error:
        _check_error(error)
    else:
        _check_body(parsed)
    chosen = _Choices(data).value(0)
    if isinstance(chosen, dict):
        _check_body(parse_object(json.dumps(chosen).encode()))


def _check_body(parsed: Mapping[str, object]) -> None:
    _check_chat(parsed)
    for model in BODIES:
        try:
            validated(model, parsed)
        except TurboServeError as error:
            _check_error(error)


class _Choices:
    """A JSON value made of bytes, each of which chooses one thing; at its end everything is null."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def _next(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def value(self, depth: int) -> Any:
        """An object on top; below it whatever is chosen, eight levels deep at most."""
        kind = 11 if depth == 0 else self._next() % 12
        if kind >= 10 and depth < 8:
            return {NAMES[self._next() % len(NAMES)]: self.value(depth + 1) for _ in range(self._next() % 6 + 1)}
        if kind >= 8 and depth < 8:
            return [self.value(depth + 1) for _ in range(self._next() % 4)]
        if kind >= 6:
            return WORDS[self._next() % len(WORDS)]
        return (None, True, False, self._next() - 2, NUMBERS[self._next() % len(NUMBERS)], chr(self._next()))[kind % 6]


def _check_chat(parsed: Mapping[str, object]) -> None:
    try:
        chat = parse_chat(parsed, request_id="r", tenant="", names=ServedNames("m", takes_any_name=True))
    except TurboServeError as error:
        _check_error(error)
    else:
        assert chat.requests


BODIES: tuple[type[BaseModel], ...] = (CompletionBody, MessagesBody, OllamaChatBody, ResponsesBody)
# Names that bodies and their parts have, and values that they are compared with.
BODY_NAMES = sorted({name for fields in (ChatBody, CompletionBody, MessagesBody) for name in fields.model_fields})
NAMES = [
    *BODY_NAMES,
    *("input", "instructions", "num_predict", "keep_alive", "reasoning", "previous_response_id", "think", "raw"),
    *("role", "content", "type", "text", "name", "function", "parameters", "arguments", "id", "tool_call_id", "schema"),
    *("json_schema", "properties", "items", "enum", "strict", "call_id", "output", "thinking", "input_schema", "5"),
    *("include_usage", "choice", "regex", "grammar", "json", "options", "effort", "budget_tokens", "refusal", "alien"),
]
WORDS = (
    *("user", "assistant", "system", "tool", "function", "developer", "text", "image_url", "message", "auto", "none"),
    *("required", "json_schema", "json_object", "function_call", "function_call_output", "input_text", "tool_use"),
    *("tool_result", "object", "string", "number", "low", "4/3", "f16", "m", "", "\x00", "é🙂", "[0-9]+", "a" * 300),
)
NUMBERS = (0.5, -1, 1e308, 2**63, -(2**63), 2**31, 1e-300, 8192, 100_000, 2, 20, -0.0)


def _check_error(error: TurboServeError) -> None:
    assert 400 <= error.status < 500, error
    assert 0 < len(error.message) <= MOST_MESSAGE_CHARS
    error.message.encode()  # it can be sent


def store(data: bytes) -> None:
    """A file of the store. What is believed without both checksums would be a fault, so they are made to fit first."""
    file = File(_FOLDER, "file.safetensors")
    for content in (data, _with_header_checksum(data)):
        file.path.write_bytes(content)
        try:
            _, arrays = container.read(file)
        except DamagedFileError:
            continue
        for array in arrays.values():
            assert array.nbytes <= len(content)
            np.ascontiguousarray(array).tobytes()


def _with_header_checksum(data: bytes) -> bytes:
    """The same JSON, if the data is any, in a file whose checksums are right: what lies behind them is read."""
    header, _, rest = data.partition(b"\n")
    try:
        described = json.loads(header)
        described = described if isinstance(described, dict) else {"a": described}
        metadata = described.pop("__metadata__", {})
        metadata = metadata if isinstance(metadata, dict) else {}
        metadata = {"kind": "entry", "fields": "{}", **metadata, "magic": container.MAGIC}
        metadata["data_checksum"] = xxhash.xxh3_128_hexdigest(rest)
        metadata.pop("header_checksum", None)
        text = json.dumps([metadata, described], separators=(",", ":"))
        metadata["header_checksum"] = xxhash.xxh3_128_hexdigest(text.encode())
        whole = json.dumps({"__metadata__": metadata, **described}).encode()
    except (ValueError, RecursionError):
        return b""
    return len(whole).to_bytes(8, "little") + whole + rest


def text(data: bytes) -> None:
    """Tokens of one to four bytes each, after a first byte that chooses the stop strings."""
    if not data:
        return
    pieces, given = _pieces(data[1:]), STOPS[data[0] % len(STOPS)]
    stops = [stop for stop in given if stop]  # an empty one stops nothing
    decoder = IncrementalDecoder(lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", "replace"))
    stream = TextStream(decoder, given)
    sent, stopped = "", False
    for token in range(len(pieces)):
        result = stream.add(token)
        sent += result.text
        assert not any(stop in sent for stop in stops), "a stop string was sent"
        if result.stopped:
            stopped = True
            break
    if not stopped:
        result = stream.flush()
        sent, stopped = sent + result.text, result.stopped
    whole = b"".join(pieces).decode("utf-8", "replace")
    if REPLACEMENT not in whole:  # broken bytes are replaced as a tokenizer would, in the middle of an answer
        places = [whole.find(stop) for stop in stops if stop in whole]
        assert sent == (whole[: min(places)] if places else whole)
        assert stopped == bool(places)


STOPS = ((), ("b",), ("ab", "abc"), ("\n\n",), ("é", "éé"), ("🙂",), ("aab", "ba"), ("", "x"))


def _pieces(raw: bytes) -> list[bytes]:
    """Cut where the bytes themselves say: lengths come from the lowest bits."""
    pieces, at = [], 0
    while at < len(raw):
        size = 1 + raw[at] % 4
        pieces.append(raw[at : at + size])
        at += size
    return pieces


def good_file() -> bytes:
    """A seed: a small file of the store."""
    head, data = container.pack("entry", {"key": "k"}, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    return head + b"".join(array.tobytes() for array in data)


def seeds() -> dict[str, list[bytes]]:
    """Inputs to begin with, by target."""
    chat: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 3,
        "temperature": 0.5,
        "stop": ["\n"],
        "logit_bias": {"5": 1},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    }
    described = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    huge = {"a": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}}
    deep = {"a": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}
    headers = [json.dumps(header).encode() + b"\n" for header in (described, huge, deep)]
    return {
        "body": [
            json.dumps(chat).encode(),
            b'{"model":"m","prompt":[1,2],"n":2}',
            b'{"model":"m","input":[{"type":"message","role":"user","content":"x"}]}',
            b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"x"}],"system":"s"}',
            b"\xff{",
        ],
        "store": [good_file(), headers[0] + bytes(24), headers[1], headers[2] + bytes(4), b"", bytes(8)],
        "entry": entries.seeds(),
        "transfer": entries.seeds(),
        "text": [b"\x02xxabcab", "\x04aéééb".encode(), "\x05🙂🙂".encode(), b"\x03\n\n\xf0\x9f"],
    }


TARGETS: dict[str, Target] = {
    "body": body,
    "store": store,
    "entry": entries.entry,
    "transfer": entries.transfer,
    "text": text,
}
