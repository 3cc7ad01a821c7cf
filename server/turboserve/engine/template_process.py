"""Chat templates rendered in a process of their own, which is ended when one takes too long or its caller has left.

Rendering holds Python's lock and cannot be stopped from outside; in another process it costs neither running streams
nor HTTP their turns.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from turboserve.errors import (
    EngineUnavailableError,
    InvalidRequestError,
    RequestCancelledError,
    TurboServeError,
)

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("template_script.py")
START_TIMEOUT_S = 60.0  # of the process, which imports transformers: two seconds, but for a machine in trouble
LOOK_S = 0.05  # how often a render looks whether its caller has left


class Patience:
    """How long the reading of one prompt may take, and whether anybody still waits for it."""

    def __init__(self, timeout_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """`is_over`: whether nobody waits any more; what it raises, `check` raises."""
        self._timeout_s, self._is_over = timeout_s, is_over
        self.restart()

    def restart(self) -> None:
        """What took time until now was none of the prompt's doing."""
        self._deadline_s = time.monotonic() + self._timeout_s

    def for_start(self) -> Patience:
        """For the same caller, who waits for the process that renders to be there."""
        return _StartPatience(START_TIMEOUT_S, self._is_over)

    @property
    def left_s(self) -> float:
        """Seconds until the time is over."""
        return self._deadline_s - time.monotonic()

    def check(self) -> None:
        """Raises InvalidRequestError when the time is over, RequestCancelledError when nobody waits."""
        if self._is_over():
            raise RequestCancelledError("The request was cancelled.")
        if self.left_s <= 0:
            raise self._lateness()

    def _lateness(self) -> TurboServeError:
        return InvalidRequestError(
            f"Making a prompt of these messages takes over {self._timeout_s:g} s: the model's chat template or "
            "the text is too much work.",
            param="messages",
        )


class _StartPatience(Patience):
    def _lateness(self) -> TurboServeError:
        return EngineUnavailableError(f"The process that renders templates did not start in {self._timeout_s:g} s.")


class TemplateError(Exception):
    """What the template said, or how its process ended."""


class TemplateProcess:
    """One process, started by `start`, and again when it had to be ended. It renders one text at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._is_closed = False
        self._lock = threading.Lock()  # of the fields
        self._pipes = threading.Lock()  # whoever talks with the process

    def start(self) -> None:
        """Begin to start the process; returns at once. Raises OSError when the system does not."""
        with self._lock:
            if self._is_closed or (self._process is not None and self._process.poll() is None):
                return
            env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
            # -P: the script's folder is no place to import from.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=env,
            )
            self._is_ready = False

    def close(self) -> None:
        """Any thread: end the process, and start no other."""
        self._is_closed = True
        with self._lock:
            process = self._process
        if process is not None:
            process.kill()  # so that whoever waits for its answer stops
        with self._pipes:
            self._end()

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
        max_chars: int,
        patience: Patience,
    ) -> str | None:
        """The text, None when it has more than `max_chars` characters. Its time begins when the process is there.

        Raises TemplateError, what `Patience.check` raises, and EngineUnavailableError where there is no process: it
        does not start, or `close` has ended it.
        """
        asked = {
            "template": template,
            "messages": messages,
            "tools": tools,
            "kwargs": kwargs,
            "add_generation_prompt": add_generation_prompt,
            "max_chars": max_chars,
        }
        line = json.dumps(asked).encode() + b"\n"
        with self._pipes:
            self._wait_until_ready(patience)
            answer = json.loads(self._ask(line, patience))
        if "error" in answer:
            raise TemplateError(answer["error"])
        text: str | None = answer.get("text")
        return text

    def _wait_until_ready(self, patience: Patience) -> None:
        try:
            self.start()
        except OSError as exc:
            raise _unavailable(f"cannot be started ({exc.strerror or exc})") from exc
        process = self._process
        if process is None:
            raise _closing()
        if self._is_ready:
            return
        try:
            line = self._read_line(process, patience.for_start())
        except EngineUnavailableError as exc:
            log.warning("no chat template is rendered: %s", exc.message)
            self._end()  # the next render starts another one
            raise
        if line != b"ready\n":
            how = _end_of(process)
            self._end()
            raise _closing() if self._is_closed else _unavailable(f"ended while it started ({how})")
        self._is_ready = True
        patience.restart()

    def _ask(self, line: bytes, patience: Patience) -> bytes:
        process = self._process
        if process is None or process.stdin is None:
            raise _closing()
        patience.check()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = self._read_line(process, patience)
        except TurboServeError:
            self._restart()
            raise
        except OSError:  # nobody reads: it has ended
            answer = b""
        if not answer.endswith(b"\n"):
            how = _end_of(process)
            self._restart()
            if self._is_closed:
                raise _closing()
            raise TemplateError(f"its process ended ({how}), as one does that takes too much memory")
        return answer

    def _read_line(self, process: subprocess.Popen[bytes], patience: Patience) -> bytes:
        """A line; without its end when the process has ended."""
        parts, pipe = [b""], process.stdout
        assert pipe is not None
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not parts[-1].endswith(b"\n"):
                patience.check()
                if selector.select(max(0.0, min(LOOK_S, patience.left_s))):
                    part = os.read(pipe.fileno(), 1 << 20)
                    if not part:
                        break
                    parts.append(part)
        return b"".join(parts)

    def _restart(self) -> None:
        self._end()
        with suppress(OSError):  # the next render says so
            self.start()

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()


def _closing() -> EngineUnavailableError:
    return EngineUnavailableError("The server is shutting down.")


def _unavailable(how: str) -> EngineUnavailableError:
    error = EngineUnavailableError(f"The process that renders templates {how}.")
    log.warning("no chat template is rendered: %s", error.message)
    return error


def _end_of(process: subprocess.Popen[bytes]) -> str:
    """How a process that has closed its end of the pipe ended: by which signal, or with which status."""
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "it fell silent"
    if code >= 0:
        return f"status {code}"
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"


def template_of(tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
    """The Jinja template that transformers would take; None where something else renders, such as code of mlx-lm's."""
    from transformers import PreTrainedTokenizerBase

    inner = getattr(tokenizer, "_tokenizer", None)
    is_usual = (
        isinstance(inner, PreTrainedTokenizerBase)
        and type(inner).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        and getattr(tokenizer, "_chat_template", None) is None
    )
    if not is_usual:
        return None
    assert inner is not None
    template: str = inner.get_chat_template(None, list(tools) if tools else None)
    return template


def variables_of(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx-lm and transformers give a template beside the messages."""
    kwargs = dict(template_kwargs)
    name = getattr(tokenizer, "_thinking_kwarg", "enable_thinking")
    if name != "enable_thinking" and "enable_thinking" in kwargs:
        kwargs[name] = kwargs.pop("enable_thinking")
    kwargs.setdefault(name, tokenizer.has_thinking)
    return {**tokenizer.special_tokens_map, **kwargs}
