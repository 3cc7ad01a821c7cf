"""An OpenAI-compatible server that misbehaves by script: one act for each streamed answer, in order, then good ones."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEMPLATE_TOKENS, TOKENS_PER_WORD = 7, 2
CROWD = 4
Act = Callable[["Handler"], None]


@dataclass
class Script:
    """What the server does, and what it saw. `has_usage`: it counts tokens; `refused`: fields it answers 400 to."""

    acts: list[Act] = field(default_factory=list)
    has_usage: bool = True
    models: str = '{"data": [{"id": "scripted"}]}'
    refused: frozenset[str] = frozenset()
    kv_bytes: list[int] = field(default_factory=list)  # what /v1/kv/stats shows in turn, 503 for -1, 404 when empty
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of streamed requests that were not refused
    num_running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """Streams end with the connection, as mlx_lm.server's do."""

    script: Script

    def log_message(self, *_: object) -> None:
        """Nothing: the output is pytest's."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(200, self.script.models)
        elif self.path == "/v1/kv/stats" and self.script.kv_bytes:
            kv_bytes = self.script.kv_bytes
            num_bytes = kv_bytes.pop(0) if len(kv_bytes) > 1 else kv_bytes[0]
            stats = {"kv_bytes": {"total": num_bytes}, "raw_equivalent_bytes": 4 * num_bytes, "kv_format": "4/3"}
            self.reply(503 if num_bytes < 0 else 200, {**stats, "tokens": num_bytes // 10})
        else:
            self.reply(404, {"error": {"message": "no such route"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if refused := self.script.refused & set(body):
            self.reply(400, {"error": {"message": f"unknown: {sorted(refused)}"}})
        elif not body.get("stream"):
            self.reply(200, {"choices": [], **self.usage(body, 1)})
        else:
            with self.script.lock:
                self.script.bodies.append(body)
                act = self.script.acts.pop(0) if self.script.acts else good
                self.script.num_running += 1
                self.script.most_running = max(self.script.most_running, self.script.num_running)
            self.body = body
            try:
                act(self)
            finally:
                with self.script.lock:
                    self.script.num_running -= 1

    def usage(self, body: dict[str, Any], num_tokens: int) -> dict[str, Any]:
        if not self.script.has_usage:
            return {}
        num_words = len(body["messages"][0]["content"].split())
        prompt_tokens = TEMPLATE_TOKENS + TOKENS_PER_WORD * num_words
        return {"usage": {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}}

    def reply(self, status: int, value: dict[str, Any] | str) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin(self, *headers: tuple[str, str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def send(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def text(self, *pieces: str) -> None:
        for piece in pieces:
            self.send(json.dumps({"choices": [{"index": 0, "delta": {"content": piece}}]}))


def good(handler: Handler) -> None:
    """A comment, a role, as many pieces as tokens were asked for, the reason, usage, the end."""
    handler.begin()
    handler.wfile.write(b": keepalive 1/2\n\n")
    handler.send(json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None}))
    for _ in range(handler.body["max_tokens"]):
        handler.text("word ")
        time.sleep(0.002)
    handler.send(json.dumps({"choices": [{"delta": {}, "finish_reason": "length"}]}))
    if "stream_options" in handler.body:
        handler.send(json.dumps({"choices": [], **handler.usage(handler.body, handler.body["max_tokens"])}))
    handler.send("[DONE]")


def crowded(handler: Handler) -> None:
    """A good answer that begins only once a crowd waits."""
    deadline = time.monotonic() + 20
    while handler.script.most_running < CROWD and time.monotonic() < deadline:
        time.sleep(0.005)
    good(handler)


def overloaded(handler: Handler) -> None:
    handler.reply(503, {"error": {"message": "queue is full"}})


def drops(handler: Handler) -> None:
    """The connection goes in the middle of a body whose length was promised."""
    handler.begin(("Content-Length", "100000"))
    handler.text("half ")
    handler.connection.shutdown(socket.SHUT_RDWR)


def stops(handler: Handler) -> None:
    """Two pieces and a proper end of the body, but no reason: what a crashed worker behind a proxy looks like."""
    handler.begin()
    handler.text("half ", "way ")


def errs(handler: Handler) -> None:
    handler.begin()
    handler.text("half ")
    handler.send(json.dumps({"error": {"message": "the engine failed"}}))
    handler.send("[DONE]")


def garbles(handler: Handler) -> None:
    handler.begin()
    handler.send('{"choices": [')
    handler.send("[DONE]")


def hangs(handler: Handler) -> None:
    handler.begin()
    handler.text("half ")
    handler.rfile.read(1)  # until the client has left


def empty(handler: Handler) -> None:
    """The model ends at once: no failure, but nothing to time."""
    handler.begin()
    handler.send(json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    handler.send("[DONE]")


@contextmanager
def scripted_server(script: Script) -> Iterator[Script]:
    """Serves until the context ends; every request has a thread of its own."""

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # joined at the end

        def handle_error(self, *_: object) -> None:
            """Clients that gave up are part of the script."""

    server = Server(("127.0.0.1", 0), type("Scripted", (Handler,), {"script": script}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
