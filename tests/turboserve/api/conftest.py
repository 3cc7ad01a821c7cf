"""A scripted engine behind a real server on a free port, and a check after each test that all is well again."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
from tests.turboserve.api.contract import Contract
from tests.turboserve.api.scripted import WAIT_S, ScriptedEngine

from turboserve.api.app import create_app
from turboserve.api.connection import Connection
from turboserve.api.drain import Drain
from turboserve.api.http_server import DrainingServer, address_url, bind, make_server
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

# Deadlines short enough to wait for in a test.
QUICK: dict[str, object] = {
    "port": 0,
    "max_body_bytes": 64 * 1024,
    "request_timeout_s": 3.0,
    "send_timeout_s": 0.4,
    "keepalive_interval_s": 0.2,
    "shutdown_grace_s": 0.3,
}


@dataclass(frozen=True)
class Service:
    """A running server and its parts."""

    url: str
    engine: ScriptedEngine
    settings: Settings
    telemetry: Telemetry
    server: DrainingServer
    drain: Drain
    contract: Contract
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def connect(self, *, receive_buffer_bytes: int | None = None) -> socket.socket:
        sock = socket.socket(socket.AF_INET)
        if receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        sock.settimeout(WAIT_S)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def served(self, sock: socket.socket) -> Connection | None:
        """The server's end of a client's socket, while it is open."""
        links = [link for link in self.server.server_state.connections if isinstance(link, Connection)]
        return next((link for link in links if link.client == sock.getsockname()), None)

    def wait_quiet(self, timeout_s: float = WAIT_S) -> None:
        """Until neither the engine nor the HTTP layer holds a request; fails the test otherwise."""
        self.engine.wait_idle(timeout_s)
        deadline = time.monotonic() + timeout_s
        while self.drain.num_running:
            assert time.monotonic() < deadline, "an answer is still under way"
            time.sleep(0.002)

    def signal(self) -> None:
        """What the signal handler does on SIGTERM."""
        self.server.handle_exit(signal.SIGTERM, None)


@contextmanager
def running(**changes: object) -> Iterator[Service]:
    """A server of its own, on another thread than the test's."""
    settings = Settings(**{**QUICK, **changes})  # type: ignore[arg-type]
    engine, telemetry = ScriptedEngine(), Telemetry()
    try:
        app = create_app(engine, settings, telemetry)
        server = make_server(app, settings)
        sock = bind(settings)
        url = address_url(sock)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), name="http")
        thread.start()
        contract = Contract(app.state.description.document)
        try:
            yield Service(url, engine, settings, telemetry, server, app.state.context.drain, contract, thread)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            server.handle_exit(signal.SIGTERM, None)
            thread.join(timeout=WAIT_S)
        assert not thread.is_alive(), "the server did not stop"
    finally:
        engine.close()


@pytest.fixture(scope="session")
def shared_service() -> Iterator[Service]:
    with running() as service:
        yield service


@pytest.fixture(scope="session")
def shared_client(shared_service: Service) -> Iterator[httpx.Client]:
    with connect_client(shared_service) as client:
        yield client


def connect_client(service: Service, **headers: str) -> httpx.Client:
    """A client whose every reply is held to what /openapi.json declares."""
    hooks = {"response": [service.contract.check]}
    # verify=False: loading certificates for a plain HTTP client takes longer than most of these tests.
    return httpx.Client(base_url=service.url, timeout=WAIT_S, verify=False, headers=headers, event_hooks=hooks)


@pytest.fixture
def service(shared_service: Service, shared_client: httpx.Client) -> Iterator[Service]:
    """The shared server. After the test it must still answer, and hold no request."""
    yield shared_service
    shared_service.wait_quiet()
    reply = shared_client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert reply.json()["choices"][0]["message"]["content"] == "Hello, world"


@pytest.fixture
def client(service: Service, shared_client: httpx.Client) -> httpx.Client:
    return shared_client


Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(client: httpx.Client) -> Ask:
    """Posts one user message, with further parameters by keyword."""

    def post(content: object = "hi", **parameters: object) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], **parameters}
        return client.post("/v1/chat/completions", json=body)

    return post


def error_of(reply: httpx.Response) -> dict[str, object]:
    """The error object, after checking the envelope's shape and headers."""
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["code"]
    assert reply.headers["content-type"] == "application/json"
    assert ("retry-after" in reply.headers) == (reply.status_code in (429, 503))
    if reply.status_code == 503:
        assert body["error"]["message"].endswith(advice_of(reply))
    error: dict[str, object] = body["error"]
    return error


def advice_of(reply: httpx.Response) -> str:
    """How a message ends that says when to come back: with the number in Retry-After."""
    seconds = int(reply.headers["retry-after"])
    return f". Try again in {seconds} second{'' if seconds == 1 else 's'}."


def raw_request(body: bytes, *headers: str) -> bytes:
    """A chat completion request as bytes for a plain socket."""
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_all(sock: socket.socket) -> bytes:
    """Everything until the server closes."""
    chunks = []
    while chunk := sock.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)
