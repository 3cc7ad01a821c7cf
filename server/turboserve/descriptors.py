"""How many files and connections this process may hold open at once, which a library's import must not change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ENOUGH = 65_536  # more would only make tables larger
RESERVED = 256  # for the model's files, the store, processes and their pipes
PER_CONNECTION = 2  # of a router, which holds a second one, to the model's process
MOST_CONNECTIONS = 4096
FEWEST_CONNECTIONS = 16


@contextlib.contextmanager
def limits_kept() -> Iterator[None]:
    """Within, nobody changes this process's limits of open files.

    mlx_lm sets them to 2,048 and 4,096 when it is imported: lower than before on most machines, for good, and a
    traceback where the hard limit is lower still.
    """
    if resource is None:
        yield
        return
    original = resource.setrlimit

    def set_others(kind: int, limits: tuple[int, int]) -> None:
        if kind != resource.RLIMIT_NOFILE:
            original(kind, limits)

    patched: Any = resource
    patched.setrlimit = set_others
    try:
        yield
    finally:
        patched.setrlimit = original


def raise_limit() -> None:
    """As many open files as the system allows without asking for more rights."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def file_limit() -> int | None:
    """How many files this process may hold open now; None: any number, or the system does not tell."""
    if resource is None:
        return None
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def files_for(num_connections: int, *, is_router: bool) -> int:
    """Open files that so many connections need beside everything else."""
    return num_connections * (PER_CONNECTION if is_router else 1) + RESERVED


def connection_limit() -> int:
    """Connections that leave enough open files for everything else."""
    limit = file_limit()
    if limit is None:
        return MOST_CONNECTIONS
    return min(MOST_CONNECTIONS, max(FEWEST_CONNECTIONS, (limit - RESERVED) // PER_CONNECTION))
