"""How far start-up is: lines for whoever reads a log, and for a terminal steps that take a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

Progress = Callable[[str], None]
"""Told what start-up is doing, one line at a time."""

Advance = Callable[[int], None]
"""Told how much more of a step is done."""


@runtime_checkable
class ShowsSteps(Protocol):
    """A Progress that also shows what is being done now, and how much of it is done."""

    def step(self, what: str, total_bytes: int | None = None) -> AbstractContextManager[Advance]:
        """Shown as long as the context lasts. total_bytes: None where nobody knows how much there is to do."""
        ...

    def download_bar(self) -> AbstractContextManager[type[Any]]:
        """A class like tqdm's that shows downloads as long as the context lasts."""
        ...


def step(progress: Progress, what: str, total_bytes: int | None = None) -> AbstractContextManager[Advance]:
    """A step, where `progress` can show it."""
    if isinstance(progress, ShowsSteps):
        return progress.step(what, total_bytes)
    return nullcontext(lambda num_bytes: None)


def download_bar(progress: Progress | None) -> AbstractContextManager[type[Any] | None]:
    """What shows a download, where `progress` can; None: the hub library's own bars."""
    return progress.download_bar() if isinstance(progress, ShowsSteps) else nullcontext()
