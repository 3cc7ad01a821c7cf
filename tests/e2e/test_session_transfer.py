"""A conversation that moves between two real servers, by HTTP and by the command line."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.server import Server, running_server

from turboserve.api.transfers import SESSION_TYPE
from turboserve.cli.client import ServerClient, ServerError
from turboserve.cli.main import main

TYPE = {"Content-Type": SESSION_TYPE}
FILLER = "The harbour near house 12 was painted in the year 1950. " * 30


@pytest.fixture(scope="module")
def other(cache_dir: Path) -> Iterator[Server]:
    with running_server(cache_dir, "--kv-format", "4/3", "--api-key", "secret", "--max-import-bytes", "3MiB") as server:
        yield server


def turn(server: Server, messages: list[dict[str, str]], session_id: str, key: str = "none") -> Any:
    body = {"model": "turboserve-tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
    headers = {"Authorization": f"Bearer {key}", "X-Session-Id": session_id}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120).json()
    return reply["choices"][0]["message"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_conversation_goes_on_at_another_server(server: Server, other: Server, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": FILLER + "My name is Paula."}]
    answer, _ = turn(server, messages, "mover")
    messages += [answer, {"role": "user", "content": "What is my name?"}]
    file = httpx.get(f"{server.url}/v1/sessions/mover/export", timeout=60).content
    import_url = f"{other.url}/v1/sessions/import"
    assert httpx.post(import_url, content=file, headers=TYPE, timeout=60).status_code == 401
    key = {**TYPE, "Authorization": "Bearer secret"}
    torn = httpx.post(import_url, content=file[:-1], headers=key, timeout=60)
    assert torn.status_code == 400 and torn.json()["error"]["param"] == "file"
    taken = httpx.post(import_url, content=file, headers=key, timeout=60)
    assert taken.status_code == 200, taken.text
    assert turn(other, messages, "mover", "secret") == turn(server, messages, "mover")
    assert turn(other, messages, "mover", "secret")[1] > 500
    too_large = httpx.post(f"{import_url}?id=x", content=bytes(4 << 20), headers=key, timeout=60)
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "request_too_large")


def test_the_command_line_moves_sessions(
    server: Server, other: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turn(server, [{"role": "user", "content": FILLER}], "clever")
    file = tmp_path / "clever.session"
    _run("sessions", "export", "clever", str(file), "--url", server.url)
    assert file.stat().st_mode & 0o777 == 0o600
    _run("sessions", "import", str(file), "--as", "moved", "--url", other.url, "--api-key", "secret")
    assert capsys.readouterr().out == "moved\n"
    _run("sessions", "import", str(file), "--as", "moved", "--url", other.url, "--api-key", "secret", status=1)
    assert "There is a session 'moved' already" in capsys.readouterr().err
    _run("sessions", "export", "nobody", str(tmp_path / "none"), "--url", server.url, status=1)
    assert not (tmp_path / "none").exists() and len(capsys.readouterr().err.splitlines()) == 1
    file.write_bytes(file.read_bytes()[:-9])
    _run("sessions", "import", str(file), "--as", "torn", "--url", other.url, "--api-key", "secret", status=1)
    assert "too early" in capsys.readouterr().err


def test_sessions_come_through_pipes(
    server: Server, other: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    turn(server, [{"role": "user", "content": FILLER}], "piped")
    file, fifo = tmp_path / "piped.session", tmp_path / "fifo"
    _run("sessions", "export", "piped", str(file), "--url", server.url)
    os.mkfifo(fifo)
    for name, sent, status in (("whole", file.read_bytes(), 0), ("torn", file.read_bytes()[:-9], 1)):
        writer = threading.Thread(target=fifo.write_bytes, args=(sent,), daemon=True)
        writer.start()
        _run("sessions", "import", str(fifo), "--as", name, "--url", other.url, "--api-key", "secret", status=status)
        writer.join(10)
        said = capfd.readouterr()
        assert (said.out == "whole\n") if not status else ("too early" in said.err and said.err.count("\n") == 1)


class Growing(io.BytesIO):
    """A file that another program writes to, or cuts, while it is read."""

    def __init__(self, content: bytes, change: int) -> None:
        super().__init__(content + bytes(max(change, 0)) if change > 0 else content[:change])


@pytest.mark.parametrize("change", [-1000, 1000])
def test_a_file_that_changes_while_it_is_sent_is_no_traceback(server: Server, other: Server, change: int) -> None:
    name = f"changing{change}"
    turn(server, [{"role": "user", "content": FILLER}], name)
    content = httpx.get(f"{server.url}/v1/sessions/{name}/export", timeout=60).content
    with ServerClient(other.url, "secret") as client:
        if change > 0:  # what was there when it was looked at is a session
            assert client.take_in(Growing(content, change), len(content), name)["id"] == name
        else:
            with pytest.raises(ServerError, match="became shorter"):
                client.take_in(Growing(content, change), len(content), name)


def _run(*args: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code == status
