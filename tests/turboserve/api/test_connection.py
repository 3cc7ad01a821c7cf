"""Connections that misbehave, over plain sockets: leaving, stalling, dawdling, talking nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import resource
import socket
import time

import httpx
import pytest
from starlette.types import Message
from tests.turboserve.api.conftest import Service, connect_client, raw_request, read_all, running
from tests.turboserve.api.scripted import WAIT_S
from tests.turboserve.api.skipping import SkippingLoop

from turboserve.api.connection_watch import CountingTransport, ReaderWatch
from turboserve.api.frontdoor import Visit
from turboserve.api.http_server import bind
from turboserve.settings import ModelEntry, Settings


def body_for(script: str, *, stream: bool) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": script}], "stream": stream}).encode()


@pytest.mark.parametrize("farewell", ["close", "reset", "half-close"])
@pytest.mark.parametrize("script", ["forever", "chatter"])
@pytest.mark.parametrize("stream", [True, False])
def test_leaving_cancels_at_once(service: Service, farewell: str, script: str, stream: bool) -> None:
    """In prefill and in decode, streaming or not, however the client goes."""
    sock = service.connect()
    sock.sendall(raw_request(body_for(script, stream=stream)))
    service.engine.wait_live()
    if stream and script == "chatter":
        assert sock.recv(12) == b"HTTP/1.1 200"
    if farewell == "half-close":
        sock.shutdown(socket.SHUT_WR)
    elif farewell == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    if farewell != "half-close":
        sock.close()
    service.wait_quiet()
    assert service.engine.cancelled[-1] == service.engine.received[-1].request_id
    sock.close()


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_pipelining_is_noticed(service: Service, stream: bool) -> None:
    request = raw_request(body_for("forever", stream=stream))
    with service.connect() as sock:
        sock.sendall(request)
        service.engine.wait_live()
        sock.sendall(request)  # arrives while the first is being answered
        time.sleep(0.1)
        first = service.engine.received[-1].request_id
    service.wait_quiet()
    assert first in service.engine.cancelled


def test_leaving_with_half_a_body(service: Service) -> None:
    received = len(service.engine.received)
    with service.connect() as sock:
        sock.sendall(raw_request(body_for("hi", stream=False))[:-5])
    service.wait_quiet()
    assert len(service.engine.received) == received


def test_a_stalled_reader_is_cancelled_and_its_socket_freed(service: Service) -> None:
    with service.connect(receive_buffer_bytes=4096) as sock:
        sock.sendall(raw_request(body_for("flood", stream=True)))
        service.engine.wait_live()
        service.wait_quiet()
        deadline = time.monotonic() + WAIT_S
        while service.served(sock):
            assert time.monotonic() < deadline, "the stalled connection was kept"
            time.sleep(0.01)
    assert 'turboserve_http_disconnects_total{kind="stalled"}' in service.telemetry.exposition().decode()


@pytest.mark.parametrize("script", ["chatter", "burst"])
def test_a_stalled_reader_of_little_is_noticed(script: str) -> None:
    """All of it fits into buffers, which never fill, and the reader's own is full."""
    with running(send_timeout_s=0.5) as service, service.connect(receive_buffer_bytes=1) as sock:
        sock.sendall(raw_request(body_for(script, stream=True)))
        service.engine.wait_live()
        deadline = time.monotonic() + WAIT_S
        while service.served(sock):
            assert time.monotonic() < deadline, "the stalled connection was kept"
            time.sleep(0.01)
        service.wait_quiet()
        assert 'http_disconnects_total{kind="stalled"} 1.0' in service.telemetry.exposition().decode()


@pytest.mark.parametrize("takes_all", [True, False])
def test_a_reader_has_to_take_all_that_is_there_in_its_time(takes_all: bool) -> None:
    """One who takes a little now and then is as stalled as one who takes nothing."""

    class SlowTransport(asyncio.Transport):
        num_pending = 0

        def write(self, data: bytes | bytearray | memoryview) -> None:
            self.num_pending += len(data)

        def get_write_buffer_size(self) -> int:
            return self.num_pending

        def is_closing(self) -> bool:
            return False

    async def stalls() -> bool:
        stalled, slow = asyncio.Event(), SlowTransport()
        counting = CountingTransport(slow, lambda: watch.wrote())
        watch = ReaderWatch(counting, 1.0, stalled.set)
        counting.write(b"x" * 1_000_000)
        for _ in range(80):
            slow.num_pending = 0 if takes_all else slow.num_pending - 1
            counting.write(b"x")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stalled.wait(), 0.02)
        watch.stop()
        return stalled.is_set()

    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        assert runner.run(stalls()) != takes_all


def test_a_reader_of_a_quiet_stream_is_not_taken_for_stalled() -> None:
    with running(send_timeout_s=0.1, keepalive_interval_s=5.0) as service, service.connect() as sock:
        sock.sendall(raw_request(body_for("slow start", stream=True), "Connection: close"))
        assert b"[DONE]" in read_all(sock)


def test_idle_connections_give_way_to_those_that_ask() -> None:
    """The longest idle one first; whoever is being answered stays."""
    with running(max_connections=20) as service, contextlib.ExitStack() as stack:
        streaming = stack.enter_context(service.connect())
        streaming.sendall(raw_request(body_for("chatter", stream=True)))
        service.engine.wait_live()
        half_sent = stack.enter_context(service.connect())
        half_sent.sendall(b"GET /health HTTP/1.1\r\n")
        for _ in range(100):
            stack.enter_context(service.connect())
        for _ in range(5):
            with connect_client(service) as client:
                assert client.get("/health").status_code == 200
        assert len(service.server.server_state.connections) <= 20
        assert service.served(streaming) is not None and service.served(half_sent) is None
        streaming.close()


def test_with_every_connection_busy_a_new_one_is_told_so() -> None:
    with running(max_connections=3) as service, contextlib.ExitStack() as stack:
        for _ in range(3):
            busy = stack.enter_context(service.connect())
            busy.sendall(raw_request(body_for("forever", stream=True)))
        service.engine.wait_live(3)
        with service.connect() as sock:
            reply = read_all(sock)
        assert reply.startswith(b"HTTP/1.1 503") and b"\r\nretry-after: 5\r\n" in reply.lower()


SHORTAGES = [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs.file-max"), (errno.ENOMEM, "memory")]


@pytest.mark.parametrize(("number", "cure"), SHORTAGES)
def test_a_lack_of_files_is_one_line_of_the_log_with_its_cure(
    caplog: pytest.LogCaptureFixture, number: int, cure: str
) -> None:
    with running() as service, service.connect() as sock:
        while (link := service.served(sock)) is None:
            time.sleep(0.001)
        loop: asyncio.AbstractEventLoop = link.loop
        trouble = {"message": "socket.accept() out of system resource", "exception": OSError(number, "full")}
        for _ in range(100):
            loop.call_soon_threadsafe(loop.call_exception_handler, trouble)
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 200")
    lines = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(lines) == 1 and lines[0].exc_info is None and "no new connections" in lines[0].getMessage()
    assert cure in lines[0].getMessage()


@pytest.mark.parametrize(("num_models", "most"), [(0, 744), (1, 372)])
def test_more_connections_than_open_files_allow_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_models: int, most: int
) -> None:
    """A router needs two files for each: the other one leads to the model's process."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1000, 1000))
    models = {f"m{i}": ModelEntry() for i in range(num_models)}
    for max_connections in (0, most, most + 1):
        assert not caplog.records
        bind(Settings(port=0, max_connections=max_connections, models=models)).close()
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"max_connections = {most + 1}" in warning and "ulimit -n" in warning


def test_a_reader_that_stalls_and_half_closes_is_gone_at_once() -> None:
    with running(send_timeout_s=60.0) as service, service.connect(receive_buffer_bytes=4096) as sock:
        sock.sendall(raw_request(body_for("flood", stream=True)))
        service.engine.wait_live()
        time.sleep(0.1)
        sock.shutdown(socket.SHUT_WR)
        service.wait_quiet()
        assert service.engine.cancelled == [service.engine.received[-1].request_id]


def test_a_slow_but_steady_reader_is_served(service: Service) -> None:
    with service.connect() as sock:
        sock.sendall(raw_request(body_for("burst", stream=True), "Connection: close"))
        received = b""
        while chunk := sock.recv(512):
            received += chunk
    # Longer than every deadline of this server, and yet complete.
    assert b"99 " in received and b"[DONE]" in received


@pytest.mark.parametrize("num_answers", [1, 2])
def test_tokens_are_written_past_the_layers_above(
    monkeypatch: pytest.MonkeyPatch, service: Service, num_answers: int
) -> None:
    """Begin and end pass them; what lies between does not, and is there in order."""
    passed = 0
    send = Visit.send

    async def counting(visit: Visit, message: Message) -> None:
        nonlocal passed
        passed += 1
        await send(visit, message)

    monkeypatch.setattr(Visit, "send", counting)
    body = {"messages": [{"role": "user", "content": "burst"}], "stream": True, "n": num_answers}
    texts = [""] * num_answers
    with httpx.stream(
        "POST", f"{service.url}/v1/chat/completions", json=body, trust_env=False, timeout=WAIT_S
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["".join(f"{i} " for i in range(100))] * num_answers
    assert passed <= 4 + 4 * num_answers


@pytest.mark.parametrize(
    "part",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localho",
        raw_request(b'{"messages"')[:-3] + b"",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=["headers", "body", "chunk"],
)
def test_dawdling_requests_get_408(service: Service, part: bytes) -> None:
    with service.connect() as sock:
        sock.sendall(part)
        reply = read_all(sock)
    assert reply.startswith(b"HTTP/1.1 408")
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_drop_by_drop_does_not_extend_the_deadline(service: Service) -> None:
    with service.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        start = time.monotonic()
        sock.settimeout(0.05)
        reply = b""
        while not reply:
            assert time.monotonic() - start < WAIT_S, "headers may dribble for ever"
            sock.sendall(b"a: b\r\n")
            try:
                reply = sock.recv(100)
            except TimeoutError:
                continue
    assert reply.startswith(b"HTTP/1.1 408")


def test_a_kept_connection_has_a_deadline_for_its_next_request_too(service: Service) -> None:
    with service.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while not sock.recv(4096).endswith(b"}"):
            continue
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 408")


def test_streams_of_http_1_0_come_without_chunks(service: Service) -> None:
    """As nginx asks where nobody has told it to use 1.1: the end of the connection is the end of the body."""
    with service.connect() as sock:
        sock.sendall(raw_request(body_for("burst", stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"transfer-encoding" not in head.lower()
    lines = [line for line in body.decode().split("\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "".join(f"{i} " for i in range(100))


@pytest.mark.parametrize("version", [b"2.0", b"1.2", b"0.9", b"3.0"])
def test_other_versions_of_http_are_refused(service: Service, version: bytes) -> None:
    with service.connect() as sock:
        sock.sendall(b"GET /health HTTP/" + version + b"\r\nHost: localhost\r\n\r\n")
        reply = read_all(sock)
    assert reply.startswith(b"HTTP/1.1 400") and json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"]


def test_silent_connections_are_closed(service: Service) -> None:
    with service.connect() as sock:
        assert read_all(sock) == b""


def test_keepalive_connections_get_a_new_deadline_each() -> None:
    with running(request_timeout_s=4.0) as service, service.connect() as sock:
        for _ in range(6):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            reply = b""
            while not reply.endswith(b"}"):
                reply += sock.recv(4096)
            assert reply.startswith(b"HTTP/1.1 200")
            time.sleep(0.7)  # all of them are longer than one deadline, and each leaves seconds for a busy machine


@pytest.mark.parametrize("num_bytes", [70_000, 200_000, 4_000_000])
def test_giant_headers_get_431(service: Service, num_bytes: int) -> None:
    with service.connect() as sock:
        with contextlib.suppress(ConnectionError):  # the server need not take it all
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * num_bytes + b"\r\n\r\n")
        reply = read_all(sock)
    assert reply.startswith(b"HTTP/1.1 431") and b"headers_too_large" in reply


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["tls", "words", "no-host", "negative-length", "both-framings", "two-lengths", "nul-path", "bad-chunk"],
)
def test_nonsense_gets_400_and_a_close(service: Service, nonsense: bytes) -> None:
    with service.connect() as sock:
        sock.sendall(nonsense)
        reply = read_all(sock)
    assert reply.startswith(b"HTTP/1.1 400")
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_answers_do_not_wait_for_acknowledgements(service: Service) -> None:
    with service.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        sock.recv(4096)
        link = service.served(sock)
        assert link is not None
        accepted = link.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_many_idle_connections_do_not_hinder(service: Service, client: httpx.Client) -> None:
    socks = [service.connect() for _ in range(200)]
    try:
        assert client.get("/health").status_code == 200
    finally:
        for sock in socks:
            sock.close()


def test_no_line_of_the_log_carries_prompt_or_path(
    service: Service, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="turboserve"):
        body = {"messages": [{"role": "user", "content": "battery staple"}]}
        client.post("/v1/chat/completions", json=body)
        client.get("/forged%0Aline")
        service.wait_quiet()
        deadline = time.monotonic() + WAIT_S
        while "GET unmatched" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.002)  # a line is written when its answer has left
    assert "POST /v1/chat/completions 200" in caplog.text and "GET unmatched 404" in caplog.text
    assert "staple" not in caplog.text and "forged" not in caplog.text


def test_probes_are_no_news(service: Service, client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """Who asks every second whether all is well must not fill the log; at debug they are there."""
    with caplog.at_level("DEBUG", logger="turboserve"):
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            client.get(path)
        service.wait_quiet()
        deadline = time.monotonic() + WAIT_S
        while "/v1/models" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.002)
    levels = {record.getMessage().split()[1]: record.levelname for record in caplog.records if "GET" in record.message}
    assert levels == {"/health": "DEBUG", "/ready": "DEBUG", "/metrics": "DEBUG", "/v1/models": "INFO"}
