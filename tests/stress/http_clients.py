"""Bare HTTP clients for stress: cheap, many at once, and able to leave in the middle of an answer."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 300.0  # only a hang reaches it


@dataclass(frozen=True, slots=True)
class Stream:
    """What came of a streamed chat: its text, why it ended, and whether it went to its end."""

    text: str
    finish_reason: str | None
    is_whole: bool


@asynccontextmanager
async def connected(
    url: str, method: str, path: str, body: bytes
) -> AsyncIterator[tuple[int, dict[str, str], asyncio.StreamReader]]:
    """Status, headers and the body's reader; the connection is closed on the way out, finished or not."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        yield status, headers, reader
    finally:
        writer.close()


async def ask(url: str, method: str, path: str, body: Mapping[str, Any] | bytes = b"") -> tuple[int, bytes]:
    """Status and the whole body as it was sent, chunk sizes among it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with asyncio.timeout(TIMEOUT_S), connected(url, method, path, data) as (status, _, reader):
        return status, await reader.read()


async def stream_chat(url: str, body: Mapping[str, Any], leave_after: int | None) -> Stream:
    """A streamed chat completion, left after so many pieces of text. Raises AssertionError unless it is answered."""
    text, reason, num_pieces = "", None, 0
    data = json.dumps({**body, "stream": True}).encode()
    async with asyncio.timeout(TIMEOUT_S), connected(url, "POST", "/v1/chat/completions", data) as (status, _, reader):
        assert status == 200, (status, await reader.read())
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return Stream(text, reason, True)
            event = json.loads(line[6:])
            assert "error" not in event, event
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                text, num_pieces = text + piece, num_pieces + bool(piece)
                reason = choice["finish_reason"] or reason
            if leave_after is not None and num_pieces >= leave_after:
                return Stream(text, reason, False)
    return Stream(text, reason, False)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds (Linux only)."""

    rss_bytes: int
    num_descriptors: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        status = Path(f"/proc/{pid}/status").read_text()
        rss_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        return cls(rss_kib << 10, len(os.listdir(f"/proc/{pid}/fd")))
