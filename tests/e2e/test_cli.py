"""`turboserve chat`, `ps`, `sessions` against a real server, as people and pipes use them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.e2e.server import Server

from turboserve.cli.conversations import Conversations
from turboserve.cli.figures import amount
from turboserve.cli.main import main

SECONDS = 60.0


@pytest.fixture(autouse=True)
def own_files(monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path) -> None:
    """The shared server, found as a user's settings say, and a cache folder of the test's own."""
    monkeypatch.setenv("TURBOSERVE_PORT", str(httpx.URL(server.url).port))
    monkeypatch.setenv("TURBOSERVE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")


def turboserve(*args: str, status: int = 0, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints on stdout."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    said = capsys.readouterr()
    assert (ended.value.code or 0) == status, said
    return said.out


def piped(text: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The command with `text` on its standard input, and pipes on both others."""
    return subprocess.run(
        [sys.executable, "-m", "turboserve", *args],
        input=text,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def unused_name(rng: np.random.Generator) -> str:
    return f"cli-{int(rng.integers(1 << 60)):x}"


def unnamed_sessions(server: Server) -> list[str]:
    """Sessions of chats whose users named none."""
    found = server.get("/v1/sessions?limit=100").json()["data"]
    return [one["id"] for one in found if one["id"].startswith("chat-")]


def test_the_last_lines_at_start_are_those_that_one_needs(server: Server) -> None:
    """Behind a blank line: the lines before them are many, and for operators."""
    deadline = time.monotonic() + SECONDS
    while not any("curl" in line for line in server.lines) and time.monotonic() < deadline:
        time.sleep(0.05)
    ready = server.lines.index(f"Ready: turboserve-tiny at {server.url}\n")
    stats = server.get("/v1/kv/stats").json()
    shown = [line for line in server.lines[ready:] if " INFO " not in line]  # the log comes down the same pipe
    assert server.lines[ready - 1] == "\n" and len(shown) < 8
    said = "".join(shown)
    for needed in (f"{server.url}/v1, ", f"{server.url}/ ", "4/3, ", amount(stats["kv_budget_bytes"]), "  curl http"):
        assert needed in said, said


def test_a_pipe_gets_the_answer_alone(server: Server) -> None:
    answer = piped("Who are you?\n", "chat", "--max-tokens", "9", "--temperature", "0")
    assert answer.returncode == 0, answer.stderr
    assert "\x1b" not in answer.stdout and answer.stdout.count("\n") == 1
    whole = server.client.chat.completions.create(
        model="turboserve-tiny",
        messages=[{"role": "user", "content": "Answer briefly.\n\nWho are you?"}],
        max_tokens=9,
        temperature=0,
    )
    joined = piped("Who are you?\n", "chat", "--max-tokens", "9", "--temperature", "0", "Answer briefly.")
    assert joined.stdout.rstrip("\n") == (whole.choices[0].message.content or "").rstrip("\n")
    assert "--max-tokens" in joined.stderr, "that it was cut is said, and not within the answer"
    notes = " ".join(f"{i} squared is {i * i}." for i in range(60))
    for _ in range(2):
        before = server.wait_until_idle()["prefix_tokens"]["hit"]
        assert piped(notes, "chat", "--max-tokens", "1", "Read this.").returncode == 0
    assert server.wait_until_idle()["prefix_tokens"]["hit"] > before + 200, (
        "what was read once is kept for the next time"
    )
    assert not unnamed_sessions(server)


def test_sessions_from_chat_to_deletion(
    server: Server, rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, fork = unused_name(rng), unused_name(rng)
    assert piped("My name is Paula.", "chat", "--session", name, "--format", "compact").returncode == 0
    assert piped("What is my name?", "chat", "--session", name).returncode == 0
    kept = Conversations(tmp_path).try_load(name)
    assert kept is not None and [m["role"] for m in kept.messages] == ["user", "assistant"] * 2
    shown = json.loads(turboserve("sessions", "show", name, "--json", capsys=capsys))
    assert (shown["kv_format"], shown["requests"], shown["pinned"]) == ("3t/2t", 2, False)
    turboserve("sessions", "pin", name, capsys=capsys)
    assert turboserve("sessions", "fork", name, fork, capsys=capsys) == f"{fork}\n"
    lines = turboserve("sessions", "list", capsys=capsys).splitlines()
    assert [line for line in lines if name in line and "pinned" in line and line.endswith("kept")]
    turboserve("sessions", "unpin", name, capsys=capsys)
    assert "pinned" not in turboserve("sessions", "show", name, capsys=capsys)

    file, other = tmp_path / "out.json", unused_name(rng)
    turboserve("sessions", "export", fork, str(file), "--texts", capsys=capsys)
    turboserve("sessions", "import", str(file), "--as", other, capsys=capsys)
    copy = Conversations(tmp_path).try_load(other)
    assert copy is not None and copy.messages == kept.messages
    turboserve("sessions", "import", str(file), status=2, capsys=capsys)  # of that name there is one
    turboserve("sessions", "rm", name, fork, other, capsys=capsys)
    turboserve("sessions", "rm", name, status=1, capsys=capsys)
    assert not Conversations(tmp_path).names()
    assert name not in turboserve("sessions", "list", "--all", capsys=capsys)


def test_ps_shows_what_the_server_holds(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ps", "--once"])
    shown = capsys.readouterr().out
    assert "turboserve-tiny" in shown and server.url in shown and "4/3" in shown and "…" not in shown
    with pytest.raises(SystemExit):
        main(["ps", "--json"])
    assert json.loads(capsys.readouterr().out)["kv_budget_bytes"] == server.stats()["kv_budget_bytes"]


class Terminal:
    """A command on a terminal of its own, and what it shows there."""

    def __init__(self, *args: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "turboserve", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TERM": "xterm"},
        )
        os.close(slave)
        self.shown = ""

    def type(self, line: str) -> None:
        os.write(self._master, line.encode() + b"\n")

    def wait_for(self, pattern: str, seconds: float = SECONDS) -> str:
        """What is shown up to `pattern`, which is then taken as read."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} is not shown: {self.shown!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # its other end is closed
                    raise AssertionError(f"{pattern!r} is not shown: {self.shown!r}") from None
        read, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return read

    def interrupt_until(self, pattern: str) -> None:
        """Ctrl-C, again after a while: one that comes just before readline waits is seen with the next key only."""
        for _ in range(10):
            self.process.send_signal(signal.SIGINT)
            try:
                self.wait_for(pattern, seconds=3)
                return
            except AssertionError:
                continue
        self.wait_for(pattern)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(SECONDS)
        os.close(self._master)


@contextmanager
def terminal(*args: str) -> Iterator[Terminal]:
    started = Terminal(*args)
    try:
        yield started
    finally:
        started.close()


def test_a_person_at_the_prompt(server: Server, rng: np.random.Generator, tmp_path: Path) -> None:
    name = unused_name(rng)
    with terminal("chat", "--max-tokens", "4000", "--system", "Tell long stories.") as chat:
        chat.wait_for(r"16,384 tokens; /help\s+.*> ")
        chat.type("/frok x")
        chat.wait_for(r"did you mean /fork\?")
        chat.type("Who are you?")
        chat.wait_for(r"Who are you\?\s+\w[^>]*> ")
        chat.type("/stats")
        assert "in memory" in chat.wait_for(r"time limit")
        chat.type(f"/fork {name}")
        chat.wait_for(f"now in {name}")
        chat.type("/format tiny")
        chat.wait_for("2t/2t")
        chat.type("/retry")
        chat.wait_for(r"/retry\s+\w[^>]*> ")
        chat.type("/sessions")
        chat.wait_for(rf"\* {name} [^>]*> ")
        chat.interrupt_until("ends the chat")  # at the prompt: the chat goes on
        chat.type("/exit")
        assert chat.process.wait(SECONDS) == 0
    kept = Conversations(tmp_path).try_load(name)
    assert kept is not None and kept.system == "Tell long stories." and kept.kv_format == "2t/2t"
    assert len(kept.messages) == 2
    assert server.get(f"/v1/sessions/{name}").json()["kv_format"] == "2t/2t"
    assert not unnamed_sessions(server), "it went with the chat"


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: Server) -> None:
    with terminal("chat", "--max-tokens", "12000", "--temperature", "2") as chat:
        chat.wait_for(r"/help\s+.*> ")
        chat.type("Count as far as you can, one number a line.")
        deadline = time.monotonic() + SECONDS
        while server.stats()["requests"]["running"] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        chat.process.send_signal(signal.SIGINT)
        chat.wait_for(r"\(stopped|> $")
        chat.type("/help")
        chat.wait_for("/exit ")
        server.wait_until_idle()
        chat.type("/exit")
        assert chat.process.wait(SECONDS) == 0


def test_ps_follows_the_server_until_ctrl_c(server: Server) -> None:
    with terminal("ps") as ps:
        for _ in range(2):
            ps.wait_for("turboserve-tiny +4/3")
        ps.process.send_signal(signal.SIGINT)
        assert ps.process.wait(SECONDS) == 0
        assert "Traceback" not in ps.shown
