"""How many sessions are being exported or imported at once: each takes memory that no budget counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from turboserve.errors import OverloadedError

SESSION_TYPE = "application/vnd.turboserve.session"
MAX_TRANSFERS = 2  # each holds a copy of one session's arrays outside the KV budget
RETRY_AFTER_S = 5


class Transfers:
    """How many exports and imports are under way. Belongs to the event loop."""

    def __init__(self) -> None:
        self._num_running = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises OverloadedError when as many as may are under way."""
        if self._num_running >= MAX_TRANSFERS:
            raise OverloadedError(
                f"{MAX_TRANSFERS} sessions are being exported or imported: try again when one of them is through.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
