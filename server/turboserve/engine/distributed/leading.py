"""Rank 0's side of a divided model: whatever is done to caches here is told to the other ranks, who do the same.

Step loop, runner and memory work as with a model that one process has all of. They reach caches through a runtime, a
family and a disk, which are here, and passes (leading_passes.py): each verb is sent before it is carried out, with
numbers in place of caches, so every rank runs the same passes over the same tokens in the same order. Verbs that only
read are answered from this rank's books, which are those of all.

A verb that raises has to raise on every rank; then the engine deals with it as ever. Raised on some alone, it ends the
run. So does a device that fails in a pass, for nobody knows what it did on the others.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from numpy.typing import NDArray

from turboquant_kv.cache.batch_probe import Batching, try_batches
from turboquant_kv.cache.rows_apart import forward
from turboquant_kv.cache.runtime import KVRuntime
from turboquant_kv.kv_bytes import KVBytes
from turboserve.cache.interfaces import Arrays, Caches, Header, HeldPages, Meta, OwnDisk, SessionDisk, StoredEntry
from turboserve.engine.distributed.digest import digest_of
from turboserve.engine.distributed.ranks import FirstRank
from turboserve.engine.served_formats import ServedFormats
from turboserve.messages import DiskStatus


class Numbered(list[Any]):
    """Caches that all ranks know by one number, until nobody here does."""

    def __init__(self, caches: Iterable[Any], number: int, gone: deque[int]) -> None:
        super().__init__(caches)
        self.number, self._gone = number, gone

    def __del__(self) -> None:
        self._gone.append(self.number)


class Lead:
    """What the verbs share: numbers of caches, and the word to the others."""

    def __init__(self, ranks: FirstRank, formats: ServedFormats) -> None:
        self.ranks, self.formats = ranks, formats
        self._next, self._gone = 0, deque[int]()
        self._touched: dict[int, weakref.ref[Numbered]] = {}
        self.num_compared = 0

    @contextmanager
    def doing(self, verb: str, *args: Any) -> Iterator[None]:
        """Tell the others, then carry it out; what it raises must be raised there as well.

        Raises RanksEndedError when a rank is gone.
        """
        while self._gone:
            number = self._gone.popleft()
            self._touched.pop(number, None)
            self.ranks.send(["forget", number])
        self.ranks.send(["do", verb, list(args)])
        try:
            yield
        except Exception as exc:
            if isinstance(exc, RuntimeError):  # MLX's, which a lost rank may be behind
                self.ranks.explain()
            self.ranks.send(["raised", type(exc).__name__])
            raise

    def new_number(self) -> int:
        self._next += 1
        return self._next

    def numbered(self, caches: Iterable[Any], number: int) -> Numbered:
        """New caches, which the others hold under this number."""
        known = Numbered(caches, number, self._gone)
        self._touched[number] = weakref.ref(known)
        return known

    def number_of(self, caches: Sequence[Any]) -> int:
        """Of caches that a verb is about to change or to read."""
        assert isinstance(caches, Numbered), "these caches are this rank's alone"
        self._touched[caches.number] = weakref.ref(caches)
        return caches.number

    # --- what the engine asks of a divided run

    @property
    def line(self) -> str:
        """How many ranks there are, and how often their books were compared."""
        return f"{self.ranks.size} ranks, books compared after {self.num_compared} steps"

    def after_step(self) -> None:
        """Send this rank's digest; whoever has another one says so, and all end."""
        touched = {number: caches for number, held in self._touched.items() if (caches := held()) is not None}
        self._touched.clear()
        digest = digest_of(self.formats.kv, touched.values())
        self.num_compared += 1
        self.ranks.send(["compare", self.num_compared, list(touched), digest])

    def close(self) -> None:
        """The others end, in order."""
        self.ranks.close()


class LeadingRuntime:
    """Implements the engine's ServingRuntime for a divided model: KVRuntime's verbs on every rank."""

    def __init__(self, lead: Lead, name: str, model: Any) -> None:
        self._lead, self._name, self._model = lead, name, model
        self.inner: KVRuntime = lead.formats.runtime(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # figures, which are the same on every rank

    def make_cache(self) -> Caches:
        number = self._lead.new_number()
        with self._lead.doing("make_cache", number, self._name):
            return self._lead.numbered(self.inner.make_cache(), number)

    def _new(self, verb: str, caches: Sequence[Any], *args: Any) -> Caches:
        """Caches that a verb makes of others."""
        number = self._lead.new_number()
        with self._lead.doing(verb, number, self._lead.number_of(caches), *args):
            return self._lead.numbered(getattr(self.inner, verb)(caches, *args), number)

    def _do(self, verb: str, caches: Sequence[Any], *args: Any) -> Any:
        with self._lead.doing(verb, self._lead.number_of(caches), *args):
            return getattr(self.inner, verb)(caches, *args)

    def fork(self, caches: Caches, length: int) -> Caches:
        return self._new("fork", caches, length)

    def fork_row(self, batch: Caches, index: int, length: int) -> Caches:
        return self._new("fork_row", batch, index, length)

    def extract_row(self, batch: Caches, index: int) -> Caches:
        return self._new("extract_row", batch, index)

    def copy(self, caches: Caches) -> Caches:
        return self._new("copy", caches)

    def merge_rows(self, singles: Sequence[Caches]) -> Caches:
        return self._merged("merge_rows", singles)

    def merge_apart(self, singles: Sequence[Caches]) -> Caches:
        return self._merged("merge_apart", singles)

    def _merged(self, verb: str, singles: Sequence[Caches]) -> Caches:
        number = self._lead.new_number()
        with self._lead.doing(verb, number, [self._lead.number_of(single) for single in singles]):
            return self._lead.numbered(getattr(self.inner, verb)(singles), number)

    def extend_rows(self, batch: Caches, other: Caches) -> Caches:
        number = self._lead.new_number()
        with self._lead.doing("extend_rows", number, self._lead.number_of(batch), self._lead.number_of(other)):
            return self._lead.numbered(self.inner.extend_rows(batch, other), number)

    def prepare_rows(self, batch: Caches, lengths: Sequence[int], right_padding: Sequence[int]) -> None:
        self._do("prepare_rows", batch, list(lengths), list(right_padding))

    def finalize_rows(self, batch: Caches) -> None:
        self._do("finalize_rows", batch)

    def filter_rows(self, batch: Caches, indices: Sequence[int]) -> None:
        self._do("filter_rows", batch, list(indices))

    def trim_rows(self, batch: Caches, counts: Sequence[int]) -> None:
        self._do("trim_rows", batch, list(counts))

    def cut_back(self, caches: Caches, num_tokens: int) -> bool:
        return bool(self._do("cut_back", caches, num_tokens))

    def release(self, caches: Caches) -> None:
        if caches:
            self._do("release", caches)

    def evaluate(self, caches: Caches) -> None:
        self._do("evaluate", caches)

    def try_batches(self) -> Batching:
        """Tried here; the others run the same passes, and what is found here holds for all."""

        def model(tokens: mx.array, cache: Caches) -> mx.array:
            with self._lead.doing("logits", self._lead.number_of(cache), tokens.tolist()):
                return forward(self._model, tokens, cache)

        return try_batches(model, self, self.inner.layers.kv_heads)


class LeadingFormats:
    """Implements cache.interfaces.CacheFamily for a divided model."""

    def __init__(self, lead: Lead, model: Any) -> None:
        self._lead, self._model, self._inner = lead, model, lead.formats
        self.default = self._inner.default
        self._runtimes: dict[str, LeadingRuntime] = {}
        self.default_runtime = self.runtime(self.default)

    def normalise(self, name: str) -> str:
        return self._inner.normalise(name)

    def runtime(self, name: str) -> LeadingRuntime:
        if name not in self._runtimes:
            with self._lead.doing("runtime", name):  # the first one of a format may measure means
                self._runtimes[name] = LeadingRuntime(self._lead, name, self._model)
        return self._runtimes[name]

    def totals(self) -> KVBytes:
        return self._inner.totals()

    def held_pages(self, caches: Caches) -> HeldPages | None:
        return self._inner.held_pages(caches)

    def can_cut(self, name: str) -> bool:
        return self._inner.can_cut(name)

    def convert(self, caches: Caches, source: str, target: str) -> Caches:
        number = self._lead.new_number()
        with self._lead.doing("convert", number, self._lead.number_of(caches), source, target):
            return self._lead.numbered(self._inner.convert(caches, source, target), number)

    def fingerprints(self, name: str) -> Mapping[str, str]:
        return self._inner.fingerprints(name)

    def export_caches(self, caches: Caches) -> tuple[Mapping[str, Any], list[NDArray[Any]]]:
        """This rank's part; the others keep theirs for `LeadingDisk.put`."""
        with self._lead.doing("export", self._lead.number_of(caches)):
            return self._inner.export_caches(caches)

    def import_caches(self, name: str, header: Mapping[str, Any], arrays: list[NDArray[Any]]) -> Caches:
        """This rank's part; the others take what `LeadingDisk.get` has found on their disks."""
        number = self._lead.new_number()
        with self._lead.doing("import", number, name):
            return self._lead.numbered(self._inner.import_caches(name, header, arrays), number)

    def allocated_bytes(self) -> int:
        return self._inner.allocated_bytes()

    def slack_bytes(self) -> int:
        return self._inner.slack_bytes()

    def slack_by_format(self) -> dict[str, int]:
        return self._inner.slack_by_format()

    def trim(self, wanted_bytes: int) -> int:
        with self._lead.doing("trim", wanted_bytes):
            return self._inner.trim(wanted_bytes)

    def check_integrity(self) -> None:
        self._inner.check_integrity()


class LeadingDisk(OwnDisk):
    """Implements cache.interfaces.SessionDisk: every rank stores its own part, and an entry is one that all have.

    cli/distributed.py refuses a folder that other servers use.
    """

    def __init__(self, lead: Lead, inner: SessionDisk) -> None:
        self._lead, self._inner = lead, inner

    def put(self, key: str, meta: Meta, header: Header, arrays: Arrays) -> bool:
        """Of what was exported or read last. A rank that cannot write has no such entry, so nobody will read it."""
        with self._lead.doing("put", key, dict(meta)):
            return self._inner.put(key, meta, header, arrays)

    def get(self, key: str) -> tuple[Meta, Header, Arrays] | None:
        stored = self._inner.get(key)
        if stored is None:
            return None
        version = str(stored[0].get("version", ""))
        with self._lead.doing("get", key, version):
            pass
        has_all = self._lead.ranks.all_agree(f"stored {key}", True)
        return stored if has_all else None

    def delete(self, key: str) -> None:
        with self._lead.doing("delete", key):
            self._inner.delete(key)

    def entries(self) -> Iterable[StoredEntry]:
        return self._inner.entries()

    def entry(self, key: str) -> StoredEntry | None:
        return self._inner.entry(key)

    def entry_bytes(self, key: str) -> int | None:
        return self._inner.entry_bytes(key)

    def status(self) -> DiskStatus:
        return self._inner.status()

    def keep_only_own(self) -> None:
        """Let the others delete what this rank has no part of."""
        with self._lead.doing("keep", [entry.key for entry in self._inner.entries()]):
            pass

    def close(self) -> None:
        self._inner.close()
