"""One line on stderr that says how far a round is: rewritten in place on a terminal, now and then elsewhere."""

from __future__ import annotations

import asyncio
import sys
from typing import TextIO

from turboserve.bench_client.load import Round
from turboserve.bench_client.mix import Pace

TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 0.5, 10.0


class Progress:
    """Shows rounds while they run, as a context around each; `name` says which."""

    def __init__(self, pace: Pace, stream: TextIO | None = None) -> None:
        self._pace = pace
        self.stream = stream or sys.stderr
        self._is_terminal = self.stream.isatty()
        self._width = 0

    async def show(self, name: str, current: Round) -> None:
        """Until it is cancelled; then the last state stays, on a line of its own."""
        try:
            while True:
                await asyncio.sleep(TERMINAL_INTERVAL_S if self._is_terminal else LOG_INTERVAL_S)
                self._write(name, current, "\r" if self._is_terminal else "\n")
        finally:
            self._write(name, current, "\n")

    def _write(self, name: str, current: Round, end: str) -> None:
        text = self.line(name, current)
        self.stream.write(text.ljust(self._width) + end)
        self.stream.flush()
        self._width = len(text) if self._is_terminal else 0

    def line(self, name: str, current: Round) -> str:
        """What is known of a round now."""
        elapsed_s = current.clock()
        wanted = "" if self._pace.num_requests is None else f"/{self._pace.num_requests}"
        rate = current.num_chunks / elapsed_s if elapsed_s else 0.0
        failed = f", {current.num_failed} FAILED" if current.num_failed else ""
        return (
            f"{name}: {current.num_ended}{wanted} answered, {current.num_running} running{failed}, "
            f"{rate:.1f} pieces of text/s, {elapsed_s:.0f} s"
        )
