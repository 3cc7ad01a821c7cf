"""What the runner needs of a runtime that holds caches: to finish their work, to batch them and to look at one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from turboquant_kv.cache.batch_probe import Batching
from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.interfaces import CacheRuntime


class EvaluatingRuntime(CacheRuntime, Protocol):
    """A runtime that can also finish pending work on caches, batch them and look at one row."""

    def evaluate(self, caches: list[Any]) -> None: ...

    def merge_rows(self, singles: list[list[Any]]) -> list[Any]:
        """A batch over sequences of whatever formats; their own caches stay as they are."""
        ...

    def extend_rows(self, batch: list[Any], other: list[Any]) -> list[Any]:
        """The rows of both; only the returned caches are valid afterwards."""
        ...

    def try_batches(self) -> Batching:
        """Whether rows get together what they get alone. Raises what the model raises for one row."""
        ...

    def merge_apart(self, singles: list[list[Any]]) -> list[Any]:
        """A batch whose rows are computed one by one."""
        ...

    def prepare_rows(self, batch: list[Any], lengths: Sequence[int], right_padding: Sequence[int]) -> None: ...

    def finalize_rows(self, batch: list[Any]) -> None: ...

    def filter_rows(self, batch: list[Any], indices: Sequence[int]) -> None: ...

    def trim_rows(self, batch: list[Any], counts: Sequence[int]) -> None: ...

    def extract_row(self, batch: list[Any], index: int) -> list[Any]: ...

    def cut_back(self, caches: list[Any], num_tokens: int) -> bool:
        """Trim a conversation after a failed step; whether all its layers hold so many tokens now."""
        ...

    def measure_row(self, batch: list[Any], index: int) -> KVBytes: ...

    def usable_prefix_row(self, batch: list[Any], index: int, length: int) -> int: ...

    def fork_row(self, batch: list[Any], index: int, length: int) -> list[Any]: ...
