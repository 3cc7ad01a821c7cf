"""How many sessions are being exported or imported at once: each takes memory that no budget counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from turboserve.errors import OverloadedError

SESSION_TYPE = "application/vnd.turboserve.session"
MAX_TRANSFERS = 4  # each holds a copy of one session's arrays outside the KV budget
MAX_TRANSFERS_OF_ONE = 2  # caller: one whose clients stand still leaves room for others
RETRY_AFTER_S = 5


class Transfers:
    """How many exports and imports are under way. Belongs to the event loop."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()  # by caller

    @contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """Raises OverloadedError when as many as may are under way, of this caller or of all."""
        if self._running[tenant] >= MAX_TRANSFERS_OF_ONE or self._running.total() >= MAX_TRANSFERS:
            raise OverloadedError(
                "As many sessions as may are being exported or imported "
                f"({MAX_TRANSFERS_OF_ONE} of one key, {MAX_TRANSFERS} of all).",
                retry_after_s=RETRY_AFTER_S,
            )
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]
