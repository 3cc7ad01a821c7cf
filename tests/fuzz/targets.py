"""What fuzzers call with bytes: it must not raise. Needs no fuzzer, so that tests run the same functions on seeds.

body    any bytes as the body of each API that takes one: a request, or one of our errors
store   any bytes as a file of the session store: its arrays, or DamagedFileError; and a good file with bytes changed
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

from turboserve.api.anthropic.body import MessagesBody
from turboserve.api.body import parse_object
from turboserve.api.chat_request import parse_chat
from turboserve.api.completion_body import CompletionBody
from turboserve.api.ollama.bodies import OllamaChatBody
from turboserve.api.responses.body import ResponsesBody
from turboserve.api.validation import validated
from turboserve.cache.disk import container
from turboserve.cache.disk.container import DamagedFileError
from turboserve.engine.text import REPLACEMENT, TextStream
from turboserve.errors import TurboServeError

MOST_MESSAGE_CHARS = 2000  # an error quotes no more of what a client sent
_FOLDER = Path(tempfile.mkdtemp(prefix="turboserve-fuzz-"))

Target = Callable[[bytes], None]


def body(data: bytes) -> None:
    """A request body, for every API."""
    try:
        parsed = parse_object(data)
    except TurboServeError as error:
        _check_error(error)
        return
    _check_chat(parsed)
    for model in (CompletionBody, MessagesBody, OllamaChatBody, ResponsesBody):
        try:
            validated(model, parsed)
        except TurboServeError as error:
            _check_error(error)


def _check_chat(parsed: Mapping[str, object]) -> None:
    try:
        chat = parse_chat(parsed, request_id="r", tenant="", model_id=None)
    except TurboServeError as error:
        _check_error(error)
    else:
        assert chat.requests


def _check_error(error: TurboServeError) -> None:
    assert 400 <= error.status < 500, error
    assert 0 < len(error.message) <= MOST_MESSAGE_CHARS
    error.message.encode()  # it can be sent


def store(data: bytes) -> None:
    """A file of the store. What is believed without both checksums would be a fault, so they are made to fit first."""
    path = _FOLDER / "file.safetensors"
    for content in (data, _with_header_checksum(data)):
        path.write_bytes(content)
        try:
            _, arrays = container.read(path)
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
    stream = TextStream(lambda ids: b"".join(pieces[i] for i in ids).decode("utf-8", "replace"), given)
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
    return {
        "body": [
            json.dumps(chat).encode(),
            b'{"model":"m","prompt":[1,2],"n":2}',
            b'{"model":"m","input":[{"type":"message","role":"user","content":"x"}]}',
            b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"x"}],"system":"s"}',
            b"\xff{",
        ],
        "store": [good_file(), json.dumps(described).encode() + b"\n" + bytes(24), b"", bytes(8)],
        "text": [b"\x02xxabcab", "\x04aéééb".encode(), "\x05🙂🙂".encode(), b"\x03\n\n\xf0\x9f"],
    }


TARGETS: dict[str, Target] = {"body": body, "store": store, "text": text}
