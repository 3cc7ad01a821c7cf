"""Native libraries: their C sources in a checkout, their compiled form in an installation. Loaded with ctypes."""

from __future__ import annotations

from pathlib import Path


def find_library(stem: str) -> Path | None:
    """The compiled library `lib<stem>`, or None when the installation built none.

    An editable installation keeps Python files in the checkout and compiled files in site-packages;
    this package's `__path__` then lists both.
    """
    for folder in __path__:
        for suffix in (".so", ".dylib"):
            candidate = Path(folder) / f"lib{stem}{suffix}"
            if candidate.is_file():
                return candidate
    return None
