"""A conversation that moves between two real servers, by HTTP and by the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.server import Server, running_server

from turboserve.api.transfers import SESSION_TYPE
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
    file = httpx.get(f"{server.url}/v1/sessions/mover/export").content
    import_url = f"{other.url}/v1/sessions/import"
    assert httpx.post(import_url, content=file, headers=TYPE).status_code == 401
    key = {**TYPE, "Authorization": "Bearer secret"}
    torn = httpx.post(import_url, content=file[:-1], headers=key)
    assert torn.status_code == 400 and torn.json()["error"]["param"] == "file"
    taken = httpx.post(import_url, content=file, headers=key)
    assert taken.status_code == 200, taken.text
    assert turn(other, messages, "mover", "secret") == turn(server, messages, "mover")
    assert turn(other, messages, "mover", "secret")[1] > 500
    too_large = httpx.post(f"{import_url}?id=x", content=bytes(4 << 20), headers=key)
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


def _run(*args: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code == status
