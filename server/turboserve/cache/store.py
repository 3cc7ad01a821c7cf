"""What the cache manager needs of a disk store, as types. `cache/disk` has the real one; tests keep a dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

Meta = Mapping[str, Any]
Header = Mapping[str, Any]
Arrays = list[NDArray[Any]]


class StoredEntry(NamedTuple):
    """One file of the store. `meta` is what was given to `put`, JSON values only."""

    key: str
    meta: Meta
    num_bytes: int


class DiskStatus(NamedTuple):
    """`reason`: why it takes nothing more, "" while it works. `pending_bytes` lie in memory until they are written."""

    is_writable: bool
    reason: str
    num_bytes: int
    limit_bytes: int
    num_entries: int
    num_damaged: int = 0  # files found damaged, and dropped
    pending_bytes: int = 0


class SessionDisk(Protocol):
    """Files by key. `put` only queues; nothing here ever raises for a disk's failure."""

    def put(self, key: str, meta: Meta, header: Header, arrays: Arrays) -> bool:
        """Write soon, in the background; False when that cannot be (full, read-only, too much queued)."""
        ...

    def get(self, key: str) -> tuple[Meta, Header, Arrays] | None:
        """None when it is gone or damaged; what is still queued counts as written."""
        ...

    def delete(self, key: str) -> None: ...

    def entries(self) -> Iterable[StoredEntry]: ...

    def entry_bytes(self, key: str) -> int | None:
        """Bytes of that file; None when it is gone (the store drops the least recently used by itself)."""
        ...

    def status(self) -> DiskStatus: ...

    def close(self) -> None:
        """Finish what is queued, give the folder's lock back."""
        ...
