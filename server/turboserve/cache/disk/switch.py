"""Whether the store writes, and if not, why and until when. Kept by store.py under its lock."""

from __future__ import annotations

import errno
from collections.abc import Callable

RETRY_S = 60.0  # after a failed write the disk gets this long before it is tried again

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the disk is full"}


class Switch:
    """On until something fails; then off, for a while or for good."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._retry_at = clock, 0.0
        self.reason = ""

    @property
    def is_on(self) -> bool:
        return not self.reason or self._clock() >= self._retry_at

    def fail(self, exc: OSError) -> None:
        """Off, to be tried again later."""
        self.reason = _FULL.get(exc.errno or 0, exc.strerror or str(exc))
        self._retry_at = self._clock() + RETRY_S

    def turn_off(self, reason: str) -> None:
        """Off as long as the store is open."""
        self.reason, self._retry_at = reason, float("inf")

    def worked(self) -> None:
        """A write succeeded."""
        self.reason = ""
