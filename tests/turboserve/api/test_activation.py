"""A port that systemd holds: the server takes exactly the socket that is meant for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from turboserve.api.activation import inherited_listener
from turboserve.errors import StartupError
from turboserve.settings import Settings

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def announced(count: int = 1, pid: int | None = None) -> dict[str, str]:
    return {"LISTEN_PID": str(pid or os.getpid()), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": "http", "OTHER": "x"}


def test_the_socket_is_taken_once_and_no_child_believes_it_is_its_own(listener: socket.socket) -> None:
    environ, fd = announced(), os.dup(listener.fileno())
    os.set_inheritable(fd, True)
    taken = inherited_listener(environ, first_fd=fd)
    assert taken is not None and taken.getsockname() == listener.getsockname()
    assert not taken.get_inheritable() and environ == {"OTHER": "x"}
    assert inherited_listener(environ, first_fd=fd) is None
    taken.close()


def test_what_is_meant_for_another_process_is_left_alone(listener: socket.socket) -> None:
    environ = announced(pid=os.getppid())
    assert inherited_listener(environ, first_fd=listener.fileno()) is None
    assert "LISTEN_FDS" not in environ
    assert inherited_listener({}, first_fd=listener.fileno()) is None


def test_what_cannot_be_served_is_refused_in_one_line(listener: socket.socket) -> None:
    with pytest.raises(StartupError, match="2 sockets"):
        inherited_listener(announced(2), first_fd=listener.fileno())
    with socket.socket() as unbound, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for sock in (unbound, udp):
            with pytest.raises(StartupError, match="ListenStream"):
                inherited_listener(announced(), first_fd=os.dup(sock.fileno()))


# Puts its own id into LISTEN_PID, as systemd does for the process that it starts, and then becomes that process.
SERVE = """
import os, sys
from tests.turboserve.api.scripted import ScriptedEngine
from turboserve.api.app import create_app
from turboserve.api.http_server import run
from turboserve.settings import Settings
from turboserve.telemetry import Telemetry
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
settings = Settings(host=sys.argv[2], port=1, api_key="k", shutdown_grace_s=0)
engine = ScriptedEngine()
try:
    run(create_app(engine, settings, Telemetry()), engine, settings)
finally:
    engine.close()
"""


def serve(listener: socket.socket, host: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, str(listener.fileno()), host],
        pass_fds=[listener.fileno()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/kernels:{ROOT}/server:{ROOT}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_server_answers_on_the_socket_that_was_there_before_it(listener: socket.socket) -> None:
    """The request is sent before anybody accepts, and waits; `port`, which nobody may bind here, is not looked at."""
    process = serve(listener, Settings().host)
    try:
        assert httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}/health", timeout=30).status_code == 200
    finally:
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log


def test_a_socket_that_reaches_further_than_the_settings_know_is_refused(listener: socket.socket) -> None:
    process = serve(listener, "0.0.0.0")
    _, complaint = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "systemd's socket listens on 127.0.0.1, and host is 0.0.0.0" in complaint
