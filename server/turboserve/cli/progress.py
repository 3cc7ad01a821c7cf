"""What is being done and how far it is: bars on a terminal's stderr, made by rich, gone once there is nothing to show.

Lines go to stdout, or wherever the command has its report from. Where stderr is no terminal there are lines alone.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Bars:
    """Implements engine.progress.ShowsSteps. Threads may share one."""

    def __init__(self, lines: TextIO | None = None) -> None:
        """`lines`: where lines go; None: stdout."""
        self._lines = lines
        self._lock = threading.RLock()
        self._shown: RichProgress | None = None
        self._num_steps = 0

    def __call__(self, line: str) -> None:
        """A line, above the bars where both are on one terminal. That nobody can read it any more ends nothing."""
        stream = self._lines or sys.stdout
        with self._lock, contextlib.suppress(OSError):
            if self._shown is not None and stream.isatty():
                self._shown.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                stream.write(line + "\n")
                stream.flush()

    @contextmanager
    def step(self, what: str, total_bytes: int | None = None) -> Iterator[Callable[[int], None]]:
        """A bar while the context lasts, told how many more bytes are done."""
        with self._bar(what, total_bytes) as (shown, task):

            def advance(num_bytes: int) -> None:
                if shown is not None:
                    shown.advance(task, num_bytes)

            yield advance

    @contextmanager
    def report(self, what: str) -> Iterator[Callable[[str], None]]:
        """What says where something is: beside `what` on a terminal, elsewhere a line each."""
        with self._bar(what, None) as (shown, task):

            def tell(text: str) -> None:
                if shown is None:
                    self(text)
                else:
                    shown.update(task, description=f"{what}: {text}")

            yield tell

    def log_stream(self) -> TextIO:
        """Stderr for whoever writes whole lines, which then stand above the bars."""
        return _LogStream(self)

    def log(self, text: str) -> None:
        """Text that ends with a line's end, to stderr."""
        with self._lock:
            if self._shown is not None:
                self._shown.console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
            else:
                sys.stderr.write(text)
                sys.stderr.flush()

    def close(self) -> None:
        """Show nothing more, and give the terminal its cursor back; for an end that no context sees."""
        with self._lock:
            if self._shown is not None:
                self._shown.stop()
                self._shown, self._num_steps = None, 0

    @contextmanager
    def download_bar(self) -> Iterator[type[Any]]:
        """A class like tqdm's for the hub library, which shows the bytes that arrive while the context lasts."""
        with self._bar("downloading", None) as (shown, task):
            if shown is not None:
                shown.update(task, is_bytes=True)
            yield _download_bar(shown, task)

    @contextmanager
    def _bar(self, what: str, total_bytes: int | None) -> Iterator[tuple[RichProgress | None, TaskID]]:
        shown, task = self._open(what, total_bytes)
        try:
            yield shown, task
        finally:
            self._close(task)

    def _open(self, what: str, total_bytes: int | None) -> tuple[RichProgress | None, TaskID]:
        if not sys.stderr.isatty():
            return None, _NO_TASK
        with self._lock:
            if self._shown is None:
                self._shown = _rich_progress()
                self._shown.start()
            self._num_steps += 1
            return self._shown, self._shown.add_task(what, total=total_bytes, is_bytes=total_bytes is not None)

    def _close(self, task: TaskID) -> None:
        with self._lock:
            if self._shown is None or task not in self._shown.task_ids:
                return
            self._shown.remove_task(task)
            self._num_steps -= 1
            if self._num_steps == 0:
                self._shown.stop()
                self._shown = None


class _LogStream(io.StringIO):
    """What a logging handler needs of a stream; keeps nothing."""

    def __init__(self, bars: Bars) -> None:
        super().__init__()
        self._bars = bars

    def write(self, text: str) -> int:
        self._bars.log(text)
        return len(text)


_NO_TASK: Any = 0


def _rich_progress() -> RichProgress:
    from rich.console import Console  # late: a tenth of a second that pipes need not pay
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    from turboserve.cli.figures import amount

    class Amount(TextColumn):
        """Bytes done of all, where they are counted."""

        def render(self, task: Any) -> Text:
            if not task.fields.get("is_bytes"):
                return Text("")
            total = "" if task.total is None else f" of {amount(task.total)}"
            speed = f", {amount(task.speed)}/s" if task.speed else ""
            return Text(f"{amount(task.completed)}{total}{speed}")

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), Amount(""))
    return Progress(
        *columns,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _download_bar(shown: RichProgress | None, task: TaskID) -> type[Any]:
    from huggingface_hub.utils.tqdm import tqdm  # the class that the hub library knows how to make

    class DownloadBar(tqdm):
        """Counts as tqdm does, and prints nothing. Of the library's bars the one of all files' bytes is shown."""

        def __init__(self, *args: Any, **options: Any) -> None:
            is_transfer = str(options.get("name")).endswith(".transfer")  # what comes over the wire, compressed
            self._counts = shown is not None and options.get("unit") == "B" and not is_transfer
            quiet = {"file": io.StringIO(), "disable": False, "mininterval": 0.2}
            super().__init__(*args, **{**options, **quiet})  # type: ignore[no-untyped-call]

        def display(self, *args: Any, **options: Any) -> bool:
            if self._counts and shown is not None and task in shown.task_ids:  # tqdm closes bars late
                shown.update(task, completed=self.n, total=self.total or None)
            return True

    return DownloadBar
