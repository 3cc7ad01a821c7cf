"""Modules that MLX keeps compiled in a folder, counted, and passed on between folders.

A process has a folder of its own: MLX writes a module's files piece by piece, and reads what it finds at once. What is
passed on appears whole. Between two evaluations all of a process's modules are whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from turboquant_kv.backends.gpu.nvrtc import write_whole


def modules_in(folder: Path) -> set[Path]:
    """Of the modules that are there, paths from the folder on."""
    return {path.relative_to(folder) for path in folder.rglob("*.ptx")}


class Publisher:
    """Passes on what is new in a folder. One thread only, and while nothing is evaluated."""

    def __init__(self, own: Path, others: Sequence[Path]) -> None:
        self._own, self._others = own, tuple(others)
        self._known = modules_in(own)

    def publish(self) -> int:
        """How many modules were new. Raises OSError for the first of the other folders only."""
        new = modules_in(self._own) - self._known
        for module in sorted(new):
            for number, folder in enumerate(self._others):
                try:
                    copy_module(self._own, module, folder)
                except OSError:
                    if not number:
                        raise  # of the others some process may be gone, and its folder too
        self._known |= new
        return len(new)


def copy_module(source: Path, module: Path, target: Path) -> None:
    """A module's files to another folder, unless it is there. Raises OSError."""
    if (target / module).exists():
        return
    (target / module).parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".cu", ".txt", ".ptx"):  # the last one is what MLX looks for
        path = (source / module).with_suffix(suffix)
        if path.exists():
            write_whole((target / module).with_suffix(suffix), path.read_bytes())
