"""What the cache memory needs of the library, of the disk and of whoever runs requests, as types.

Caches are opaque here: one list per sequence, one item per layer. A `CacheFamily` holds one runtime
per format of the same model. `cache/disk` has the real disk; tests pass small fakes of everything.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from turboquant_kv.kv_bytes import KVBytes
from turboserve.messages import DiskStatus

Caches = list[Any]
Key = tuple[str, str]
"""A session's salt (the server's view of a caller) and its id, which is unique under that."""
Meta = Mapping[str, Any]
Header = Mapping[str, Any]
Arrays = list[NDArray[Any]]


class HeldPages(NamedTuple):
    """Compressed pages of one sequence, in order; every layer of a pool has its own copy of each."""

    pool: Hashable  # tells formats apart: pages of different formats never are the same
    ids: NDArray[np.int64]  # (P,), unique within a pool
    references: NDArray[np.int64]  # (P,), how many sequences hold each page now
    page_bytes: int  # of one page in all layers
    first: int = 0  # number of the first one in its sequence: a sliding window has forgotten those before
    others: tuple[HeldPages, ...] = ()  # of other pools: layers with sliding windows have pages of their own

    def each(self) -> tuple[HeldPages, ...]:
        """Of every pool."""
        return (self, *self.others)


class CacheRuntime(Protocol):
    """Makes, measures, shares and frees sequences' caches in one format. Used by the engine thread only."""

    @property
    def fmt(self) -> Any | None:
        """KVFormat, or None when nothing is compressed."""
        ...

    @property
    def token_bytes(self) -> float: ...

    def make_cache(self) -> Caches: ...

    def bytes_for(self, num_tokens: int) -> int: ...

    def measure(self, caches: Caches) -> KVBytes: ...

    def compressed_raw_bytes(self, num_tokens: int) -> int:
        """What that many tokens would take uncompressed, in the layers that are compressed."""
        ...

    def usable_prefix(self, caches: Caches, length: int) -> int:
        """The longest n <= length of which `fork` can make caches without loss."""
        ...

    def fork(self, caches: Caches, length: int) -> Caches:
        """Caches of the first `length` tokens, sharing pages; `length` comes from `usable_prefix`."""
        ...

    def release(self, caches: Caches) -> None:
        """Give their memory back; a second time changes nothing."""
        ...


class ServedModel(NamedTuple):
    """Whose caches a memory holds, for whoever takes them elsewhere."""

    name: str = ""
    fingerprint: str = ""  # weights, tokenizer, dtype of activations
    adapters: frozenset[str] = frozenset()  # fingerprints of those that are loaded
    is_divided: bool = False  # among ranks: a cache here is a part of one


class CacheFamily(Protocol):
    """All formats of one model. Names are normalised: `4/3`, `f16`."""

    @property
    def default(self) -> str: ...

    def normalise(self, name: str) -> str:
        """Raises KVFormatError for a format that this model cannot have."""
        ...

    def runtime(self, name: str) -> CacheRuntime:
        """The same one every time. Raises KVFormatError."""
        ...

    def totals(self) -> KVBytes:
        """Of all compressed layers and sequences in all formats, what they share counted once."""
        ...

    def held_pages(self, caches: Caches) -> HeldPages | None:
        """None when nothing in these caches is paged."""
        ...

    def can_cut(self, name: str) -> bool:
        """Whether caches of this format can be cut back; recurrent state and rings exist at their end only."""
        ...

    def convert(self, caches: Caches, source: str, target: str) -> Caches:
        """New caches of the same tokens in another format; the old ones are untouched."""
        ...

    def fingerprints(self, name: str) -> Mapping[str, str]:
        """Of all that gives caches of a format their meaning, beside the model: `layout`, `calibration`."""
        ...

    def export_caches(self, caches: Caches) -> tuple[Header, Arrays]:
        """Header and arrays from which `import_caches` makes them again, bit by bit."""
        ...

    def import_caches(self, name: str, header: Header, arrays: Arrays) -> Caches:
        """Raises ValueError when the parts contradict each other or this model."""
        ...

    def allocated_bytes(self) -> int: ...

    def slack_bytes(self) -> int:
        """The part of allocated_bytes that holds no tokens."""
        ...

    def slack_by_format(self) -> Mapping[str, int]:
        """`slack_bytes` of each format that was ever used, by its name."""
        ...

    def trim(self, wanted_bytes: int) -> int:
        """Give at least that much slack back, if there is so much; returns the bytes."""
        ...

    def check_integrity(self) -> None:
        """Raises AssertionError when pools and sequences disagree."""
        ...


class RunningCaches(Protocol):
    """How the memory looks at a running request's caches, which belong to whoever runs it. Reading only."""

    def held_len(self) -> int:
        """Tokens whose keys and values are there now, and whose ids are known."""
        ...

    def written_len(self) -> int:
        """Tokens that take room now: those, and one that was fed before it was known."""
        ...

    def held_tokens(self) -> list[int]:
        """The ids of these tokens."""
        ...

    def usable_prefix(self, length: int) -> int:
        """The longest n <= length of which `fork` can make caches without loss."""
        ...

    def fork(self, length: int) -> Caches:
        """Caches of the first `length` tokens, sharing pages; the request goes on undisturbed."""
        ...

    def measure(self) -> KVBytes: ...


class StoredEntry(NamedTuple):
    """One file of the disk store. `meta` is what was given to `put`, JSON values only."""

    key: str
    meta: Meta
    num_bytes: int


class SessionDisk(Protocol):
    """Files by key. `put` only queues; nothing here ever raises for a disk's failure."""

    @property
    def is_shared(self) -> bool:
        """Whether other servers write into it as well; else the next five say nothing."""
        ...

    def key_for(self, salt: str, session_id: str) -> str | None:
        """The one key of a named session, by which every server finds it."""
        ...

    def refresh(self, key: str) -> StoredEntry | None:
        """What another server has written under this key since it was last looked at; None: nothing."""
        ...

    def changes(self) -> list[StoredEntry | str]:
        """What other servers have done since the last call: entries that are new, keys of those that are gone."""
        ...

    def claim(self, key: str) -> bool:
        """Whether a new session may be made under this key; False: another server is doing that, or writes there.

        Until what is put there was written no other server may. `settle` follows, whether or not something was put.
        """
        ...

    def settle(self, key: str) -> None:
        """The session was made and put, or it was not: then the claim ends now."""
        ...

    def put(self, key: str, meta: Meta, header: Header, arrays: Arrays) -> bool:
        """Write soon, in the background; False when that cannot be (full, read-only, too much queued).

        What was there under this key stays until the new entry is on the device, and for good when it never gets there.
        """
        ...

    def get(self, key: str) -> tuple[Meta, Header, Arrays] | None:
        """None when it is gone or damaged; what is still queued counts as written."""
        ...

    def delete(self, key: str) -> None: ...

    def entries(self) -> Iterable[StoredEntry]: ...

    def entry(self, key: str) -> StoredEntry | None:
        """What is on the device under this key, whatever is queued for it; None when there is nothing."""
        ...

    def entry_bytes(self, key: str) -> int | None:
        """Bytes of that file; None when it is gone (the store drops the least recently used by itself)."""
        ...

    def status(self) -> DiskStatus: ...

    def close(self) -> None:
        """Finish what is queued, give the folder's lock back."""
        ...


class OwnDisk:
    """What a SessionDisk says of others where no other server writes into it."""

    is_shared = False

    def key_for(self, salt: str, session_id: str) -> str | None:
        """As SessionDisk."""
        return None

    def refresh(self, key: str) -> StoredEntry | None:
        """As SessionDisk."""
        return None

    def changes(self) -> list[StoredEntry | str]:
        """As SessionDisk."""
        return []

    def claim(self, key: str) -> bool:
        """As SessionDisk."""
        return True

    def settle(self, key: str) -> None:
        """As SessionDisk."""
