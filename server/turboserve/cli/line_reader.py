"""Lines from a person at a terminal: editing, history and completion by Python's readline where it is there.

Three quotes begin a text of several lines, three more end it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

MOST_LINES = 1000  # of history
QUOTES = '"""'


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Pythons built without it read bare lines
        return None
    return readline


@contextlib.contextmanager
def line_editing(history_file: Path, words: Sequence[str]) -> Iterator[None]:
    """Arrow keys, history across chats, and completion of `words` by the tabulator key, while a chat lasts."""
    readline = _readline()
    if readline is None:
        yield
        return
    with contextlib.suppress(OSError):  # none yet
        readline.read_history_file(history_file)
    readline.set_history_length(MOST_LINES)
    readline.set_completer(lambda text, state: next(iter([w for w in words if w.startswith(text)][state:]), None))
    readline.set_completer_delims(" ")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk costs the history alone
            history_file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(history_file, os.O_CREAT | os.O_WRONLY, 0o600))  # what was asked is nobody else's business
            readline.write_history_file(history_file)


def read_text(prompt: str) -> str:
    """A line, or lines between three quotes. Raises EOFError and KeyboardInterrupt."""
    line = input(prompt)
    if not line.lstrip().startswith(QUOTES):
        return line.strip()
    lines = [line.lstrip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(input("... "))
    return "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix(QUOTES)]).strip()
