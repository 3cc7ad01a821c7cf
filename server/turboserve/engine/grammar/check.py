"""Grammars tried in processes of their own, which are ended when they take too long and may crash."""

from __future__ import annotations

import json
import queue
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from turboserve.engine.grammar.vocabulary import Vocabulary

SCRIPT = Path(__file__).with_name("check_process.py")
START_TIMEOUT_S = 20.0  # of the process, which imports llguidance alone: only a machine in trouble needs it


Began = Callable[[], None]


def _nobody() -> None: ...


class TooMuchWorkError(Exception):
    """A grammar took too long, or ended the process that tried it."""


class CheckUnavailableError(Exception):
    """No process to try grammars in could be started."""


class Checker:
    """One process, started when it is first needed, and again when it had to be ended. Used by one thread at a time."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._setup = json.dumps(setup)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def trouble_with(self, grammar: str, timeout_s: float, began: Began = _nobody) -> str:
        """What is wrong with the grammar, or "". `began` is called when its time begins, once the process is there.

        Raises TooMuchWorkError, CheckUnavailableError.
        """
        process = self._ready()
        began()
        answer = _ask(process, json.dumps(grammar), time.monotonic() + timeout_s)
        if answer is None:
            self.close()
            self._start()  # for the next one, which need not wait for all of that
            raise TooMuchWorkError
        return str(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            # -P: the script's folder is no place to import from.
            process = subprocess.Popen(
                [sys.executable, "-P", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as exc:
            raise CheckUnavailableError(str(exc)) from exc
        self._process, self._is_ready = process, False
        return process

    def _ready(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is None or process.poll() is not None:
            self.close()
            process = self._start()
        if not self._is_ready:
            if _ask(process, self._setup, time.monotonic() + START_TIMEOUT_S) != b"ready\n":
                self.close()
                raise CheckUnavailableError("the process that tries grammars did not start")
            self._is_ready = True
        return process


class Checkers:
    """Several processes, so that a grammar that takes long does not hold up the next. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary, limits: Mapping[str, Any], count: int) -> None:
        setup = {
            "vocab_len": vocabulary.len,
            "control_tokens": vocabulary.control_tokens,
            "end_tokens": vocabulary.end_tokens,
            "limits": dict(limits),
        }
        self._free: queue.LifoQueue[Checker] = queue.LifoQueue()  # the latest again: others need not be started
        for _ in range(count):
            self._free.put(Checker(setup))
        self._is_closing = False

    def trouble_with(self, grammar: str, timeout_s: float, began: Began = _nobody) -> str:
        """As `Checker.trouble_with`, once a process is free."""
        checker = self._free.get()
        try:
            if self._is_closing:
                raise CheckUnavailableError("the server is shutting down")
            return checker.trouble_with(grammar, timeout_s, began)
        finally:
            if self._is_closing:
                checker.close()
            self._free.put(checker)

    def close(self) -> None:
        """End those that are free now, and the others when they become so."""
        self._is_closing = True
        idle = []
        with suppress(queue.Empty):
            while True:
                idle.append(self._free.get_nowait())
        for checker in idle:
            checker.close()
            self._free.put(checker)  # for who waits for one, to hear that it is over


def _ask(process: subprocess.Popen[bytes], line: str, deadline_s: float) -> bytes | None:
    """The process's answering line; None: it came too late, or the process has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
    except OSError:
        return None
    return _read_line(process.stdout, deadline_s)


def _read_line(pipe: IO[bytes], deadline_s: float) -> bytes | None:
    parts = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not parts.endswith(b"\n"):
            if not selector.select(max(0.0, deadline_s - time.monotonic())):
                return None
            part = pipe.read1(65536)  # type: ignore[attr-defined]  # of the BufferedReader that Popen makes
            if not part:
                return None
            parts += part
    return parts
