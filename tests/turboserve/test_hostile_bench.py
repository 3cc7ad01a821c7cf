"""What bench/hostile.py takes for an answer of /health."""

from __future__ import annotations

import http.client
import math
import runpy
import socket
import threading
from pathlib import Path

import pytest

health_s = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "hostile.py"))["health_s"]


@pytest.mark.parametrize(
    ("reply", "is_answer"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}", False),
        (b"", False),
        (b"nonsense", False),
    ],
)
def test_a_failure_is_no_quick_answer(reply: bytes, is_answer: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        link = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=10)
        assert math.isfinite(health_s(link)) == is_answer
        link.close()
        thread.join(10)
