"""How long others wait while one client sends what it should not: bodies of 8 MB of many kinds, idle connections.

`/health` is asked every 5 ms by a process of its own, over one kept connection, so that what is measured is the
server's turn and not the attacker's or the measurer's. A second figure is the longest pause between two pieces of a
running stream.

    python -m bench.hostile                 the embedded model, every body; --only NAME for some
    python -m bench.hostile --idle 3000     idle connections instead
    python -m bench.hostile --model PATH -- --max-context-tokens 131072
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import multiprocessing
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

BODY_BYTES = 8_000_000  # just below the default limit
ASK_EVERY_S = 0.005
Gaps = list[tuple[float, float]]  # when /health was asked, and how long it took; infinitely long where it failed


def filled(begin: str, piece: Callable[[int], str], end: str) -> bytes:
    """Pieces joined by commas, as many as make the body full."""
    parts, left, i = [], BODY_BYTES - len(begin) - len(end), 0
    while (left := left - len(part := piece(i)) - 1) > 0:
        parts.append(part)
        i += 1
    return (begin + ",".join(parts) + end).encode()


HI = '"messages":[{"role":"user","content":"hi"}]'
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ANTHROPIC, EMBED, TOKENIZE, OLLAMA = "/v1/messages", "/v1/embeddings", "/tokenize", "/api/chat"


def bodies() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """(name, path, body) of every case."""
    rng = random.Random(7)
    for path in (CHAT, TEXT, RESPONSES, ANTHROPIC, EMBED, TOKENIZE, OLLAMA, "/api/generate", "/detokenize"):
        yield f"unknown keys {path}", path, lambda: filled("{" + HI + ",", lambda i: f'"k{i}":0', "}")
    yield "metadata", CHAT, lambda: filled("{" + HI + ',"metadata":{', lambda i: f'"k{i}":0', "}}")
    yield "metadata responses", RESPONSES, lambda: filled('{"input":"x","metadata":{', lambda i: f'"k{i}":0', "}}")
    yield "logit_bias", CHAT, lambda: filled("{" + HI + ',"logit_bias":{', lambda i: f'"x{i}":0', "}}")
    part = '{"type":"text"}'
    parts = '{"messages":[{"role":"user","content":['
    yield "parts", CHAT, lambda: filled(parts, lambda _: part, "]}]}")
    yield "parts anthropic", ANTHROPIC, lambda: filled('{"max_tokens":5,' + parts[1:], lambda _: part, "]}]}")
    annotated = '{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"x","annotations":['
    yield "annotations", CHAT, lambda: filled(annotated, lambda _: "[]", "]}]}")
    yield "messages", CHAT, lambda: filled('{"messages":[', lambda _: "{}", "]}")
    yield "responses input", RESPONSES, lambda: filled('{"input":[', lambda _: "{}", "]}")
    yield "tools", CHAT, lambda: filled("{" + HI + ',"tools":[', lambda _: "{}", "]}")
    yield "stop", CHAT, lambda: filled("{" + HI + ',"stop":[', lambda _: "1", "]}")
    yield "prompt ids", TEXT, lambda: filled('{"prompt":[', lambda _: "1", "]}")
    yield "prompt strings", TEXT, lambda: filled('{"prompt":[', lambda _: '""', "]}")
    yield "embedding inputs", EMBED, lambda: filled('{"input":[', lambda _: '"a"', "]}")
    yield "empty lists", CHAT, lambda: filled("{" + HI + ',"x":[', lambda _: "[]", "]}")
    yield "depth", CHAT, lambda: b'{"messages":' + b"[" * (BODY_BYTES // 2) + b"]" * (BODY_BYTES // 2) + b"}"
    schema = ',"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"properties":{'
    yield "schema", CHAT, lambda: filled("{" + HI + schema, lambda i: f'"k{i}":{{}}', "}}}}}")
    words = ["the", "a", "river", "stone", "walks", "into", "quiet", "house", "of", "time"]
    text = " ".join(rng.choice(words) for _ in range(BODY_BYTES // 5))[: BODY_BYTES - 200]
    yield "text", CHAT, lambda: said(text)
    yield "text completions", TEXT, lambda: json.dumps({"prompt": text}).encode()
    yield "text tokenize", TOKENIZE, lambda: json.dumps({"prompt": text}).encode()
    yield "text embeddings", EMBED, lambda: json.dumps({"input": text}).encode()
    yield "one word", CHAT, lambda: said("a" * (BODY_BYTES - 200))
    yield "control tokens", CHAT, lambda: said(("<|im_end|>x" * (BODY_BYTES // 11))[: BODY_BYTES - 200])
    yield (
        "emoji",
        CHAT,
        lambda: json.dumps(
            {"messages": [{"role": "user", "content": "🙂" * (BODY_BYTES // 4 - 100)}]}, ensure_ascii=False
        ).encode(),
    )
    yield (
        "escapes",
        CHAT,
        lambda: b'{"messages":[{"role":"user","content":"' + b"\\u0041" * (BODY_BYTES // 6 - 60) + b'"}]}',
    )


def said(text: str) -> bytes:
    """A chat with one message."""
    return json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 4}).encode()


# --- measuring, in a process of its own


def watch(port: int, end: Event, results: Any) -> None:
    """Asks /health until `end`; puts (when, seconds) of every question."""
    gaps: Gaps = []
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while not end.is_set():
        began = time.monotonic()
        gaps.append((began, health_s(link)))
        time.sleep(max(0.0, began + ASK_EVERY_S - time.monotonic()))
    results.put(gaps)


def health_s(link: http.client.HTTPConnection) -> float:
    """Seconds until /health said 200; infinity when it did not, so that a refusal is no quick answer."""
    began = time.monotonic()
    try:
        link.request("GET", "/health")
        reply = link.getresponse()
        reply.read()
    except (OSError, http.client.HTTPException):
        link.close()  # the next question makes a new connection
        return math.inf
    return time.monotonic() - began if reply.status == 200 else math.inf


@contextmanager
def watched(port: int) -> Iterator[list[float]]:
    """Seconds that /health took meanwhile; filled at the end."""
    context = multiprocessing.get_context("spawn")
    end, results = context.Event(), context.Queue()
    times: list[float] = []
    process = context.Process(target=watch, args=(port, end, results), daemon=True)
    process.start()
    time.sleep(0.5)
    began = time.monotonic()
    try:
        yield times
    finally:
        end.set()
        times += [took for when, took in results.get() if when + took >= began]
        process.join()


def share(times: list[float], quantile: float) -> float:
    """The value that this share of all times does not pass."""
    return sorted(times)[min(len(times) - 1, int(len(times) * quantile))]


class Stream:
    """A streamed answer under way; `longest_s` between two of its pieces."""

    def __init__(self, port: int) -> None:
        self.longest_s, self._is_over = 0.0, False
        self._link = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        asked = {"messages": [{"role": "user", "content": "Tell."}], "max_tokens": 300, "ignore_eos": True}
        asked["skip_special_tokens"] = False  # a model that has nothing to say says them, one a token
        with contextlib.suppress(OSError, AttributeError, http.client.HTTPException):  # `stop` closes the connection
            self._read_on(asked)

    def _read_on(self, asked: dict[str, Any]) -> None:
        while not self._is_over:
            self._link.request("POST", CHAT, json.dumps({**asked, "stream": True}), JSON)
            reply, last = self._link.getresponse(), time.monotonic()
            while not self._is_over and reply.read1(4096):
                now = time.monotonic()
                self.longest_s, last = max(self.longest_s, now - last), now

    def stop(self) -> float:
        self._is_over = True
        self._link.close()
        self._thread.join(5)
        return self.longest_s


JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Outcome:
    """What became of one body, and of the others meanwhile."""

    status: int
    took_s: float
    num_failed: int  # of the questions for /health, which count as infinitely slow
    p50_ms: float
    p99_ms: float
    most_ms: float
    stream_ms: float


def attack(port: int, path: str, body: bytes, repeats: int) -> Outcome:
    """The same body several times, one after another."""
    stream = Stream(port)
    time.sleep(0.2)
    with watched(port) as times:
        stream.longest_s = 0.0
        began = time.monotonic()
        for _ in range(repeats):
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=180)
            try:
                link.request("POST", path, body, JSON)
                reply = link.getresponse()
                status = reply.status
                reply.read()
            except OSError:
                status = 0
            link.close()
        took_s = (time.monotonic() - began) / repeats
    ms = [seconds * 1000 for seconds in times]
    num_failed = sum(map(math.isinf, ms))
    return Outcome(status, took_s, num_failed, share(ms, 0.5), share(ms, 0.99), max(ms), stream.stop() * 1000)


@contextmanager
def served(model: str, flags: list[str], log: Path) -> Iterator[tuple[int, int]]:
    """A server of its own: its port and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "turboserve", "serve", *([model] if model else []), "--port", str(port), *flags]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            deadline = time.monotonic() + 120
            while not _is_ready(port):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_ready(port: int) -> bool:
    try:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        link.request("GET", "/ready")
        return link.getresponse().status == 200
    except OSError:
        return False


def resident_mib(pid: int) -> float:
    """Of a process, now; Linux only."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def idle(port: int, count: int, log: Path) -> None:
    """`count` connections that say nothing, and a new connection's /health beside them."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    links, times = [], []
    before = log.stat().st_size
    for i in range(count):
        link = socket.socket()
        link.setblocking(False)
        link.connect_ex(("127.0.0.1", port))
        links.append(link)
        if i % 50 == 0:
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            times.append(health_s(asked) * 1000)
            asked.close()
            if math.isinf(times[-1]):
                print(f"after {i} connections /health failed")
    grown = log.stat().st_size - before
    print(
        f"{count} idle connections: /health p50 {share(times, 0.5):.1f} ms, most {max(times):.1f} ms, log {grown} bytes"
    )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--idle", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="further flags of the server, behind --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with served(args.model, args.flags, log) as (port, pid):
            if args.idle:
                idle(port, args.idle, log)
                return
            print("| case | status | took s | health failed | p50 ms | p99 ms | most ms | stream gap ms | RSS MiB |")
            print("|---|---|---|---|---|---|---|---|---|")
            for name, path, body in bodies():
                if args.only in name:
                    o = attack(port, path, body(), args.repeats)
                    figures = f"{o.num_failed} | {o.p50_ms:.1f} | {o.p99_ms:.0f} | {o.most_ms:.0f} | {o.stream_ms:.0f}"
                    print(f"| {name} | {o.status} | {o.took_s:.2f} | {figures} | {resident_mib(pid):.0f} |", flush=True)


if __name__ == "__main__":
    main()
