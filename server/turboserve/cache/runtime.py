"""What the cache manager needs from `turboquant_kv`, as types.

Caches are opaque here: one list per sequence, one item per layer. A `CacheFamily` holds one runtime
per format of the same model. Tests pass small fakes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Caches = list[Any]


class CacheBytes(Protocol):
    """Where one sequence's bytes are; the fields add up to what is allocated for it."""

    @property
    def tokens(self) -> int: ...
    @property
    def compressed(self) -> int: ...
    @property
    def exact(self) -> int: ...
    @property
    def slack(self) -> int: ...
    @property
    def uncompressed(self) -> int: ...
    @property
    def raw_equivalent(self) -> int: ...


class HeldPages(NamedTuple):
    """Compressed pages of one sequence: ids are unique within a pool, and every layer has its own copy of each."""

    pool: Hashable  # tells formats apart: pages of different formats never are the same
    ids: NDArray[np.int64]
    references: NDArray[np.int64]  # how many sequences hold each page now
    page_bytes: int  # of one page in all layers


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

    def measure(self, caches: Caches) -> CacheBytes: ...

    def compressed_raw_bytes(self, num_tokens: int) -> int:
        """What that many tokens would take uncompressed, in the layers that are compressed."""
        ...

    def usable_prefix(self, caches: Caches, length: int) -> int: ...

    def fork(self, caches: Caches, length: int) -> Caches: ...

    def release(self, caches: Caches) -> None: ...


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

    def totals(self) -> CacheBytes:
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

    def export_caches(self, caches: Caches) -> tuple[Mapping[str, Any], list[NDArray[Any]]]:
        """Header and arrays from which `import_caches` makes them again, bit by bit."""
        ...

    def import_caches(self, name: str, header: Mapping[str, Any], arrays: list[NDArray[Any]]) -> Caches:
        """Raises ValueError when the parts contradict each other or this model."""
        ...

    def allocated_bytes(self) -> int: ...

    def slack_bytes(self) -> int:
        """The part of allocated_bytes that holds no tokens."""
        ...

    def slack_by_format(self) -> Mapping[str, int]:
        """The same, for each format that was ever used."""
        ...

    def trim(self, wanted_bytes: int) -> int:
        """Give at least that much slack back, if there is so much; returns the bytes."""
        ...

    def check_integrity(self) -> None: ...


def total_bytes(kv: CacheBytes) -> int:
    """All bytes of one sequence."""
    return kv.compressed + kv.exact + kv.slack + kv.uncompressed


def peak_bytes(runtime: CacheRuntime, num_tokens: int) -> int:
    """The most bytes a sequence holds on its way to `num_tokens`; never falls as that grows.

    A sequence is largest when its exact tail is a whole page, just before the page is compressed:
    `bytes_for` falls there, and a reservation must not.
    """
    fmt = runtime.fmt
    if fmt is None or num_tokens < fmt.sink_tokens:
        return runtime.bytes_for(num_tokens)
    last_full_tail = fmt.sink_tokens + (num_tokens - fmt.sink_tokens) // fmt.page_tokens * fmt.page_tokens
    return max(runtime.bytes_for(num_tokens), runtime.bytes_for(last_full_tail))


def pages_bytes(runtime: CacheRuntime, num_tokens: int) -> int:
    """Bytes of the compressed pages of a sequence of `num_tokens`, its last page counted as exact still."""
    fmt = runtime.fmt
    return 0 if fmt is None else int(fmt.num_pages(num_tokens) * fmt.page_tokens * runtime.token_bytes)


def usable_estimate(runtime: CacheRuntime, num_held: int, length: int, *, can_cut: bool) -> int:
    """The longest n <= length to which stored caches of `num_held` tokens can surely be cut, without reading them."""
    if length >= num_held:
        return num_held
    fmt = runtime.fmt
    if not can_cut:
        return 0
    if fmt is None or length <= fmt.sink_tokens:
        return length
    return int(fmt.page_start((length - fmt.sink_tokens) // fmt.page_tokens))
