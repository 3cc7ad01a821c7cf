"""One model's process: started, watched until it is ready, stopped. Knows its command only, not what it serves.

Its output goes to the caller line by line; the last line of a process that fails is the reason that clients get.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import httpx

from turboserve.fleet.footprint import resident_bytes
from turboserve.fleet.plan import ENV_PREFIX, ModelPlan, environment
from turboserve.logs import escape_controls

READY = re.compile(r"Ready: .+ at (http://\S+)")
COMPLAINT = "turboserve: "  # how the command begins the line that says why it ends
MAX_REASON_CHARS = 500
MAX_LINE_BYTES = 16 * 1024  # a longer one is passed on in pieces
KILL_AFTER_S = 20.0  # beyond the grace period: time to write conversations to the disk store

StreamName = Literal["stdout", "stderr"]
OnLine = Callable[[StreamName, str], None]


class Command(NamedTuple):
    """What to run, and in which environment."""

    argv: list[str]
    env: dict[str, str]


Launcher = Callable[[ModelPlan, str], Command]
"""The command for a model whose process is to accept this router key."""


def serve_command(plan: ModelPlan, router_key: str) -> Command:
    """`turboserve serve` for one model: its settings by environment, because command lines are public."""
    inherited = {key: value for key, value in os.environ.items() if not key.upper().startswith(ENV_PREFIX)}
    argv = [sys.executable, "-m", "turboserve", "serve", *([plan.settings.model] if plan.settings.model else [])]
    argv += ["--served-model-name", plan.name]  # for whoever reads the list of processes
    own = environment(plan.settings) | {"TURBOSERVE_ROUTER_KEY": router_key, "PYTHONUNBUFFERED": "1"}
    return Command(argv, inherited | own)


class StartFailure(Exception):
    """The process ended, or took too long, before it was ready; the message is its own reason."""


@dataclass(slots=True)
class _Tail:
    """The line that explains an end: the command's complaint, or the last one said on stderr."""

    complaint: str = ""
    last: str = ""

    def add(self, line: str) -> None:
        if line.startswith(COMPLAINT):
            self.complaint = line.removeprefix(COMPLAINT)
        if line.strip():
            self.last = line.strip()

    @property
    def reason(self) -> str:
        return (self.complaint or self.last)[:MAX_REASON_CHARS]


@dataclass(slots=True)
class ModelProcess:
    """Belongs to the event loop. `http` asks the process once `wait_ready` has returned."""

    router_key: str
    _process: asyncio.subprocess.Process
    _on_line: OnLine
    _tail: _Tail = field(default_factory=_Tail)
    _url: asyncio.Future[str] = field(init=False)
    _readers: list[asyncio.Task[None]] = field(init=False)
    http: httpx.AsyncClient = field(init=False)

    @classmethod
    async def start(cls, command: Command, router_key: str, on_line: OnLine) -> ModelProcess:
        """Starts the command in a session of its own: a signal from the terminal is the router's to handle.

        Raises StartFailure when there is no such program.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *command.argv,
                env=command.env,
                stdin=asyncio.subprocess.PIPE,  # its end tells the process that the router is gone
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as exc:
            raise StartFailure(f"cannot run {command.argv[0]}: {exc.strerror or exc}") from exc
        return cls(router_key, process, on_line)

    def __post_init__(self) -> None:
        assert self._process.stdout is not None and self._process.stderr is not None
        self._url = asyncio.get_running_loop().create_future()
        self._readers = [
            asyncio.create_task(self._read("stdout", self._process.stdout)),
            asyncio.create_task(self._read("stderr", self._process.stderr)),
        ]

    @property
    def pid(self) -> int:
        """Of the process, while it lives and after."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """It has not been seen to end."""
        return self._process.returncode is None

    @property
    def reason(self) -> str:
        """How it ended, in its own words where it had any."""
        code = self._process.returncode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return escape_controls(self._tail.reason) or f"its process ended with status {code}"

    async def wait_ready(self, timeout_s: float) -> None:
        """Until it answers requests. Raises StartFailure; the process may then still have to be stopped."""
        ended = asyncio.ensure_future(self.wait_ended())
        first: set[asyncio.Future[Any]] = {ended, self._url}
        try:
            await asyncio.wait(first, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not self.is_alive:
            raise StartFailure(self.reason)
        if not self._url.done():
            raise StartFailure(f"it was not ready within {timeout_s:g} s")
        # Idle connections are given up before the process closes them, which it does after 5 s.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        # No proxies: they would be asked for 127.0.0.1 too. An answer may be silent for long; its end is noticed.
        self.http = httpx.AsyncClient(
            base_url=self._url.result(),
            limits=limits,
            timeout=httpx.Timeout(None, connect=5.0),
            trust_env=False,
        )

    async def wait_exit(self) -> None:
        """Until the process has ended; its last words may still be on their way."""
        await self._process.wait()

    async def wait_ended(self) -> None:
        """Until the process has ended and all it said is read."""
        await self._process.wait()
        await asyncio.wait(self._readers, timeout=1.0)  # a grandchild may hold the pipes open

    async def stop(self, grace_s: float) -> None:
        """Asks it to drain and waits; after `grace_s` and the time to write its conversations, kills it."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s + KILL_AFTER_S):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
        await self.close()

    def kill(self) -> None:
        """Ends it at once."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Gives back what belongs to a process that has ended, or is being killed."""
        await self.wait_ended()
        for reader in self._readers:
            reader.cancel()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if hasattr(self, "http"):
            await self.http.aclose()

    async def resident_bytes(self) -> int:
        """Memory that it holds now, 0 where that cannot be told."""
        return await asyncio.to_thread(resident_bytes, self.pid)

    async def _read(self, name: StreamName, stream: asyncio.StreamReader) -> None:
        rest = b""
        while data := await stream.read(MAX_LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._take(name, line.decode(errors="replace"))
        if rest:
            self._take(name, rest.decode(errors="replace"))

    def _take(self, name: StreamName, line: str) -> None:
        if name == "stderr":
            self._tail.add(line)
        elif (match := READY.match(line)) and not self._url.done():
            self._url.set_result(match[1])
        self._on_line(name, line)
