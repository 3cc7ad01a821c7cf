"""Shutting down: refuse, wait, then end with a word of explanation; a second signal does not wait."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.turboserve.api.conftest import connect_client, error_of, raw_request, read_all, running
from tests.turboserve.api.scripted import MODEL_ID, WAIT_S, ScriptedEngine

from turboserve.api.app import create_app
from turboserve.api.http_server import bind, run
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

ROOT = Path(__file__).resolve().parents[3]
SERVER = """
import sys
from tests.turboserve.api.scripted import ScriptedEngine
from turboserve.api.app import create_app
from turboserve.api.http_server import run
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry

settings = Settings(port=0, shutdown_grace_s=float(sys.argv[1]))
engine = ScriptedEngine()
run(create_app(engine, settings, Telemetry()), engine, settings, on_started=lambda url: print(url, flush=True))
engine.close()
print("closed", flush=True)
"""


def ask_raw(script: str, *, stream: bool) -> bytes:
    body = {"messages": [{"role": "user", "content": script}], "stream": stream}
    return raw_request(json.dumps(body).encode())


def test_draining_refuses_new_work_and_finishes_the_old() -> None:
    with running(shutdown_grace_s=20.0) as service, service.connect() as stream, connect_client(service) as client:
        stream.sendall(ask_raw("burst", stream=True))
        service.engine.wait_live()
        service.signal()
        assert error_of(client.get("/ready"))["message"] == "The server is shutting down. Try again in 10 seconds."
        refused = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_unavailable")
        assert client.get("/health").status_code == 200
        assert b"[DONE]" in read_all(stream)
        service.thread.join(timeout=WAIT_S)
        assert not service.thread.is_alive()


@pytest.mark.parametrize("script", ["chatter", "forever"])
@pytest.mark.parametrize("stream", [True, False])
def test_after_the_grace_period_answers_end_with_an_error(script: str, stream: bool) -> None:
    with running(shutdown_grace_s=0.2, keepalive_interval_s=0.05) as service, service.connect() as sock:
        sock.sendall(ask_raw(script, stream=stream))
        service.engine.wait_live()
        head = sock.recv(12) if stream else b""  # a silent stream starts with its first sign of life
        service.signal()
        reply = head + read_all(sock)
        service.engine.wait_idle()
    assert reply.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
    assert b'"code":"engine_unavailable"' in reply and b"grace period is over. Try again in 10 seconds." in reply
    assert b"[DONE]" not in reply


@contextmanager
def process(grace_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", SERVER, str(grace_s)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


def finish(child: subprocess.Popen[str]) -> str:
    """What it still printed; its exit must be clean."""
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    return out


def test_the_first_line_says_that_the_model_is_being_loaded(caplog: pytest.LogCaptureFixture) -> None:
    """It said "serving", minutes before a request could be answered."""
    caplog.set_level(logging.INFO)
    engine, settings = ScriptedEngine(), Settings(port=0)

    def stop(url: str) -> None:
        raise InterruptedError(url)

    try:
        with pytest.raises(InterruptedError) as caught, bind(settings) as sock:
            run(create_app(engine, settings, Telemetry()), engine, settings, sock=sock, on_started=stop)
    finally:
        engine.close()
    assert caplog.messages[-1] == f"listening at {caught.value}: /health answers, the model {MODEL_ID} is being loaded"


def test_sigterm_lets_the_caller_close_the_engine() -> None:
    with process(grace_s=5) as (child, url):
        assert httpx.get(f"{url}/ready", timeout=WAIT_S, verify=False).status_code == 200
        child.send_signal(signal.SIGTERM)
        assert finish(child) == "closed\n"


def test_a_second_signal_does_not_wait() -> None:
    with process(grace_s=60) as (child, url):
        body = {"messages": [{"role": "user", "content": "chatter"}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=WAIT_S, verify=False) as reply:
            lines = reply.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert child.poll() is None
            child.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert "engine_unavailable" in rest[-1]
        assert finish(child) == "closed\n"
